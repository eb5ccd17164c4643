"""How each operation of an integer ONNX file is written in TensorFlow Lite: `write`, by the name of the operator.

What stands between grids is written in integers, on the grid of the QuantizeLinear that reads its result; what moves
values is the same for codes and floats; and what the ONNX file computes in float is in float here. A layer with a
weight of codes is in integers or refused.
"""

from collections.abc import Callable

import numpy as np
from onnx import NodeProto

from r2cli.deploy import tflite_layers, tflite_lines, tflite_moving, tflite_tables
from r2cli.deploy.onnx_sheet import Unwritable
from r2cli.deploy.tflite_float import FLOATS
from r2cli.deploy.tflite_lines import requantized
from r2cli.deploy.tflite_sheet import NHWC, HeldCodes, LiteSheet, attributes
from r2cli.deploy.tflite_tables import Tables
from r2cli.deploy.tflite_writer import LiteGrid

Handler = Callable[[LiteSheet, NodeProto], None]
END_ORDERS = {4: NHWC}  # of a file's inputs and outputs, by their number of axes


def write(lite: LiteSheet, node: NodeProto, tables: Tables) -> None:
    """Write one node. Raises Unwritable for what has no form."""
    name, kind = node.output[0], node.op_type
    if name in tables.chains:
        tflite_tables.write(lite, tables.chains[name])
    elif name in lite.values or name in tables.covered:
        return  # written with another
    elif kind in GRIDS:
        GRIDS[kind](lite, node)
    elif kind in MOVES and (kind != "Resize" or attributes(node).get("mode", b"nearest") == b"nearest"):
        MOVES[kind](lite, node)
    elif kind in LAYERS and (kind != "MatMul" or node.input[1] in lite.decoded):
        LAYERS[kind](lite, node)
    elif kind in INTEGERS and all(map(lite.has_codes, node.input)) and lite.is_rounded(node):
        INTEGERS[kind](lite, node)
    elif kind in FLOATS:
        FLOATS[kind](lite, node)
    else:
        raise Unwritable("r2 knows no form of it")


# --- grids ---------------------------------------------------------------------------------------------------------


def quantize(lite: LiteSheet, node: NodeProto) -> None:
    codes, name = lite.parameters(node), node.input[0]
    if any(each.name == name for each in lite.graph.input):
        if name not in lite.given:
            shape = lite.shapes[name]
            lite.given[name] = lite.made(name, shape, codes, END_ORDERS.get(len(shape)))
        lite.values[name] = lite.given[name]
    lite.values[node.output[0]] = requantized(lite, lite.held(name), codes, node.output[0])


def dequantize(lite: LiteSheet, node: NodeProto) -> None:
    name = node.input[0]
    if name not in lite.constants:
        lite.values[node.output[0]] = x = lite.codes(name)
        if not x.codes.same(lite.parameters(node)):
            raise Unwritable("it reads codes on another grid than they were rounded to")
        return
    zero = lite.constants[node.input[2]] if len(node.input) > 2 else np.zeros(1, np.int8)
    axis = attributes(node).get("axis", 0)
    own = HeldCodes(lite.constants[name], lite.constants[node.input[1]], int(zero.reshape(-1)[0]), name, axis)
    lite.decoded[node.output[0]] = own


# --- integers ------------------------------------------------------------------------------------------------------


