"""LSTM, GRU and RNN of ONNX as torch's: their gates stand in another order, and directions on an axis of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from r2cli.models.onnx_values import Attributes, Operator, Uncomputable, Value, tensor

# Where torch's gates are among ONNX's: input, forget, cell, output of i o f c; reset, update, new of z r h.
GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
USUAL = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def _turned(gates: Tensor, order: Sequence[int]) -> Tensor:
    parts = gates.chunk(len(order))
    return torch.cat([parts[place] for place in order])


def _weights(kind: str, w: Tensor, r: Tensor, b: Value) -> list[Tensor]:
    """torch's weights and biases, of one direction after the other."""
    found = []
    for direction in range(w.shape[0]):
        parts = [w[direction], r[direction], *(b[direction].chunk(2) if b is not None else ())]
        found += [_turned(part, GATES[kind]) for part in parts]
    return found


def _require_usual(a: Attributes, kind: str, lengths: Value) -> None:
    if a.get("activations", [])[: len(USUAL[kind])] not in ([], USUAL[kind]) or "clip" in a or a.get("input_forget"):
        raise Uncomputable("it has other activations than torch's")
    if lengths is not None or a.get("layout"):
        raise Uncomputable("it reads sequences of several lengths, or the batch first")
    if kind == "GRU" and not a.get("linear_before_reset"):
        raise Uncomputable("its reset gate stands before the product, as torch's does not (linear_before_reset = 0)")


def _operator(kind: str) -> Operator:
    def compute(
        a: Attributes, x: Tensor, w: Tensor, r: Tensor, b: Value = None, lengths: Value = None, *states: Value
    ) -> tuple[Tensor, ...]:
        _require_usual(a, kind, lengths)
        if len(states) > 2:
            raise Uncomputable("it has peepholes, as torch's LSTM has not")
        turned, both = a.get("direction") == "reverse", w.shape[0] == 2
        size = (w.shape[0], x.shape[1], r.shape[2])
        given = [*states, None, None][: 2 if kind == "LSTM" else 1]
        first = [torch.zeros(size, device=x.device) if h is None else tensor(a, h).expand(size) for h in given]
        x = x.flip(0) if turned else x
        more = (_weights(kind, w, r, b), b is not None, 1, 0.0, False, both, False)
        if kind == "LSTM":
            y, *last = torch.lstm(x, first, *more)
        else:
            y, *last = (torch.gru if kind == "GRU" else torch.rnn_tanh)(x, first[0], *more)
        y = y.flip(0) if turned else y
        return (y.unflatten(2, (w.shape[0], -1)).transpose(1, 2), *last)

    return Operator(compute)


RECURRENT = {kind: _operator(kind) for kind in GATES}
