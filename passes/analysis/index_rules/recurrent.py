"""Recurrent layers: a unit of the state goes from every gate, layer and direction."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from slrc.passes.analysis.index_rules.table import Dims, Labels, LabelTable, Rule, Value


def recurrent(node: Node, table: LabelTable) -> list[Value]:
    """`lstm(x (…, i), state (layers, …, h), [w_ih (gates·h, i), w_hh (gates·h, h), b_ih, b_hh, …]) -> (…, h), …`.

    A unit that starts at zero and whose weights are zero stays zero. All layers and directions share the width of the
    state, so the same place of each goes together.
    """
    if not str(node.target).endswith(".input"):
        raise NotImplementedError  # packed sequences
    x, states, parameters, has_biases, layers, *_ = node.args
    bidirectional = bool(node.args[7])
    assert isinstance(x, Node)
    assert isinstance(parameters, (list, tuple))
    assert isinstance(layers, int)
    given = [p for p in parameters if isinstance(p, Node)]
    each, directions = 4 if has_biases else 2, 2 if bidirectional else 1
    if len(given) != layers * directions * each:
        raise NotImplementedError  # with projections
    value = table.value(x)
    for labels in value.dims[:-1]:
        table.pin(labels, "a step of a sequence", node)
    start = [table.value(s) for s in (states if isinstance(states, (list, tuple)) else [states]) if isinstance(s, Node)]
    hidden: Labels = start[0].dims[-1]
    for state in start:
        for labels in state.dims[:-1]:
            table.pin(labels, "layers and samples of a state", node)
        hidden = table.join_if_labelled(hidden, state.dims[-1], node)
    for k in range(layers):
        cells = [given[(k * directions + d) * each :][:each] for d in range(directions)]
        for cell in cells:
            hidden = _join_cell(node, table, value, hidden, cell)
        width = np.tile(hidden, directions) if hidden is not None else None
        value = Value([*[None] * (len(value.dims) - 1), width])
    if not all(v.vanishes for v in [*start, *map(table.value, given)]):
        table.pin(hidden, "a state that is not zero", node)
    ends: list[Dims] = [[*[None] * (t.dim() - 1), hidden] for t in node.meta["val"][1:]]
    return [value, *(Value(dims) for dims in ends)]


def _join_cell(node: Node, table: LabelTable, x: Value, hidden: Labels, cell: list[Node]) -> Labels:
    """Join the weights of one layer and direction with its input and its state; return the labels of the state."""
    w_ih, w_hh, *_ = cell
    inner = table.join_if_labelled(x.dims[-1], table.dims(w_ih)[1], node)
    table.contract(inner, [x, table.value(w_ih)], node)
    hidden = table.join_if_labelled(hidden, table.dims(w_hh)[1], node)
    for weight in (w_ih, w_hh):
        table.consume(weight, 1)
    for parameter in cell:
        rows = table.dims(parameter)[0]
        if rows is None or hidden is None:
            table.pin(rows, "a state of a fixed size", node)
            table.pin(hidden, "a state of a fixed size", node)
            continue
        table.union.join(table.join_rows(rows.reshape(-1, len(hidden)).T), hidden)
    return hidden


RULES: dict[str, Rule] = dict.fromkeys(["lstm", "gru", "rnn_tanh", "rnn_relu"], recurrent)
