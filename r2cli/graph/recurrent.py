"""Recurrent layers: one function of a sequence, its first states and its weights, each weight a module of its own.

A layer of torch holds several weights, one for what it reads and one for its state, for each direction and each of its
layers. Each becomes codes under its own name, such as 'rnn.weight_ih_l0.weight'. Its gates stand in torch's order along
the first axis, (gates * hidden, inputs), so that scales belong to rows as in a linear layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ATEN = torch.ops.aten
KINDS: Mapping[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": ATEN.lstm.input,
    "gru": ATEN.gru.input,
    "rnn_tanh": ATEN.rnn_tanh.input,
    "rnn_relu": ATEN.rnn_relu.input,
}
STATES = {"lstm": 2}  # of the others one


class RecurrentWeight(nn.Module):
    """A weight of a recurrent layer, (gates * hidden, inputs): it reads nothing and gives itself."""

    weight: Tensor
    bias = None

    def forward(self) -> Tensor:
        return self.weight


def recurrent(
    kind: str,
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Return the values (n, steps, outputs) of every step, or (steps, n, outputs), and the last states.

    `weights` are those of each layer and direction: inputs', states', and where there are biases both of them. States
    are (layers * directions, n, hidden); None stands for zeros. No dropout is between the layers.
    """
    directions = layers * (1 + bidirectional)
    if states is None:
        zeros = x.new_zeros(directions, x.shape[0 if batch_first else 1], weights[1].shape[1])
        states = [zeros] * STATES.get(kind, 1)
    first: Any = list(states) if kind == "lstm" else states[0]
    biased = len(weights) == 4 * directions
    # As in training, without dropout the same function: cuDNN gives gradients in training alone.
    return KINDS[kind](x, first, list(weights), biased, layers, 0.0, True, bidirectional, batch_first)
