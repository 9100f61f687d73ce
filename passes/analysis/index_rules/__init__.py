"""Rules of the index-label analysis: how each operator joins the labels of its operands' indices.

Each rule is a small function `(node, table) -> Value` for the ATen operators it names. An operator without a rule
pins what it touches.
"""

from slrc.passes.analysis.index_rules import (
    attention,
    constants,
    contraction,
    convolution,
    elementwise,
    indexing,
    normalization,
    recurrent,
    reduction,
    resampling,
    selection,
    shape,
)
from slrc.passes.analysis.index_rules.table import Dims, LabelTable, Rule, Value

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **convolution.RULES,
    **contraction.RULES,
    **normalization.RULES,
    **reduction.RULES,
    **shape.RULES,
    **selection.RULES,
    **indexing.RULES,
    **resampling.RULES,
    **constants.RULES,
    **recurrent.RULES,
    **attention.RULES,
}

__all__ = ["RULES", "Dims", "LabelTable", "Rule", "Value"]
