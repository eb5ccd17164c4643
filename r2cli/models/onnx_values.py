"""Values of an ONNX graph as it runs: tensors, and plain numbers where the graph computes shapes.

What a file computes from `Shape` and from small constants of integers is a number (rank 0) or a list of numbers
(rank 1) here, and never a tensor. So sizes stay sizes: torch.export sees the same graph as of a network that was
written in Python.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r2cli.errors import InputError

Value = Any  # a Tensor, a number, a list of numbers, or None for an optional input that is not given
Attributes = Mapping[str, Any]
LARGEST = 2**31  # elements of a value: nothing that a network for a phone or a server computes at once comes near
FEW = 64  # numbers: a longer list is a tensor
KINDS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class Operator:
    """How an operator of ONNX is computed: a function of the node's attributes and inputs.

    `numbers` are the places of inputs that must be numbers: shapes, axes, bounds. `device` in the attributes says where
    new tensors are made, `outputs` how many the node has.
    """

    compute: Callable[..., Value]
    numbers: tuple[int, ...] = ()


class Uncomputable(InputError):
    """What a node cannot compute; the message is the reason alone, and whoever runs the node adds its name."""


def is_numbers(value: Value) -> bool:
    """Whether a value is a number or a list of numbers."""
    return not isinstance(value, Tensor) and value is not None


def listed(value: Value) -> list[Any]:
    """A number or a list as a list. Raises Uncomputable for a tensor: then a shape depends on values."""
    if isinstance(value, Tensor) or value is None:
        raise Uncomputable("a shape, or an index, depends on the values of the input")
    return list(value) if isinstance(value, list | tuple) else [value]


def tensor(a: Attributes, value: Value, kind: torch.dtype | None = None) -> Tensor:
    """A value as a tensor, numbers as int64, float32 or bool."""
    if isinstance(value, Tensor):
        return value
    if any(isinstance(one, torch.SymInt | torch.SymFloat) for one in listed(value)):
        if not isinstance(value, list):
            return torch.full((), value, dtype=kind or torch.int64, device=a["device"])
        each = [torch.full((), one, dtype=kind or torch.int64, device=a["device"]) for one in value]
        return torch.stack(each)
    return torch.tensor(value, dtype=kind, device=a["device"])


def bounded(sizes: Sequence[Any]) -> Sequence[Any]:
    """`sizes` of a tensor that is about to be made. Raises Uncomputable where nobody has the memory."""
    if math.prod(size for size in sizes if isinstance(size, int)) > LARGEST:
        raise Uncomputable(f"it would make a tensor of {'x'.join(map(str, sizes))}")
    return sizes


def each(function: Callable[..., Any], *values: Value) -> Value:
    """`function` of numbers, element by element; a list of one, and a number, go with a list of any length."""
    lengths = [len(value) for value in values if isinstance(value, list)]
    if not lengths:
        return function(*values)
    most = max(lengths) if 0 not in lengths else 0
    if any(length not in (1, most) for length in lengths):
        raise Uncomputable(f"its inputs have {' and '.join(map(str, lengths))} numbers")
    wide = [value if isinstance(value, list) and len(value) == most else listed(value) * most for value in values]
    return [function(*row) for row in zip(*wide, strict=True)]


def operand(a: Attributes, value: Value) -> Value:
    """A value beside a tensor: one number stays a number, several become a tensor."""
    if isinstance(value, list):
        return value[0] if len(value) == 1 else tensor(a, value)
    return value


def axis_of(value: Value, axis: int) -> int:
    """An axis of a value, counted from 0."""
    rank = value.ndim if isinstance(value, Tensor) else int(isinstance(value, list))
    if not -rank <= axis < max(rank, 1):
        raise Uncomputable(f"it has no axis {axis}, its input has {rank}")
    return axis % rank if rank else 0
