"""What is compared: the methods with their grids, and the parts of the recipe and of SLR left out one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slrc.config import CompileConfig
from slrc.methods.base import Method
from slrc.methods.registry import make_method
from slrc.methods.settings import MethodName
from slrc.methods.slr import SLR
from slrc.methods.splitting import Copies
from slrc.sparsity.plans import Plan

PEAKS = (0.02, 0.05, 0.1)
"""Highest learning rates, of which each method takes its best."""
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Contender:
    """A method, and the options of `CompileConfig` that it is tuned over.

    `grid` has the settings that are tried with each learning rate. `fixed_set` keeps the sets that SLR's first
    projection finds. `masked` prunes before the first step, and trains under the masks. With `like`, what was the best
    for another contender is taken, with `options` on top.
    """

    method: str
    grid: tuple[Options, ...] = ({},)
    fixed_set: bool = False
    masked: bool = False
    like: str = ""
    options: Options = field(default_factory=dict)

    def settings(self) -> list[Options]:
        """Return what is tried: the grid, with each learning rate; nothing if it takes those of another."""
        if self.like:
            return []
        return [merged(options, {"recipe": {"peak_lr": peak}}) for options in self.grid for peak in PEAKS]

    def config(self, epochs: int, options: Options) -> dict[str, Any]:
        """Return the options of a run of so many epochs in all."""
        budget = {"epochs": 0, "retrain_epochs": epochs} if self.masked else {"epochs": epochs}
        return merged(merged({"method": self.method, **budget}, options), self.options)


def grid(table: str, *rows: Options) -> tuple[Options, ...]:
    """Return settings of one method's table."""
    return tuple({table: row} for row in rows)


ADMM = ({"rho": 0.1}, {"rho": 0.1, "rho_growth": 100}, {"rho": 1.0, "rho_growth": 10})
FOLLOWING = ({"rho": 0.2, "rho_growth": 10, "follow": True}, {"rho": 1.0, "rho_growth": 10, "follow": True})
CONTENDERS: Mapping[str, Contender] = {
    "gradual": Contender("gradual", grid("gradual", {"until": 0.5}, {"until": 0.75})),
    "slr-tightening": Contender("slr-tightening", grid("slr_tightening", {"rho": 0.2}, {"rho": 1.0})),
    "slr-tightening, Λ ≡ 0": Contender("slr-tightening", like="slr-tightening", options={"slr_tightening": {"s0": 0}}),
    "slr": Contender("slr", grid("slr", {"rho": 0.1}, {"rho": 1.0})),
    "slr, Λ ≡ 0": Contender("slr", like="slr", options={"slr": {"s0": 0}}),
    "slr, Z follows": Contender("slr", grid("slr", *FOLLOWING)),
    "slr, Z follows, fixed set": Contender("slr", like="slr, Z follows", fixed_set=True),
    "admm": Contender("admm", grid("admm", *ADMM)),
    "admm, Z follows": Contender("admm", grid("admm", *({**row, "follow": True} for row in ADMM))),
    "ac-dc": Contender("ac-dc", grid("ac_dc", {"final": 0.25}, {"final": 0.5})),
    "group-lasso": Contender("group-lasso", grid("group_lasso", {"until": 0.5}, {"until": 0.75})),
    "masks from the start": Contender("magnitude", masked=True),
    "reconstructed": Contender("reconstruct", masked=True),
    "dense": Contender("magnitude", like="masks from the start"),
}
"""`dense` prunes nothing: the dense network, trained as long with the same recipe. What is `reconstructed` is refitted
without labels before its masks' training."""

NO_RECIPE = {"one_cycle": False, "clip": 0.0, "peak_lr": 0.01}
PARTS: Mapping[str, Options] = {
    "the default": {},
    "no distillation": {"distill": False},
    "no rise of the learning rate": {"recipe": {"one_cycle": False}},
    "highest learning rate 0.01": {"recipe": {"peak_lr": 0.01}},
    "highest learning rate 0.1": {"recipe": {"peak_lr": 0.1}},
    "no clipping": {"recipe": {"clip": 0.0}},
    "none of these": {"distill": False, "recipe": NO_RECIPE},
    "temperature 4": {"recipe": {"temperature": 4.0}},
    "averaged weights": {"recipe": {"average": 0.98}},
    "pruned until 0.75 of the run": {"gradual": {"until": 0.75}},
    "pruned until the end": {"gradual": {"until": 1.0}},
    "6 updates an epoch": {"updates_per_epoch": 6},
}
"""Parts of the default left out or changed, one at a time."""


class FixedSet(SLR):
    """SLR that never projects again: its sets stay those of the first projection."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        first = self.splitting.copies

        def project() -> Copies:
            scored = self.splitting.scored()
            return Copies([scored[n] * kept for n, kept in zip(self.names, first.support, strict=True)], first.support)

        self.splitting.project = project  # type: ignore[method-assign]


def make_fixed_set(
    name: MethodName, parameters: Mapping[str, nn.Parameter], plan: Plan, updates: int, config: CompileConfig
) -> Method:
    """Return SLR with fixed sets, or another method as it is."""
    if name is MethodName.SLR:
        return FixedSet(parameters, plan, updates, config.slr)
    return make_method(name, parameters, plan, updates, config)


def merged(first: Options, second: Options) -> dict[str, Any]:
    """Return options with those of `second` over those of `first`, tables too."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        if isinstance(first[name], Mapping):
            both[name] = {**first[name], **second[name]}
    return both