def activation(lite: LiteSheet, node: NodeProto) -> None:
    """A ReLU of codes that is not fused into what is before it, and bounds: the codes themselves are clipped, because
    rounding keeps the order of values. They are rounded before it where their grid is another."""
    x, to = lite.codes(node.input[0]), lite.rounding(node)
    x = requantized(lite, x, to.grid, f"{node.output[0]}.rounded")
    bounds = ["0"] if node.op_type == "Relu" else node.input[1:]
    for kind, bound in zip(("MAXIMUM", "MINIMUM"), bounds, strict=False):
        if bound:
            number = np.float32(0) if bound == "0" else lite.constants[bound]
            code = np.clip(np.rint(number / to.grid.scale) + to.grid.zero, -128, 127).astype(np.int8)
            own = lite.writer.tensor(f"{node.output[0]}.{kind.lower()}", (1,), to.grid, code.reshape(1))
            found = lite.made(f"{node.output[0]}.{kind.lower()}", x.shape, to.grid, x.order)
            lite.writer.operator(kind, [x.tensor, own], [found.tensor], "MaximumMinimum")
            x = found
    lite.values |= dict.fromkeys(to.names, x)


def elementwise(kind: str, options: str) -> Handler:
    def integers(lite: LiteSheet, node: NodeProto) -> None:
        if tflite_lines.is_scaled_sum(lite, node):
            tflite_lines.scaled_sum(lite, node)
            return
        parts = lite.aligned(map(lite.codes, node.input))
        found, fused = lite.result(node, parts[0].order)
        inputs = [each.tensor for each in parts]
        lite.writer.operator(kind, inputs, [found.tensor], options, fusedActivationFunction=fused)

    return integers


def sigmoid(lite: LiteSheet, node: NodeProto) -> None:
    """TensorFlow Lite gives a sigmoid on the grid of 256 steps from 0 to 1, and no other."""
    x = lite.codes(node.input[0])
    found, _ = lite.result(node, x.order)
    usual = LiteGrid(np.asarray(1 / 256, np.float32), -128)
    exact = found if found.codes.same(usual) else lite.made(f"{node.output[0]}.unit", x.shape, usual, x.order)
    lite.writer.operator("LOGISTIC", [x.tensor], [exact.tensor])
    if exact is not found:  # codes that were calibrated for another target
        lite.writer.operator("QUANTIZE", [exact.tensor], [found.tensor], "Quantize")


def mean(lite: LiteSheet, node: NodeProto) -> None:
    """The mean of images' channels, or over any axes that stay."""
    x, given = lite.codes(node.input[0]), attributes(node)
    axes = range(2, len(x.shape)) if node.op_type == "GlobalAveragePool" else given.get("axes", range(len(x.shape)))
    axes = [axis % len(x.shape) for axis in axes]
    if not given.get("keepdims", 1):
        raise Unwritable("its axes do not stay")
    found, _ = lite.result(node, x.order)
    places = lite.writer.ints(sorted(x.order.index(axis) for axis in axes))
    lite.writer.operator("MEAN", [x.tensor, places], [found.tensor], "Reducer", keepDims=True)


GRIDS: dict[str, Handler] = {"QuantizeLinear": quantize, "DequantizeLinear": dequantize}
INTEGERS: dict[str, Handler] = {
    **dict.fromkeys(("Relu", "Clip"), activation),
    "Add": elementwise("ADD", "Add"),
    "Mul": elementwise("MUL", "Mul"),
    "Sigmoid": sigmoid,
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), mean),
}
LAYERS: dict[str, Handler] = {
    "Conv": tflite_layers.convolution,
    "ConvTranspose": tflite_layers.transposed_convolution,
    "Gemm": tflite_layers.gemm,
    "MatMul": tflite_layers.product_with_weight,
    "AveragePool": tflite_layers.mean_of_windows,
    "MaxPool": tflite_layers.max_pool,
}
MOVES: dict[str, Handler] = {
    "Identity": tflite_moving.same,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), tflite_moving.reshape),
    "Transpose": tflite_moving.transpose,
    "Pad": tflite_moving.pad,
    "Slice": tflite_moving.slice_,
    "Split": tflite_moving.split,
    "Concat": tflite_moving.concatenation,
    "Gather": tflite_moving.gather,
    "Resize": tflite_moving.enlarged,
    "DepthToSpace": tflite_moving.depth_to_space,
    "Expand": tflite_moving.expand,
    "Tile": tflite_moving.tile,
}
