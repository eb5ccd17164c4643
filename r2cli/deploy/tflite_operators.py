"""How each operation of an integer ONNX file is written in TensorFlow Lite: `HANDLERS`, by the name of the operator.

An operator here is one of TensorFlow Lite's, with the grid of the QuantizeLinear that reads its result.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from r2cli.deploy.onnx_sheet import Unwritable
from r2cli.deploy.tflite_sheet import NCHW, NHWC, HeldCodes, HeldValue, LiteSheet, attributes, lite_shape
from r2cli.deploy.tflite_writer import LiteGrid

SAME, VALID = 0, 1  # the schema's paddings


# --- grids ---------------------------------------------------------------------------------------------------------


def quantize(lite: LiteSheet, node: NodeProto) -> None:
    if node.output[0] in lite.values:  # written with the sum before it
        return
    codes, name = lite.parameters(node), node.input[0]
    if any(each.name == name for each in lite.graph.input):
        if name not in lite.given:
            lite.given[name] = lite.made(name, lite.shapes[name], codes)
        lite.values[name] = lite.given[name]
    lite.values[node.output[0]] = lite.requantized(lite.held(name), codes, node.output[0])


def dequantize(lite: LiteSheet, node: NodeProto) -> None:
    name = node.input[0]
    if name not in lite.constants:
        lite.values[node.output[0]] = lite.held(name)
        if not lite.held(name).grid.same(lite.parameters(node)):
            raise Unwritable("it reads codes on another grid than they were rounded to")
        return
    zero = lite.constants[node.input[2]] if len(node.input) > 2 else np.zeros(1, np.int8)
    own = HeldCodes(lite.constants[name], lite.constants[node.input[1]], int(zero.reshape(-1)[0]), name)
    lite.decoded[node.output[0]] = own


def activation(lite: LiteSheet, node: NodeProto) -> None:
    """A ReLU is fused into what is before it; of a value that is on a grid already it becomes an operator."""
    if node.output[0] in lite.values:
        return
    x, kind = lite.held(node.input[0]), "RELU6" if node.op_type == "Clip" else "RELU"
    lite.activation(node)
    found, _ = lite.on_grid(node)
    clipped = lite.made(f"{node.output[0]}.clipped", x.shape, x.grid)
    lite.writer.operator(kind, [x.tensor], [clipped.tensor])
    lite.writer.operator("QUANTIZE", [clipped.tensor], [found.tensor], "Quantize")


# --- layers --------------------------------------------------------------------------------------------------------


def _bias(lite: LiteSheet, node: NodeProto, weight: HeldCodes, x: HeldValue, channels: int) -> int:
    codes = LiteGrid(np.asarray(x.grid.scale * weight.scale, np.float32))
    if len(node.input) < 3:
        return lite.writer.tensor(f"{weight.name}.no_bias", (channels,), codes, np.zeros(channels, np.int32))
    own = lite.decoded.get(node.input[2])
    if own is None:
        raise Unwritable("its bias is not on the grid of its sums")
    return lite.writer.tensor(own.name, (channels,), codes, own.integers)


def _weight(lite: LiteSheet, node: NodeProto) -> HeldCodes:
    own = lite.decoded.get(node.input[1])
    if own is None:
        raise Unwritable("its weight has no codes, or is computed as the network runs")
    return own


def convolution(lite: LiteSheet, node: NodeProto) -> None:
    x, weight, given = lite.held(node.input[0]), _weight(lite, node), attributes(node)
    if len(x.shape) != 4:
        raise Unwritable("it has not two axes")
    group, (outputs, inputs) = given.get("group", 1), weight.integers.shape[:2]
    bias = _bias(lite, node, weight, x, outputs)
    padding, x = _padding(lite, node, x, given)
    depthwise = inputs == 1 and group == x.shape[1] and group > 1
    # (outputs, inputs, h, w) as (outputs, h, w, inputs); of a depthwise layer as (1, h, w, outputs).
    content = weight.integers.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))
    kernel = lite.writer.tensor(weight.name, content.shape, LiteGrid(weight.scale, 0, 3 if depthwise else 0), content)
    found, fused = lite.on_grid(node)
    strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
    options: dict[str, Any] = {"padding": padding, "strideH": strides[0], "strideW": strides[1]}
    options |= {"dilationHFactor": dilations[0], "dilationWFactor": dilations[1], "fusedActivationFunction": fused}
    if depthwise:
        options["depthMultiplier"] = outputs // group
    kind, name = ("DEPTHWISE_CONV_2D", "DepthwiseConv2D") if depthwise else ("CONV_2D", "Conv2D")
    lite.writer.operator(kind, [x.tensor, kernel, bias], [found.tensor], name, **options)


def _padding(
    lite: LiteSheet, node: NodeProto, x: HeldValue, given: dict[str, Any], fill: int | None = None
) -> tuple[int, HeldValue]:
    """The padding of TensorFlow Lite, and what it is applied to: where it has no such padding, a value with borders."""
    pads = list(given.get("pads", [0, 0, 0, 0]))
    if not any(pads):
        return VALID, x
    strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
    whole = []
    for axis in (0, 1):
        length, reach = x.shape[2 + axis], dilations[axis] * (given["kernel_shape"][axis] - 1) + 1
        whole.append(max(0, (-(-length // strides[axis]) - 1) * strides[axis] + reach - length))
    if pads == [each // 2 for each in whole] + [each - each // 2 for each in whole]:
        return SAME, x
    return VALID, lite.padded(x, pads, node.output[0], fill)


def gemm(lite: LiteSheet, node: NodeProto) -> None:
    x, weight = lite.held(node.input[0]), _weight(lite, node)
    if not attributes(node).get("transB"):
        raise Unwritable("its weight is transposed")
    bias = _bias(lite, node, weight, x, len(weight.integers))
    matrix = lite.writer.tensor(weight.name, weight.integers.shape, LiteGrid(weight.scale), weight.integers)
    found, fused = lite.on_grid(node)
    options = {"fusedActivationFunction": fused, "keepNumDims": False}
    lite.writer.operator("FULLY_CONNECTED", [x.tensor, matrix, bias], [found.tensor], "FullyConnected", **options)


# --- sums, products and pools --------------------------------------------------------------------------------------


def elementwise(kind: str, options: str) -> Callable[[LiteSheet, NodeProto], None]:
    def write(lite: LiteSheet, node: NodeProto) -> None:
        parts = [lite.held(name) for name in node.input]
        ranks = {len(each.shape) for each in parts if each.shape}
        if len(ranks) > 1 and 4 in ranks:
            raise Unwritable("it broadcasts a value of fewer axes over images")
        if _scaled_sum(lite, node):
            return
        found, fused = lite.on_grid(node)
        inputs = [each.tensor for each in parts]
        lite.writer.operator(kind, inputs, [found.tensor], options, fusedActivationFunction=fused)

    return write


def _scaled_sum(lite: LiteSheet, node: NodeProto) -> bool:
    """Write a sum with a number whose codes are read on a finer grid, (x + c) * share, as a hard sigmoid is: as a
    depthwise convolution of one weight for each channel. Says whether it is one."""
    rounds = next((each for each in lite.readers.get(node.output[0], []) if each.op_type == "QuantizeLinear"), None)
    reads = None if rounds is None else lite.readers[rounds.output[0]][0]
    number = lite.decoded.get(node.input[1])
    if number is None or rounds is None or reads is None or reads.op_type != "DequantizeLinear":
        return False
    grid, x = lite.parameters(reads), lite.held(node.input[0])
    if grid.same(lite.parameters(rounds)):
        return False
    if len(x.shape) not in (2, 4) or number.integers.size != 1:
        raise Unwritable("it is neither an image nor a vector, or its numbers differ")
    channels, most, shape, name = x.shape[1], 127, x.shape, node.output[0]
    image = (*shape, 1, 1) if len(shape) == 2 else shape
    x = _reshaped(lite, x, image, f"{name}.image")
    added = float((number.integers.reshape(-1)[0] - number.zero) * number.scale)
    own, factor = _exact_line(x.grid, lite.parameters(rounds), added, most)
    weight = LiteGrid(np.full(channels, factor * grid.scale / x.grid.scale, np.float32), 0, 3)
    ones = np.full((1, 1, 1, channels), most, np.int8)
    kernel = lite.writer.tensor(f"{node.output[0]}.share", ones.shape, weight, ones)
    sums = np.full(channels, own, np.int32)
    unit = LiteGrid(np.asarray(x.grid.scale * weight.scale, np.float32))
    bias = lite.writer.tensor(f"{node.output[0]}.added", sums.shape, unit, sums)
    found = lite.made(name, image, grid)
    options: dict[str, Any] = {"padding": VALID, "strideH": 1, "strideW": 1, "depthMultiplier": 1}
    options |= {"dilationHFactor": 1, "dilationWFactor": 1}
    inputs = [x.tensor, kernel, bias]
    lite.writer.operator("DEPTHWISE_CONV_2D", inputs, [found.tensor], "DepthwiseConv2D", **options)
    found = _reshaped(lite, found, shape, f"{name}.vector")
    lite.values |= {name: found, rounds.output[0]: found}
    return True


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


def _reshaped(lite: LiteSheet, x: HeldValue, shape: Sequence[int], name: str) -> HeldValue:
    """`x` in another shape in which its values have the same order."""
    if tuple(shape) == x.shape:
        return x
    found, sizes = lite.made(name, shape, x.grid), list(lite_shape(shape))
    lite.writer.operator("RESHAPE", [x.tensor, lite.writer.ints(sizes)], [found.tensor], "Reshape", newShape=sizes)
    return found


def concatenation(lite: LiteSheet, node: NodeProto) -> None:
    parts = [lite.held(name) for name in node.input]
    found, fused = lite.on_grid(node)
    own = [lite.requantized(part, found.grid, f"{node.output[0]}.{k}") for k, part in enumerate(parts)]
    axis = _axis(attributes(node)["axis"], len(found.shape))
    options = {"axis": axis, "fusedActivationFunction": fused}
    lite.writer.operator("CONCATENATION", [each.tensor for each in own], [found.tensor], "Concatenation", **options)


def _axis(axis: int, rank: int) -> int:
    """Where an axis of ONNX stands in TensorFlow Lite."""
    return NHWC.index(axis % rank) if rank == 4 else axis % rank


def sigmoid(lite: LiteSheet, node: NodeProto) -> None:
    """TensorFlow Lite gives a sigmoid on the grid of 256 steps from 0 to 1, and no other."""
    x = lite.held(node.input[0])
    found, _ = lite.on_grid(node)
    usual = LiteGrid(np.asarray(1 / 256, np.float32), -128)
    exact = found if found.grid.same(usual) else lite.made(f"{node.output[0]}.unit", x.shape, usual)
    lite.writer.operator("LOGISTIC", [x.tensor], [exact.tensor])
    if exact is not found:
        lite.writer.operator("QUANTIZE", [exact.tensor], [found.tensor], "Quantize")


def global_mean(lite: LiteSheet, node: NodeProto) -> None:
    x = lite.held(node.input[0])
    found, _ = lite.on_grid(node)
    lite.writer.operator("MEAN", [x.tensor, lite.writer.ints([1, 2])], [found.tensor], "Reducer", keepDims=True)


def mean_of_windows(lite: LiteSheet, node: NodeProto) -> None:
    """Written as a depthwise convolution with weights of 1: TensorFlow Lite's own pool gives no other grid."""
    x, given = lite.held(node.input[0]), attributes(node)
    if any(given.get("pads", [])) and not given.get("count_include_pad"):
        raise Unwritable("its border is not counted")
    if given.get("ceil_mode"):
        raise Unwritable("it rounds its size up")
    padding, x = _padding(lite, node, x, given)
    channels, (height, width) = x.shape[1], given["kernel_shape"]
    share = LiteGrid(np.full(channels, 1 / (height * width), np.float32), 0, 3)
    ones = np.ones((1, height, width, channels), np.int8)
    kernel = lite.writer.tensor(f"{node.output[0]}.ones", ones.shape, share, ones)
    bias = LiteGrid(np.asarray(x.grid.scale * share.scale, np.float32))
    nothing = lite.writer.tensor(f"{node.output[0]}.no_bias", (channels,), bias, np.zeros(channels, np.int32))
    found, fused = lite.on_grid(node)
    strides = given.get("strides", [1, 1])
    options = {"padding": padding, "strideH": strides[0], "strideW": strides[1], "depthMultiplier": 1}
    options |= {"fusedActivationFunction": fused, "dilationHFactor": 1, "dilationWFactor": 1}
    inputs = [x.tensor, kernel, nothing]
    lite.writer.operator("DEPTHWISE_CONV_2D", inputs, [found.tensor], "DepthwiseConv2D", **options)


