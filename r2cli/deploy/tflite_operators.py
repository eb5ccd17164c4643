"""How each operation of an integer ONNX file is written in TensorFlow Lite: `write`, by the name of the operator.

What stands between grids is written in integers, on the grid of the QuantizeLinear that reads its result; what moves
values is the same for codes and floats; and what the ONNX file computes in float is in float here. A layer with a
weight of codes is in integers or refused.
"""

from collections.abc import Callable

import numpy as np
from onnx import NodeProto

from r2cli.deploy import tflite_layers, tflite_moving, tflite_tables
from r2cli.deploy.onnx_sheet import Unwritable
from r2cli.deploy.tflite_float import FLOATS
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
    lite.values[node.output[0]] = lite.requantized(lite.held(name), codes, node.output[0])


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
    x = lite.requantized(x, to.grid, f"{node.output[0]}.rounded")
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
        if _is_scaled_sum(lite, node):
            _scaled_sum(lite, node)
            return
        parts = lite.aligned(map(lite.codes, node.input))
        found, fused = lite.result(node, parts[0].order)
        inputs = [each.tensor for each in parts]
        lite.writer.operator(kind, inputs, [found.tensor], options, fusedActivationFunction=fused)

    return integers


def _is_scaled_sum(lite: LiteSheet, node: NodeProto) -> bool:
    """Whether the codes of a sum with a number are read on a finer grid, (x + c) * share, as a hard sigmoid's are."""
    to = [each for each in lite.readers.get(node.output[0], []) if each.op_type == "QuantizeLinear"]
    reads = lite.readers.get(to[0].output[0], []) if to else []
    is_read = bool(reads) and reads[0].op_type == "DequantizeLinear" and node.input[1] in lite.decoded
    return is_read and not lite.parameters(reads[0]).same(lite.parameters(to[0]))


def _scaled_sum(lite: LiteSheet, node: NodeProto) -> None:
    """Write it as a depthwise convolution of one weight for each channel."""
    rounds, number = lite.readers[node.output[0]][0], lite.decoded[node.input[1]]
    reads, shape, name = lite.readers[rounds.output[0]][0], lite.shapes[node.output[0]], node.output[0]
    grid, x = lite.parameters(reads), lite.codes(node.input[0])
    if number.integers.size != 1 or len(shape) < 2:
        raise Unwritable("its numbers differ, or it has no channels")
    # The tensor's last axis is the channels', and what is before it is an image.
    flat = (1, x.shape[x.order[-1]], int(np.prod(shape)) // x.shape[x.order[-1]], 1)
    own = lite.reshaped(x, flat, NHWC, f"{name}.image")
    added = float((number.integers.reshape(-1)[0] - number.zero) * number.scale)
    most, channels = 127, flat[1]
    sums, factor = _exact_line(x.codes, lite.parameters(rounds), added, most)
    weight = LiteGrid(np.full(channels, factor * grid.scale / x.codes.scale, np.float32), 0, 3)
    kernel = lite.writer.tensor(
        f"{name}.share", (1, 1, 1, channels), weight, np.full((1, 1, 1, channels), most, np.int8)
    )
    unit = LiteGrid(np.asarray(x.codes.scale * weight.scale, np.float32))
    bias = lite.writer.tensor(f"{name}.added", (channels,), unit, np.full(channels, sums, np.int32))
    found = lite.made(name, flat, grid, NHWC)
    options = {"padding": tflite_layers.VALID, "strideH": 1, "strideW": 1, "depthMultiplier": 1}
    options |= {"dilationHFactor": 1, "dilationWFactor": 1}
    inputs = [own.tensor, kernel, bias]
    lite.writer.operator("DEPTHWISE_CONV_2D", inputs, [found.tensor], "DepthwiseConv2D", **options)
    found = lite.reshaped(found, shape, x.order, f"{name}.flat")
    lite.values |= {name: found, rounds.output[0]: found}


def _exact_line(x: LiteGrid, rounded: LiteGrid, added: float, most: int) -> tuple[int, float]:
    """The sum that stands for `added` beside products of codes with `most`, and the factor of both, with which each code
    becomes the one that ONNX Runtime gives. The plain ones miss some: what lies halfway between two codes, as a hard
    sigmoid of 0, is rounded to even there and up here."""
    codes = np.arange(-128, 128)
    floats = (codes - x.zero).astype(np.float32) * x.scale + np.float32(added)
    wanted = np.clip(np.rint(floats / rounded.scale) + rounded.zero, -128, 127)
    low = np.where(wanted == -128, -np.inf, wanted - rounded.zero - 0.5)
    high = np.where(wanted == 127, np.inf, wanted - rounded.zero + 0.5)
    usual, factor = round(added * most / float(x.scale)), float(x.scale) / (most * float(rounded.scale))
    best = (-np.inf, usual, factor)
    for sums in range(usual - 8, usual + 9):
        total = (most * (codes - x.zero) + sums).astype(np.float64)
        own = total != 0
        ends = np.sort(np.stack([low[own] / total[own], high[own] / total[own]]), axis=0)
        least, greatest = ends[0].max(), ends[1].min()  # of the factors that give all of `wanted`
        middle = (least + greatest) / 2
        if greatest - least > best[0] and np.all((low < 0) & (0 < high) | own) and np.isfinite(middle):
            best = (greatest - least, sums, middle)
    return (best[1], best[2]) if best[0] > 0 else (usual, factor)


def sigmoid(lite: LiteSheet, node: NodeProto) -> None:
    """TensorFlow Lite gives a sigmoid on the grid of 256 steps from 0 to 1, and no other."""
    x = lite.codes(node.input[0])
    found, _ = lite.result(node, x.order)
    usual = LiteGrid(np.asarray(1 / 256, np.float32), -128)
    exact = found if found.codes.same(usual) else lite.made(f"{node.output[0]}.unit", x.shape, usual, x.order)
    lite.writer.operator("LOGISTIC", [x.tensor], [exact.tensor])
    if exact is not found:
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
