"""What an operation of TensorFlow Lite is written on: the ONNX graph, the file, and the tensors that hold its values.

Images are NHWC in TensorFlow Lite: a value of four axes is turned, and its shape here is that of ONNX.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from r2cli.deploy.onnx_sheet import Unwritable
from r2cli.deploy.tflite_writer import LiteGrid, TfliteWriter

Array = np.ndarray[Any, Any]
NONE, RELU, RELU6 = 0, 1, 3  # the schema's fused activations
NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclass(frozen=True)
class HeldValue:
    """A value: its tensor, its shape as ONNX has it, and its grid."""

    tensor: int
    shape: tuple[int, ...]
    grid: LiteGrid


@dataclass(frozen=True)
class HeldCodes:
    """What a DequantizeLinear gives of a constant."""

    integers: Array
    scale: Array
    zero: int
    name: str


class LiteSheet:
    """An ONNX graph that becomes a TensorFlow Lite one, and the values that are there already."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph, self.writer = model.graph, TfliteWriter()
        self.constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
        infos = [*model.graph.value_info, *model.graph.input, *model.graph.output]
        self.shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in infos}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.values: dict[str, HeldValue] = {}
        self.decoded: dict[str, HeldCodes] = {}
        self.given: dict[str, HeldValue] = {}  # the inputs, by name

    def held(self, name: str) -> HeldValue:
        """The value on its grid that a node reads. A constant becomes a tensor."""
        if name in self.decoded:
            one = self.decoded[name]
            codes = LiteGrid(one.scale, one.zero)
            content = turned(one.integers) if one.integers.ndim == 4 else one.integers
            self.values[name] = HeldValue(
                self.writer.tensor(one.name, content.shape, codes, content), one.integers.shape, codes
            )
        if name not in self.values:
            raise Unwritable("it reads floats" if name not in self.constants else "it reads a constant of floats")
        return self.values[name]

    def made(self, name: str, shape: Sequence[int], codes: LiteGrid) -> HeldValue:
        """A new tensor for the value `name` of `shape`, as ONNX has it."""
        shape = tuple(shape)
        return HeldValue(self.writer.tensor(name, lite_shape(shape), codes), shape, codes)

    def on_grid(self, node: NodeProto) -> tuple[HeldValue, int]:
        """A tensor for what a node computes, on the grid that reads it, and the activation in between.

        The values in between become that tensor too.
        """
        name, fused, between = node.output[0], NONE, []
        while True:
            readers = self.readers.get(name, [])
            between.append(name)
            if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
                fused = self.activation(readers[0])
                name = readers[0].output[0]
                continue
            grids = [self.parameters(each) for each in readers if each.op_type == "QuantizeLinear"]
            break
        if not grids or len(grids) < len(readers) or not all(grids[0].same(each) for each in grids):
            raise Unwritable("it gives floats")
        found = self.made(node.output[0], self.shapes[node.output[0]], grids[0])
        self.values |= dict.fromkeys(between, found)
        return found, fused

    def activation(self, node: NodeProto) -> int:
        if node.op_type == "Relu":
            return RELU
        bounds = [float(self.constants[name]) for name in node.input[1:]]
        if bounds != [0, 6]:
            raise Unwritable(f"values are clipped to {bounds} behind it")
        return RELU6

    def parameters(self, node: NodeProto) -> LiteGrid:
        scale, zero = (self.constants[name] for name in node.input[1:3])
        return LiteGrid(scale, int(zero))

    def passed(self, node: NodeProto, of: HeldValue) -> HeldValue:
        """A tensor for a value that a node picks or moves from `of`, on the same grid."""
        found = self.made(node.output[0], self.shapes[node.output[0]], of.grid)
        self.values[node.output[0]] = found
        return found

    def requantized(self, x: HeldValue, codes: LiteGrid, name: str) -> HeldValue:
        """`x` on another grid."""
        if x.grid.same(codes):
            return x
        found = self.made(name, x.shape, codes)
        self.writer.operator("QUANTIZE", [x.tensor], [found.tensor], "Quantize")
        return found

    def transposed(self, x: HeldValue, order: Sequence[int], shape: Sequence[int], name: str) -> int:
        """The tensor of `x` with its axes in another `order`, then of `shape` as TensorFlow Lite has it."""
        tensor = self.writer.tensor(name, shape, x.grid)
        self.writer.operator("TRANSPOSE", [x.tensor, self.writer.ints(order)], [tensor], "Transpose")
        return tensor

    def padded(self, x: HeldValue, pads: Sequence[int], name: str, fill: int | None = None) -> HeldValue:
        """`x` (n, c, h, w) with borders of zeros, or of the code `fill`; `pads` are those of both axes, before and
        behind."""
        if not any(pads):
            return x
        top, left, bottom, right = pads
        height, width = x.shape[2:]
        found = self.made(f"{name}.padded", (*x.shape[:2], height + top + bottom, width + left + right), x.grid)
        borders = self.writer.ints([[0, 0], [top, bottom], [left, right], [0, 0]])
        if fill is None or fill == x.grid.zero:
            self.writer.operator("PAD", [x.tensor, borders], [found.tensor], "Pad")
        else:
            value = self.writer.tensor(f"{name}.fill", (1,), x.grid, np.array([fill], np.int8))
            self.writer.operator("PADV2", [x.tensor, borders, value], [found.tensor], "PadV2")
        return found


def turned(content: Array) -> Array:
    """A constant (n, c, h, w) as (n, h, w, c)."""
    return np.ascontiguousarray(content.transpose(NHWC))


def lite_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in NHWC) if len(shape) == 4 else tuple(shape)


def attributes(node: NodeProto) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