def max_pool(lite: LiteSheet, node: NodeProto) -> None:
    x, given = lite.held(node.input[0]), attributes(node)
    if len(x.shape) != 4 or any(each != 1 for each in given.get("dilations", [])):
        raise Unwritable("it has not two axes, or has dilations")
    if given.get("ceil_mode"):  # a border of the least code takes it up to the last window
        given["pads"] = _up_to_last_window(x, lite.shapes[node.output[0]], given)
    padding, x = _padding(lite, node, x, given, fill=-128)
    found, strides = lite.passed(node, x), given.get("strides", [1, 1])
    kernel = given["kernel_shape"]
    options = {"padding": padding, "strideH": strides[0], "strideW": strides[1]}
    options |= {"filterHeight": kernel[0], "filterWidth": kernel[1]}
    lite.writer.operator("MAX_POOL_2D", [x.tensor], [found.tensor], "Pool2D", **options)


def _up_to_last_window(x: HeldValue, out: Sequence[int], given: dict[str, Any]) -> list[int]:
    pads, strides = list(given.get("pads", [0, 0, 0, 0])), given.get("strides", [1, 1])
    for axis in (0, 1):
        reach = (out[2 + axis] - 1) * strides[axis] + given["kernel_shape"][axis]
        pads[2 + axis] = max(pads[2 + axis], reach - x.shape[2 + axis] - pads[axis])
    return pads


