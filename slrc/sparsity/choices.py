"""What can be chosen about a plan."""

from __future__ import annotations

from enum import StrEnum


class Allocation(StrEnum):
    """How the asked sparsity is shared out."""

    UNIFORM = "uniform"
    """The same share of every layer or group."""
    GLOBAL = "global"
    """Wherever the weights are smallest, by mean energy of a group."""


class Metric(StrEnum):
    """What pruning a layer is taken to cost, where a budget is shared out."""

    ENERGY = "energy"
    """The share of its energy that it loses."""
    ERROR = "error"
    """The error of its outputs, refitted to the dense ones."""
    DIVERGENCE = "divergence"
    """The same, by layers scaled to how far the network's outputs move."""


class Attention(StrEnum):
    """What is removed from an attention, where heads and their width are split from one dimension."""

    HEADS = "heads"
    """Whole heads."""
    WIDTH = "width"
    """The same places of every head."""


class LayerNorm(StrEnum):
    """What becomes of the dimension that a layer norm or RMS norm normalises over."""

    KEEP = "keep"
    """It stays."""
    NARROW = "narrow"
    """It is prunable: the norm keeps the statistics of its full width."""
