"""The activations that a packed layer may end in: what each computes, which operators it is, and its ONNX form.

The kernels have the same list, in the same order (`slrc/kernels/tile.h`); a test holds that the two agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from slrc.ir.nodes import argument, op_name

Condition = Callable[[Node], bool]


def _always(node: Node) -> bool:
    return True


def _clamps(low: object, high: object) -> Mapping[str, Condition]:
    """Return the operators that clamp to these bounds; `None` is no bound."""
    bounds = (low, high)
    found: dict[str, Condition] = {
        "hardtanh": lambda n: (argument(n, 1, "min_val", -1), argument(n, 2, "max_val", 1)) == bounds,
        "clamp": lambda n: (argument(n, 1, "min"), argument(n, 2, "max")) == bounds,
    }
    return found if high is not None else {**found, "clamp_min": lambda n: argument(n, 1, "min") == low}


@dataclass(frozen=True)
class Activation:
    """One activation.

    `compute(x, slope)` is its meaning; `slope` is that of `leakyrelu` below zero, and has no meaning elsewhere.
    `onnx` makes `y` of `sum`, in the text form of ONNX. `operators` are the ATen operators that it is, by their bare
    names, each where its condition holds.
    """

    compute: Callable[[Tensor, float], Tensor]
    onnx: str
    operators: Mapping[str, Condition] = field(default_factory=dict)

    def __call__(self, x: Tensor, slope: float) -> Tensor:
        """Return the activation of `x`."""
        return self.compute(x, slope)


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(lambda x, _: x, "y = Identity (sum)"),
    "relu": Activation(
        lambda x, _: functional.relu(x), "y = Relu (sum)", {"relu": _always, **_clamps(low=0, high=None)}
    ),
    "leakyrelu": Activation(
        functional.leaky_relu, "y = LeakyRelu <alpha: float = @slope> (sum)", {"leaky_relu": _always}
    ),
    "relu6": Activation(
        lambda x, _: functional.relu6(x),
        """low = Constant <value_float = 0.0> ()
    high = Constant <value_float = 6.0> ()
    y = Clip (sum, low, high)""",
        {"relu6": _always, **_clamps(low=0, high=6)},
    ),
    "silu": Activation(
        lambda x, _: functional.silu(x), "gate = Sigmoid (sum)\n    y = Mul (sum, gate)", {"silu": _always}
    ),
    "gelu": Activation(
        lambda x, _: functional.gelu(x),
        "y = Gelu (sum)",
        {"gelu": lambda n: argument(n, 1, "approximate", "none") == "none"},
    ),
    "hardswish": Activation(lambda x, _: functional.hardswish(x), "y = HardSwish (sum)", {"hardswish": _always}),
}


def activation_of(node: Node) -> str:
    """Return the name of the activation that an operator is; empty if it is none."""
    operator = op_name(node)
    for name, activation in ACTIVATIONS.items():
        if operator in activation.operators and activation.operators[operator](node):
            return name
    return ""
