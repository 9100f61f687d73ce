"""What stands in `graph.json`: operators by their names, and arguments as JSON values.

What JSON has no word for is an object with one key:

    {"input": 0}  {"tensor": "fc.weight"}  {"node": "relu_1"}                  values of the graph
    {"tuple": [...]}  {"dict": [[key, value], ...]}  {"ordered_dict": ...}     containers; lists are lists
    {"torch": "torch.float32"}  {"device": "cpu"}  {"float": "inf"}            constants

Reading looks up the operators of ATen that `slrc.ir.operators` lists, and the few functions that are listed here; no
other name leads to anything.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.immutable_collections import immutable_dict, immutable_list

from slrc.errors import OutputError
from slrc.ir.operators import aten_operator

_HELPERS = (
    *(operator.add, operator.and_, operator.floordiv, operator.getitem, operator.mod, operator.mul, operator.neg),
    *(operator.or_, operator.pow, operator.sub, operator.truediv),
    *(operator.eq, operator.ge, operator.gt, operator.le, operator.lt, operator.ne),
    *(math.ceil, math.floor, math.trunc),
    *(torch.sym_float, torch.sym_int, torch.sym_ite, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_sum),
)
HELPERS: Mapping[str, Callable[..., Any]] = {f"{f.__module__.strip('_')}.{f.__name__}": f for f in _HELPERS}
"""Functions of symbolic sizes, and the choice of one of several results."""
CONSTANTS = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format))
}


@dataclass(frozen=True)
class GraphValue:
    """An input, tensor or node of the graph, by number or name."""

    tag: str
    key: int | str


def find_operator(name: str) -> Callable[..., Any]:
    """Return the operator of a stored name.

    Raises:
        OutputError: there is none, or it is not on the list of `slrc.ir.operators`.
    """
    if name in HELPERS:
        return HELPERS[name]
    parts = re.fullmatch(r"aten\.(\w+)\.(\w+)", name)
    if parts and (found := aten_operator(parts[1], parts[2])) is not None:
        return found
    raise OutputError(
        f"unknown operator `{name}`",
        hint=f"`slrc.ir.operators` lists what there is; perhaps torch {torch.__version__} is too old for the file",
    )


def operator_name(target: Any, program: str) -> str:
    """Return the name that `find_operator` knows an operator by.

    Raises:
        OutputError: it knows none.
    """
    name = str(target) if isinstance(target, OpOverload) else f"{target.__module__.strip('_')}.{target.__name__}"
    try:
        found = find_operator(name)
    except OutputError:
        found = None
    if found is not target:
        raise OutputError(f"{program} cannot be stored: `{name}` is not one of the operators that can be")
    return name


def encode(value: Any, values: Mapping[Node, GraphValue]) -> Any:
    """Return a value as JSON data; `values` says what nodes stand for.

    Raises:
        OutputError: there is no word for it.
    """
    value = values[value] if isinstance(value, Node) else value
    kind = type(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, GraphValue):
        return {value.tag: value.key}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind in (list, immutable_list):
        return [encode(x, values) for x in value]
    if kind in (tuple, torch.Size):
        return {"tuple": [encode(x, values) for x in value]}
    if kind in (dict, immutable_dict, OrderedDict):
        tag = "ordered_dict" if kind is OrderedDict else "dict"
        return {tag: [[encode(k, values), encode(x, values)] for k, x in value.items()]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if str(value) in CONSTANTS:
        return {"torch": str(value)}
    raise OutputError(
        f"a value of type {kind.__module__}.{kind.__qualname__} cannot be stored",
        hint="inputs and outputs may be tensors, numbers, strings, `None`, and tuples, lists and dicts of them",
    )


def decode(data: Any, value: Callable[[str, Any], Any]) -> Any:
    """Return the value of JSON data; `value(tag, key)` is asked for what belongs to the graph.

    Raises:
        OutputError: the data is no value.
    """
    if isinstance(data, list):
        return [decode(x, value) for x in data]
    if not isinstance(data, dict):
        return data
    tag, x = next(iter(data.items())) if len(data) == 1 else ("", None)
    match tag:
        case "input" | "tensor" | "node":
            return value(tag, x)
        case "tuple" if isinstance(x, list):
            return tuple(decode(y, value) for y in x)
        case "dict" | "ordered_dict" if isinstance(x, list):
            pairs = [(decode(k, value), decode(y, value)) for k, y in x]
            return dict(pairs) if tag == "dict" else OrderedDict(pairs)
        case "torch" if x in CONSTANTS:
            return CONSTANTS[x]
        case "device" if isinstance(x, str):
            return torch.device(x)
        case "float" if isinstance(x, str):
            return float(x)
    raise OutputError(f"`{json.dumps(data)[:80]}` is no value")
