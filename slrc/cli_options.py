"""What options of the command line are made of: the configuration's own, and those that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from slrc.options import cli_words, options

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="file.py, package.module:function, torchvision:NAME or timm:NAME")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
DEVICE = typer.Option(
    "--device", metavar="HOST", help="a machine that ssh reaches: user@name, or a Host of your ssh configuration"
)
DeviceOption = Annotated[str | None, DEVICE]
TargetOption = Annotated[
    str | None,
    typer.Option("--target", help="which of the output's targets (default: the first that is for the device)"),
]

LockOption = Annotated[
    bool, typer.Option("--lock-clocks", help="lock the device's clocks meanwhile, by sudo there; asks first")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="show the whole trace of an error, and what torch logs")]
Given = dict[str, Any]
"""The options of `CompileConfig` that were given, by name."""


def takes(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take options of `CompileConfig`, which arrive in its parameter `given`."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            command(given={name: _value(value) for name, value in given.items() if value not in (None, [])}, **values)

        own = signature(command, eval_str=True).parameters
        position = list(own).index("given")
        before, after = list(own.values())[:position], list(own.values())[position + 1 :]
        everything = [*before, *(_parameter(name) for name in names), *after]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = Signature(everything)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in everything}
        return run

    return wrap


def _parameter(name: str) -> Parameter:
    """Return an option as typer reads it from a signature; what it may be is for the configuration to say."""
    field = options()[name]
    words = cli_words(field)
    flags = [words["flags"]] if "flags" in words else []
    option = typer.Option(*flags, help=field.description, metavar=words.get("metavar"), show_default=False)
    annotation = Annotated[_cli_type(field.annotation) | None, option]  # type: ignore[valid-type]
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def _cli_type(annotation: Any) -> Any:
    if get_origin(annotation) is tuple:
        return list[str]
    arguments = get_args(annotation)
    if any(get_origin(x) is Literal for x in arguments):
        return str
    plain = [kind for kind in (bool, int, float, Path) if annotation is kind or kind in arguments]
    return plain[0] if plain else str


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
