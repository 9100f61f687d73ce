"""What torch does anew at every export though it is the same each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import OperatorBase
from torch.export import decomp_utils, exported_program

LISTING = "_collect_all_valid_cia_ops"
_listed: dict[tuple[Any, ...], frozenset[Any]] = {}


@contextmanager
def remembered() -> Iterator[None]:
    """Spare what exports repeat: small graphs, such as single layers, take half of the time."""
    with listed_once(), registered_plainly():
        yield


@contextmanager
def registered_plainly() -> Iterator[None]:
    """Let torch register kernels of its operators without evaluating the type hints of what registers them.

    It registers thousands for every export, and the hints take a fourth of what exporting a small graph to ONNX does.
    """
    own = OperatorBase.py_impl

    def py_impl(self: OperatorBase, key: Any) -> Callable[[Any], Any]:
        if not isinstance(key, DispatchKey) or key == DispatchKey.Python or key in self.py_kernels:
            return own(self, key)

        def register(kernel: Any) -> Any:
            self.py_kernels[key] = kernel
            self._dispatch_cache.clear()
            return kernel

        return register

    OperatorBase.py_impl = py_impl  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        OperatorBase.py_impl = own  # type: ignore[method-assign]


@contextmanager
def listed_once() -> Iterator[None]:
    """Let torch look through all of its operators once, not at every export, until an operator is added.

    It does so for a third of what exporting a small graph takes.
    """
    own = getattr(exported_program, LISTING, None)
    if own is None:  # a version of torch that lists them otherwise
        yield
        return

    def listed(*args: Any) -> set[Any]:
        key = (*args, len(torch._C._dispatch_get_all_op_names()))
        if key not in _listed:
            _listed[key] = frozenset(own(*args))
        return set(_listed[key])

    with ExitStack() as undo:
        for module in (exported_program, decomp_utils):
            if hasattr(module, LISTING):
                undo.callback(setattr, module, LISTING, getattr(module, LISTING))
                setattr(module, LISTING, listed)
        yield