# --- moving --------------------------------------------------------------------------------------------------------


def reshape(lite: LiteSheet, node: NodeProto) -> None:
    """Also Flatten, Squeeze and Unsqueeze. Images are turned back before, and new ones turned after."""
    x, name = lite.held(node.input[0]), node.output[0]
    shape, tensor = lite.shapes[name], x.tensor
    flat = len(x.shape) == 4 and (x.shape[1] == 1 or x.shape[2] == x.shape[3] == 1)  # turning moves nothing
    if len(x.shape) == 4 and not flat:
        tensor = lite.transposed(x, NCHW, x.shape, f"{name}.nchw")
    found, again = lite.passed(node, x), len(shape) == 4 and not (shape[1] == 1 or shape[2] == shape[3] == 1)
    target = lite.writer.tensor(f"{name}.nchw", shape, x.grid) if again else found.tensor
    sizes = list(shape if again else lite_shape(shape))
    lite.writer.operator("RESHAPE", [tensor, lite.writer.ints(sizes)], [target], "Reshape", newShape=sizes)
    if again:
        lite.writer.operator("TRANSPOSE", [target, lite.writer.ints(NHWC)], [found.tensor], "Transpose")


def transpose(lite: LiteSheet, node: NodeProto) -> None:
    x, order = lite.held(node.input[0]), attributes(node)["perm"]
    found = lite.passed(node, x)
    if len(order) == 4:  # from what TensorFlow Lite has to what it is to have
        order = [NHWC.index(order[axis]) for axis in NHWC]
    lite.writer.operator("TRANSPOSE", [x.tensor, lite.writer.ints(order)], [found.tensor], "Transpose")


