"""The options of a TensorRT target: `fp32`, `fp16` or `int8`, GPUs by name, and a device's version and its DLA."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from slrc.backends.base import INT8, Target
from slrc.backends.onnx_export import OPSET
from slrc.errors import BackendError

PRECISIONS = {"fp32": "float32", "fp16": "float16", INT8: INT8}
DLA = "dla"
MULTIPLE, DLA_MULTIPLE = 8, 32
"""What channels are best a multiple of: tensor cores take 8 numbers of float16 at a time, a DLA 32."""
Version = tuple[int, ...]


class Parser(NamedTuple):
    """What the ONNX parser of a version takes: the newest opset, a model's functions, and LayerNormalization."""

    opset: int
    functions: bool = True
    layer_norm: bool = True


PARSERS: dict[Version, Parser] = {
    (10, 13): Parser(OPSET),
    (10, 0): Parser(20),
    (9, 0): Parser(17),
    (8, 6): Parser(17, functions=False),
    (8, 5): Parser(17, functions=False, layer_norm=False),
}
"""By the first version that is so, the newest first. The opset is the one that the parser says it supports, or an older
one: parsers of TensorRT 8 take a newer one too, and read what is new in it as if it were not there."""
NO_DLA = ((10, 8), (11, 4, 1))
"""From the first version to before the second one TensorRT builds nothing for a DLA."""


@dataclass(frozen=True)
class Options:
    """A target's options.

    `precision` is as in the manifest, `capabilities` are such as `sm86`; `version` is that of the device's TensorRT,
    empty where none is named.
    """

    precision: str
    capabilities: tuple[str, ...] = ()
    version: Version = ()
    dla: bool = False

    @property
    def for_device(self) -> bool:
        """Whether the engine is to be built on another machine, from an ONNX file."""
        return bool(self.version) or self.dla

    @property
    def oldest(self) -> Version:
        """The oldest version whose parser takes what is written.

        If no version is named that is the newest one's, but for a DLA one that builds for it.
        """
        version = self.version or (NO_DLA[0] if self.dla else max(PARSERS))
        return next(first for first in PARSERS if version >= first)

    @property
    def parser(self) -> Parser:
        """What that parser takes."""
        return PARSERS[self.oldest]

    @property
    def channel_multiple(self) -> int:
        """What kept widths are rounded up to a multiple of."""
        return DLA_MULTIPLE if self.dla else MULTIPLE


def parse_options(target: Target, *, names_gpus: bool) -> Options:
    """Return a target's options; `names_gpus` says whether they are GPUs or a device's version.

    Which GPUs exist is not looked at.

    Raises:
        BackendError: an option is unknown, or two exclude each other.
    """
    given = tuple(dict.fromkeys(target.options))
    precisions = [o for o in given if o in PRECISIONS]
    capabilities = tuple(o for o in given if re.fullmatch(r"sm\d+", o))
    versions = [o for o in given if re.fullmatch(r"\d+\.\d+(\.\d+)*", o)]
    known = (*precisions, *capabilities, *(() if names_gpus else (*versions, DLA)))
    if unknown := [o for o in given if o not in known]:
        others = "compute capabilities such as `sm86`" if names_gpus else "a version such as `10.3`, `dla`"
        raise BackendError(
            f"target `{target}`: unknown option `{unknown[0]}`: expected `fp32`, `fp16` or `int8`, {others}",
            hint=f"such as `--target {target.backend}:{'sm86' if names_gpus else '10.3'}+fp16`",
        )
    for what, several in (("an engine has one precision", precisions), ("a device has one version", versions)):
        if len(several) > 1:
            raise BackendError(f"target `{target}`: {what}, got {' and '.join(several)}", hint="name one, or none")
    if capabilities and not names_gpus:
        raise BackendError(
            f"target `{target}`: `{target.backend}` builds for the GPU present, got `{capabilities[0]}`",
            hint=f"leave it out, or use `tensorrt-rtx:{capabilities[0]}` to build for a GPU by name",
        )
    dla = DLA in given
    precision = PRECISIONS[precisions[0]] if precisions else "float16" if dla else "float32"
    version = tuple(int(part) for part in versions[0].split(".")) if versions else ()
    options = Options(precision, capabilities, version, dla)
    _check_device(target, options)
    return options


def _check_device(target: Target, options: Options) -> None:
    if options.version and options.version < min(PARSERS):
        raise BackendError(
            f"target `{target}`: TensorRT 8.5 is the oldest that slrc writes for",
            hint="on a Jetson that is JetPack 5",
        )
    if options.dla and options.precision != "float16":
        named = next(o for o in target.options if o in PRECISIONS)
        raise BackendError(
            f"target `{target}`: a DLA computes in float16, got `{named}`", hint=f"leave `{named}` out: `tensorrt:dla`"
        )
    if options.dla and NO_DLA[0] <= options.version < NO_DLA[1]:
        raise BackendError(
            f"target `{target}`: TensorRT 10.8 to 11.4.0 builds nothing for a DLA",
            hint="leave `dla` out, or use 10.7 or before, or 11.4.1 or later",
        )
