"""What an operation of TensorFlow Lite is written on: the ONNX graph, the file, and the tensors that hold its values.

A tensor may have its axes in another order than ONNX has them, because TensorFlow Lite's layers want the channels last:
a value says which, a Transpose only changes what it says, and `LiteSheet.laid` writes one where an operator needs it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from r2cli.deploy.onnx_sheet import Unwritable
from r2cli.deploy.tflite_writer import LiteGrid, TfliteWriter

Array = np.ndarray[Any, Any]
Order = tuple[int, ...]
NONE, RELU, RELU6 = 0, 1, 3  # the schema's fused activations
NHWC = (0, 2, 3, 1)


@dataclass(frozen=True)
class HeldValue:
    """A value: its tensor, its shape as ONNX has it, its grid (None of floats), and ONNX's axes as the tensor has them.

    A constant has its content too, in the order of its tensor.
    """

    tensor: int
    shape: tuple[int, ...]
    grid: LiteGrid | None
    order: Order
    content: Array | None = None

    @property
    def codes(self) -> LiteGrid:
        """Its grid. Raises Unwritable for floats."""
        if self.grid is None:
            raise Unwritable("it reads floats")
        return self.grid


@dataclass(frozen=True)
class HeldCodes:
    """What a DequantizeLinear gives of a constant, whose scales are those of the places on `axis`."""

    integers: Array
    scale: Array
    zero: int
    name: str
    axis: int = 0


@dataclass(frozen=True)
class RoundedBy:
    """The grid that reads what a node gives, the activation in between, and the names of the values up to there."""

    grid: LiteGrid
    fused: int
    names: tuple[str, ...]


class LiteSheet:
    """An ONNX graph that becomes a TensorFlow Lite one, and the values that are there already."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph, self.writer = model, model.graph, TfliteWriter()
        self.constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
        infos = [*model.graph.value_info, *model.graph.input, *model.graph.output]
        self.shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in infos}
        self.readers: dict[str, list[NodeProto]] = {}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.values: dict[str, HeldValue] = {}
        self.decoded: dict[str, HeldCodes] = {}
        self.given: dict[str, HeldValue] = {}  # the inputs, by name
        self._laid: dict[tuple[int, Order], HeldValue] = {}
        self._floats: dict[int, HeldValue] = {}

    # --- values that are read -------------------------------------------------------------------------------------

    def held(self, name: str) -> HeldValue:
        """The value that a node reads, in codes or in floats. A constant becomes a tensor."""
        if name not in self.values:
            if name in self.decoded:
                one = self.decoded[name]
                self.values[name] = self.constant(one.name, one.integers, LiteGrid(one.scale, one.zero, one.axis))
            elif name in self.constants and self.constants[name].dtype == np.float32:
                self.values[name] = self.constant(name, self.constants[name])
            else:
                raise Unwritable(f"it reads '{name}', which is neither codes nor floats")
        return self.values[name]

    def codes(self, name: str, order: Sequence[int] | None = None) -> HeldValue:
        """The value on its grid that a node reads, with its axes in `order`. Raises Unwritable for floats."""
        x = self.held(name)
        return self.laid(replace(x, grid=x.codes), x.order if order is None else order)

    def floats(self, name: str) -> HeldValue:
        """The value that a node reads, decoded where it is on a grid."""
        x = self.held(name)
        if x.grid is None:
            return x
        if x.tensor not in self._floats:
            found = self.made(f"{name}.float", x.shape, None, x.order)
            self.writer.operator("DEQUANTIZE", [x.tensor], [found.tensor], "Dequantize")
            self._floats[x.tensor] = found
        return replace(self._floats[x.tensor], shape=x.shape, order=x.order)

    def has_codes(self, name: str) -> bool:
        return name in self.decoded or (name in self.values and self.values[name].grid is not None)

    def ints(self, name: str) -> list[int]:
        """A constant list of integers. Raises Unwritable for one that is computed."""
        if name not in self.constants:
            raise Unwritable("its bounds or sizes are computed as the network runs")
        found: list[int] = self.constants[name].reshape(-1).tolist()
        return found

    # --- tensors ---------------------------------------------------------------------------------------------------

    def constant(self, name: str, content: Array, codes: LiteGrid | None = None) -> HeldValue:
        tensor = self.writer.tensor(name, content.shape, codes, content)
        return HeldValue(tensor, content.shape, codes, plain(content.ndim), content)

    def made(
        self, name: str, shape: Sequence[int], codes: LiteGrid | None, order: Sequence[int] | None = None
    ) -> HeldValue:
        """A new tensor for the value `name` of `shape`, as ONNX has it, with its axes in `order` or as they are."""
        order = tuple(plain(len(shape)) if order is None else order)
        tensor = self.writer.tensor(name, [shape[axis] for axis in order], codes)
        return HeldValue(tensor, tuple(shape), codes, order)

    def result(self, node: NodeProto, order: Sequence[int] | None = None) -> tuple[HeldValue, int]:
        """A tensor for what a node computes, on the grid that reads it, and the activation in between: the values in
        between become that tensor too. Raises Unwritable where floats read it."""
        to = self.rounding(node)
        found = self.made(node.output[0], self.shapes[node.output[0]], to.grid, order)
        self.values |= dict.fromkeys(to.names, found)
        return found, to.fused

    def rounding(self, node: NodeProto) -> RoundedBy:
        name, fused, names = node.output[0], NONE, []
        while True:
            names.append(name)
            readers = self.readers.get(name, [])
            own = self._activation(readers[0]) if len(readers) == 1 and not fused else NONE
            if not own:
                break
            name, fused = readers[0].output[0], own
        last = readers
        while len(last) == 1 and last[0].op_type in ("Relu", "Clip"):  # those that are written after it, on its grid
            last = self.readers.get(last[0].output[0], [])
        grids = [self.parameters(each) for each in last if each.op_type == "QuantizeLinear"]
        if not grids or len(grids) < len(last) or not all(grids[0].same(each) for each in grids):
            raise Unwritable("it gives floats")
        return RoundedBy(grids[0], fused, tuple(names))

    def _activation(self, node: NodeProto) -> int:
        """What TensorFlow Lite fuses into the operator before it."""
        if node.op_type == "Clip" and [float(self.constants[name]) for name in node.input[1:] if name] == [0, 6]:
            return RELU6
        return RELU if node.op_type == "Relu" else NONE

    def is_rounded(self, node: NodeProto) -> bool:
        """Whether what a node gives is put on a grid."""
        try:
            return bool(self.rounding(node))
        except Unwritable:
            return False

    def parameters(self, node: NodeProto) -> LiteGrid:
        scale, zero = (self.constants[name] for name in node.input[1:3])
        return LiteGrid(scale, int(zero))

    def passed(self, name: str, of: HeldValue, order: Sequence[int]) -> HeldValue:
        """A tensor for the value `name` that is picked or moved from `of`, on the same grid or in floats too."""
        self.values[name] = found = self.made(name, self.shapes[name], of.grid, order)
        return found

    # --- orders and shapes -----------------------------------------------------------------------------------------

    def laid(self, x: HeldValue, order: Sequence[int]) -> HeldValue:
        """`x` in a tensor whose axes are in `order`."""
        order = tuple(order)
        if x.order == order:
            return x
        if (x.tensor, order) not in self._laid:
            self._laid[x.tensor, order] = self._turned(x, order)
        return self._laid[x.tensor, order]

    def _turned(self, x: HeldValue, order: Order) -> HeldValue:
        turn, name = [x.order.index(axis) for axis in order], self.writer.name(x.tensor)
        if x.content is not None:
            grid = x.grid and replace(x.grid, axis=turn.index(x.grid.axis) if turn else 0)
            content = np.ascontiguousarray(x.content.transpose(turn))
            return HeldValue(self.writer.tensor(name, content.shape, grid, content), x.shape, grid, order, content)
        found = self.made(f"{name}.{''.join(map(str, order))}", x.shape, x.grid, order)
        if is_same_order(x, order):
            self.reshape(x.tensor, found)
        else:
            self.writer.operator("TRANSPOSE", [x.tensor, self.writer.ints(turn)], [found.tensor], "Transpose")
        return found

    def reshape(self, tensor: int, found: HeldValue) -> None:
        """Write the values of `tensor` as those of `found`, in the order in which both have them."""
        sizes = [found.shape[axis] for axis in found.order]
        self.writer.operator("RESHAPE", [tensor, self.writer.ints(sizes)], [found.tensor], "Reshape", newShape=sizes)

    def reshaped(self, x: HeldValue, shape: Sequence[int], order: Sequence[int], name: str) -> HeldValue:
        """The values of `x`, as its tensor has them, in another shape and order."""
        sizes = [shape[axis] for axis in order]
        if x.content is not None:
            content = x.content.reshape(sizes)
            tensor = self.writer.tensor(name, sizes, x.grid, content)
            return HeldValue(tensor, tuple(shape), x.grid, tuple(order), content)
        if sizes == [x.shape[axis] for axis in x.order]:
            return replace(x, shape=tuple(shape), order=tuple(order))
        found = self.made(name, shape, x.grid, order)
        self.reshape(x.tensor, found)
        return found

    def aligned(self, values: Iterable[HeldValue]) -> list[HeldValue]:
        """Values that are broadcast together, with as many axes each, all in the order of the first that has most."""
        parts = list(values)
        rank = max(len(each.shape) for each in parts)
        first = sorted(parts, key=lambda x: x.content is not None)
        order = next(each.order for each in first if len(each.shape) == rank)
        spread = []
        for each in parts:
            more = rank - len(each.shape)
            shape, own = (1,) * more + each.shape, (*range(more), *(axis + more for axis in each.order))
            name = f"{self.writer.name(each.tensor)}.{rank}"
            spread.append(self.laid(self.reshaped(each, shape, own, name) if more else each, order))
        return spread


def plain(rank: int) -> Order:
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    return (0, *range(2, rank), 1)


def is_same_order(x: HeldValue, order: Sequence[int]) -> bool:
    """Whether the values of `x` stand in the same order if its axes do in `order`: axes of length 1 move nothing."""
    return [axis for axis in x.order if x.shape[axis] != 1] == [axis for axis in order if x.shape[axis] != 1]


def attributes(node: NodeProto) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