def pad(lite: LiteSheet, node: NodeProto) -> None:
    x, given, rank = lite.held(node.input[0]), attributes(node), len(lite.shapes[node.output[0]])
    pads, mode = lite.constants[node.input[1]].reshape(2, rank), given.get("mode", b"constant").decode()
    if (pads < 0).any() or mode not in ("constant", "reflect"):
        raise Unwritable(f"it crops, or its mode is {mode}")
    value = float(lite.constants[node.input[2]]) if len(node.input) > 2 and node.input[2] else 0.0
    found = lite.passed(node, x)
    order = NHWC if rank == 4 else range(rank)
    inputs = [x.tensor, lite.writer.ints([[pads[0][axis], pads[1][axis]] for axis in order])]
    if mode == "reflect":
        lite.writer.operator("MIRROR_PAD", inputs, [found.tensor], "MirrorPad", mode=0)
    elif value == 0:
        lite.writer.operator("PAD", inputs, [found.tensor], "Pad")
    else:
        raise Unwritable("its border is not 0")


def slice_(lite: LiteSheet, node: NodeProto) -> None:
    x, name = lite.held(node.input[0]), node.output[0]
    starts, ends = (lite.constants[each].tolist() for each in node.input[1:3])
    rank = len(x.shape)
    axes = lite.constants[node.input[3]].tolist() if len(node.input) > 3 and node.input[3] else list(range(len(starts)))
    steps = lite.constants[node.input[4]].tolist() if len(node.input) > 4 else [1] * len(starts)
    if any(step < 1 for step in steps):
        raise Unwritable("it goes backwards")
    bounds = [(0, length, 1) for length in x.shape]
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        bounds[axis % rank] = (*slice(start, end).indices(x.shape[axis % rank])[:2], step)
    _strided(lite, x, bounds, lite.passed(node, x), name)


