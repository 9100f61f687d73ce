"""What every transform has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from slrc.ir.program import Program


class PassResult(NamedTuple):
    """A transform's program, and whether it differs from the one that went in."""

    program: Program
    modified: bool


class Transform(ABC):
    """A rewrite of a program: a frozen value whose fields are all that it needs besides the program.

    A second run of the same transform modifies nothing.
    """

    name: ClassVar[str]
    """Kebab-case, the words of the class and of its file."""

    @abstractmethod
    def __call__(self, program: Program) -> PassResult:
        """Return the rewritten program."""
