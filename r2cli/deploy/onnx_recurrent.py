"""How recurrent layers are written: ONNX's LSTM, GRU and RNN, one node for each layer, of both directions.

Codes stand in torch's order of gates. Behind them one Gather puts the rows into ONNX's and adds the directions' axis.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from r2cli.deploy.onnx_sheet import Sheet, Value
from r2cli.graph.recurrent import STATES

# By torch's kind: the operator, where each of its gates stands in torch, and what it does not do by default.
# LSTM: ONNX has input, output, forget, cell; torch input, forget, cell, output. GRU: ONNX has update, reset, new; torch
# reset, update, new.
OPERATORS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", (0,), {}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}


def recurrent(
    sheet: Sheet,
    kind: str,
    x: Value,
    states: Sequence[Value] | None,
    weights: Sequence[Value],
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[str]:
    """Write the layers of `graph.recurrent.recurrent`, and return the names of its values and last states."""
    operator, order, more = OPERATORS[kind]
    directions, count = 1 + bidirectional, STATES.get(kind, 1)
    if bidirectional and "activations" in more:
        more = {"activations": 2 * more["activations"]}
    parts = len(weights) // (layers * directions)
    hidden = weights[1].shape[1]
    rows = np.arange(len(order) * (hidden or 0)).reshape(len(order), 1, -1)[list(order)].reshape(1, -1)
    value, last = sheet.node("Transpose", x, perm=[1, 0, 2]) if batch_first else x.name, []
    for layer in range(layers):
        own = weights[layer * directions * parts :][: directions * parts]
        inner = [_joined(sheet, own[place::parts], rows) for place in (0, 1)]
        both = sheet.writer.constant(np.concatenate([rows, rows + rows.size], 1), kind="gates")
        pairs = [_once(sheet, "Concat", *own[at + 2 : at + 4]) for at in range(0, len(own), parts) if parts > 2]
        bias = _together(sheet, [_once(sheet, "Gather", pair, both) for pair in pairs]) if pairs else None
        first = [_part(sheet, one, layer * directions, directions) for one in states or ()]
        made = sheet.writer.several(
            operator,
            [value, *inner, *([bias, None, *first] if first else [bias] if bias else [])],
            1 + count,
            hidden_size=hidden,
            direction="bidirectional" if bidirectional else None,
            **more,
        )
        last.append(made[1:])
        # (steps, directions, n, hidden), with the directions side by side
        turn = [2, 0, 1, 3] if batch_first and layer == layers - 1 else [0, 2, 1, 3]
        value = sheet.node("Reshape", sheet.node("Transpose", made[0], perm=turn), sheet.writer.ints([0, 0, -1]))
    return [value, *(_together(sheet, list(each)) for each in zip(*last, strict=True))]


def _joined(sheet: Sheet, weights: Sequence[Value], rows: Any) -> str:
    """The weights of each direction, (directions, gates * hidden, inputs), their `rows` in ONNX's order."""
    index = sheet.writer.constant(rows, kind="gates")
    return _together(sheet, [_once(sheet, "Gather", weight, index) for weight in weights])


def _together(sheet: Sheet, names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else _once(sheet, "Concat", *names)


def _once(sheet: Sheet, operation: str, *inputs: Value | str) -> str:
    """A node along the first axis, shared by the steps of a cell: of copies ONNX Runtime 1.32 loads none."""
    return sheet.writer.once(operation, sheet.named(inputs), axis=0)


def _part(sheet: Sheet, state: Value, start: int, count: int) -> str:
    """The first states of one layer, (directions, n, hidden)."""
    if state.shape[0] == count:
        return state.name
    bounds = [sheet.writer.ints([each]) for each in (start, start + count, 0)]
    return sheet.node("Slice", state, *bounds)
