"""What an engine consists of, as its report shows: layers, their precisions, and how many are run sparse."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict


class EngineSummary(BaseModel):
    """The layers of an engine after fusion.

    `precisions` counts them by the type that they compute to, such as `float16`; those that compute sizes alone have
    none. `sparse_eligible` of them have 2:4 weights, and `sparse_chosen` run by them; `None` where the builder did not
    say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int
    precisions: Mapping[str, int] = {}
    sparse_eligible: int | None = None
    sparse_chosen: int | None = None

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in sorted(self.precisions.items()))
        said = f"{self.layers} layers" + (f" ({types})" if types else "")
        if self.sparse_eligible is None:
            return said
        chosen = "unknown" if self.sparse_chosen is None else self.sparse_chosen
        return f"{said}; 2:4: {self.sparse_eligible} eligible, {chosen} chosen"