def _strided(lite: LiteSheet, x: HeldValue, bounds: Sequence[tuple[int, ...]], found: HeldValue, name: str) -> None:
    turned_bounds = [bounds[axis] for axis in NHWC] if len(bounds) == 4 else bounds
    parts = [lite.writer.ints(part) for part in zip(*turned_bounds, strict=True)]
    lite.writer.operator("STRIDED_SLICE", [x.tensor, *parts], [found.tensor], "StridedSlice")


def split(lite: LiteSheet, node: NodeProto) -> None:
    x, axis = lite.held(node.input[0]), attributes(node).get("axis", 0)
    start = 0
    for name in node.output:
        found = lite.made(name, lite.shapes[name], x.grid)
        bounds = [(0, length, 1) for length in x.shape]
        end = start + found.shape[axis]
        bounds[axis % len(x.shape)] = (start, end, 1)
        _strided(lite, x, bounds, found, name)
        lite.values[name], start = found, end


def resize(lite: LiteSheet, node: NodeProto) -> None:
    x, given = lite.held(node.input[0]), attributes(node)
    found = lite.passed(node, x)
    whole = all(out % have == 0 for have, out in zip(x.shape[2:], found.shape[2:], strict=True))
    if given.get("mode", b"nearest") != b"nearest" or len(x.shape) != 4 or not whole:
        raise Unwritable("it is not to the nearest value of a whole multiple of the size")
    sizes = lite.writer.ints(found.shape[2:])
    options = {"alignCorners": False, "halfPixelCenters": False}
    inputs = [x.tensor, sizes]
    lite.writer.operator("RESIZE_NEAREST_NEIGHBOR", inputs, [found.tensor], "ResizeNearestNeighbor", **options)


def gather(lite: LiteSheet, node: NodeProto) -> None:
    x, indices = lite.held(node.input[0]), lite.constants.get(node.input[1])
    if indices is None or indices.ndim != 1:
        raise Unwritable("what it picks is computed as the network runs, or is one value")
    found, axis = lite.passed(node, x), _axis(attributes(node).get("axis", 0), len(x.shape))
    places = lite.writer.ints(indices % x.shape[attributes(node).get("axis", 0)])
    lite.writer.operator("GATHER", [x.tensor, places], [found.tensor], "Gather", axis=axis)


Handler = Callable[[LiteSheet, NodeProto], None]
HANDLERS: dict[str, Handler] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    **dict.fromkeys(("Relu", "Clip"), activation),
    "Conv": convolution,
    "Gemm": gemm,
    "Add": elementwise("ADD", "Add"),
    "Mul": elementwise("MUL", "Mul"),
    "Concat": concatenation,
    "Sigmoid": sigmoid,
    "GlobalAveragePool": global_mean,
    "AveragePool": mean_of_windows,
    "MaxPool": max_pool,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    "Transpose": transpose,
    "Pad": pad,
    "Slice": slice_,
    "Split": split,
    "Resize": resize,
    "Gather": gather,
}
