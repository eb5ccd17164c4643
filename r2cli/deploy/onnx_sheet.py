"""What an operation is written on: the file, the tensors that it reads, and the shapes that it is to give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto

from r2cli.deploy.onnx_writer import OnnxWriter

# None stands for a length that follows the batch.
Shape = tuple[int | None, ...]
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its name, its shape and its type."""

    name: str
    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class Sheet:
    """What a handler writes on: the file, and the shapes and types of the results (one, or several) that it gives."""

    writer: OnnxWriter
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    batch: "Callable[[], str]"  # writes and names the batch's size, (1,) INT64

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    def node(self, operation: str, *inputs: Any, **attributes: Any) -> str:
        """Write a node on values, names, or numbers, which become constants of the first value's type."""
        return self.writer.node(operation, self.named(inputs), **attributes)

    def named(self, inputs: Sequence[Any]) -> list[str | None]:
        first = next((each for each in inputs if isinstance(each, Value)), None)
        dtype = numpy_type(torch.float32 if first is None else first.dtype)
        return [_name(each, self.writer, dtype) for each in inputs]

    def cast(self, given: Any, wanted: torch.dtype) -> Any:
        """Give a value or a number the type `wanted`, as torch promotes it; what has a name alone stays as it is."""
        if given is None or isinstance(given, str):
            return given
        if not isinstance(given, Value):
            return self.writer.constant(given, numpy_type(wanted))
        if given.dtype == wanted:
            return given
        if wanted not in TYPES:
            raise Unwritable(f"it makes values of {wanted}")
        return Value(self.node("Cast", given, to=TYPES[wanted]), given.shape, wanted)

    def sizes(self, shape: Shape) -> str:
        """Name the shape (n,) INT64, computed as the network runs where more than one length follows the batch."""
        if sum(length is None for length in shape) <= 1:
            return self.writer.ints([-1 if length is None else length for length in shape])
        raise Unwritable("two lengths of its result follow the batch")


class Unwritable(Exception):
    """An operation that has no form in ONNX here; the message says why."""


def refusal(name: str, what: str, why: str) -> str:
    """What is said of the node `name`, an operation or a module `what`, that has no form."""
    return f"'{name}' ({what}) cannot be written as ONNX: {why}. Write it another way in the network's code"


UNKNOWN = "r2 knows no form of it"


def _name(given: Any, writer: OnnxWriter, dtype: Any) -> str | None:
    if isinstance(given, Value):
        return given.name
    return given if given is None or isinstance(given, str) else writer.constant(given, dtype)


def numpy_type(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype


def as_tuple(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, tuple | list) else (given,)


def spread(given: Any, axes: int) -> list[int]:
    return list(given) if isinstance(given, tuple | list) and len(given) == axes else list(as_tuple(given)) * axes
