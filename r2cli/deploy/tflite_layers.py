"""Layers with weights, and pools, in TensorFlow Lite: INT8 in, INT8 weights, INT32 biases, INT8 out.

Images are (n, h, w, c) there. What has one axis is an image of height 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from r2cli.deploy.onnx_sheet import Unwritable
from r2cli.deploy.tflite_sheet import NHWC, HeldCodes, HeldValue, LiteSheet, attributes, channels_last, plain
from r2cli.deploy.tflite_writer import LiteGrid

SAME, VALID = 0, 1  # the schema's paddings


@dataclass(frozen=True)
class Windows:
    """Where a layer or a pool reads an image: along height and width each, `pads` before and then behind."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    @property
    def options(self) -> dict[str, Any]:
        return {"strideH": self.strides[0], "strideW": self.strides[1]}

    @property
    def dilated(self) -> dict[str, Any]:
        return {"dilationHFactor": self.dilations[0], "dilationWFactor": self.dilations[1]}


def windows(node: NodeProto, axes: int) -> Windows:
    given = attributes(node)
    ones, more = [1] * axes, [1] * (2 - axes)
    before, behind = np.reshape(given.get("pads", [0] * (2 * axes)), (2, axes)).tolist()
    none = [0] * (2 - axes)
    kernel, strides, dilations = (given.get(key, ones) for key in ("kernel_shape", "strides", "dilations"))
    pads = (*none, *before, *none, *behind)
    return Windows((*more, *kernel), (*more, *strides), (*more, *dilations), pads)


def image(lite: LiteSheet, name: str) -> HeldValue:
    """The codes of an image (n, c, h, w), or of (n, c, length) as one of height 1."""
    x = lite.codes(name)
    if len(x.shape) not in (3, 4):
        raise Unwritable(f"it reads {len(x.shape) - 2} axes, and TensorFlow Lite has integers for one and two")
    x = lite.laid(x, channels_last(len(x.shape)))
    return x if len(x.shape) == 4 else lite.reshaped(x, _tall(x.shape), NHWC, f"{name}.image")


def _tall(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:2], 1, *shape[2:]) if len(shape) == 3 else tuple(shape)


@dataclass(frozen=True)
class LayerResult:
    """What a layer gives: a tensor for it, an image, on the grid that reads it, and the activation that is fused."""

    value: HeldValue
    fused: int
    names: tuple[str, ...]
    shape: tuple[int, ...]

    def keep(self, lite: LiteSheet) -> None:
        """Give the value, once it is written, to what reads it."""
        order, name = channels_last(len(self.shape)), f"{self.names[0]}.line"
        lite.values |= dict.fromkeys(self.names, lite.reshaped(self.value, self.shape, order, name))


def layer_result(lite: LiteSheet, node: NodeProto) -> LayerResult:
    to, name = lite.rounding(node), node.output[0]
    shape = lite.shapes[name]
    return LayerResult(lite.made(name, _tall(shape), to.grid, NHWC), to.fused, to.names, shape)


# --- weights and biases --------------------------------------------------------------------------------------------


def weight_of(lite: LiteSheet, node: NodeProto) -> HeldCodes:
    own = lite.decoded.get(node.input[1])
    if own is None:
        raise Unwritable("its weight has no codes, or is computed as the network runs")
    return own


def bias_of(lite: LiteSheet, name: str, weight: HeldCodes, x: LiteGrid, channels: int) -> int:
    """The bias called `name` (none for ''), on the grid of the layer's sums."""
    unit = np.asarray(x.scale * weight.scale, np.float32)
    own = lite.decoded.get(name)
    if not name:
        own = HeldCodes(np.zeros(channels, np.int32), unit, 0, f"{weight.name}.no_bias")
    elif own is None and name in lite.constants:
        exact = np.rint(lite.constants[name].astype(np.float64) / unit)
        if np.abs(exact).max() < 2**31:
            own = HeldCodes(exact.astype(np.int32), unit, 0, name)
    if own is None:
        raise Unwritable("its bias is not on the grid of its sums")
    return lite.writer.tensor(own.name, (channels,), LiteGrid(unit), own.integers)


# --- layers --------------------------------------------------------------------------------------------------------


def convolution(lite: LiteSheet, node: NodeProto) -> None:
    x, weight = image(lite, node.input[0]), weight_of(lite, node)
    where = windows(node, len(lite.shapes[node.output[0]]) - 2)
    group, (outputs, inputs) = attributes(node).get("group", 1), weight.integers.shape[:2]
    bias = bias_of(lite, node.input[2] if len(node.input) > 2 else "", weight, x.codes, outputs)
    is_depthwise = inputs == 1 and group == x.shape[1] and group > 1
    padding, x = padded(lite, x, where, node.output[0])
    # (outputs, inputs, h, w) as (outputs, h, w, inputs); of a depthwise layer as (1, h, w, outputs).
    content = weight.integers.reshape(outputs, inputs, *where.kernel)
    content = content.transpose((1, 2, 3, 0) if is_depthwise else (0, 2, 3, 1))
    codes = LiteGrid(weight.scale, 0, 3 if is_depthwise else 0)
    kernel, to = lite.writer.tensor(weight.name, content.shape, codes, content), layer_result(lite, node)
    options = {"padding": padding, "fusedActivationFunction": to.fused, **where.options, **where.dilated}
    if is_depthwise:
        options["depthMultiplier"] = outputs // group
    kind, name = ("DEPTHWISE_CONV_2D", "DepthwiseConv2D") if is_depthwise else ("CONV_2D", "Conv2D")
    lite.writer.operator(kind, [x.tensor, kernel, bias], [to.value.tensor], name, **options)
    to.keep(lite)


def padded(lite: LiteSheet, x: HeldValue, where: Windows, name: str, fill: int | None = None) -> tuple[int, HeldValue]:
    """The padding of TensorFlow Lite, and what it is applied to: where it has no such padding, a value with borders of
    zeros, or of the code `fill`."""
    if not any(where.pads):
        return VALID, x
    whole = []
    for axis in (0, 1):
        length, reach = x.shape[2 + axis], where.dilations[axis] * (where.kernel[axis] - 1) + 1
        whole.append(max(0, (-(-length // where.strides[axis]) - 1) * where.strides[axis] + reach - length))
    if where.pads == (*(each // 2 for each in whole), *(each - each // 2 for each in whole)):
        return SAME, x
    top, left, bottom, right = where.pads
    height, width = x.shape[2:]
    found = lite.made(f"{name}.padded", (*x.shape[:2], height + top + bottom, width + left + right), x.grid, NHWC)
    borders = lite.writer.ints([[0, 0], [top, bottom], [left, right], [0, 0]])
    if fill is None or fill == x.codes.zero:
        lite.writer.operator("PAD", [x.tensor, borders], [found.tensor], "Pad")
    else:
        value = lite.writer.tensor(f"{name}.fill", (1,), x.grid, np.array([fill], np.int8))
        lite.writer.operator("PADV2", [x.tensor, borders, value], [found.tensor], "PadV2")
    return VALID, found


def transposed_convolution(lite: LiteSheet, node: NodeProto) -> None:
    """The whole of it without padding, of which the padding is then cut off."""
    x, weight, given = image(lite, node.input[0]), weight_of(lite, node), attributes(node)
    where = windows(node, len(lite.shapes[node.output[0]]) - 2)
    if given.get("group", 1) != 1 or any(each != 1 for each in where.dilations):
        raise Unwritable("it has groups or dilations")
    inputs, outputs = weight.integers.shape[:2]
    whole = [(x.shape[2 + k] - 1) * where.strides[k] + where.kernel[k] for k in (0, 1)]
    to = layer_result(lite, node)
    if any(where.pads[k] + to.value.shape[2 + k] > whole[k] for k in (0, 1)):
        raise Unwritable("its output reaches beyond its windows")
    content = weight.integers.reshape(inputs, outputs, *where.kernel).transpose(1, 2, 3, 0)
    kernel = lite.writer.tensor(weight.name, content.shape, LiteGrid(weight.scale), content)
    bias = bias_of(lite, node.input[2] if len(node.input) > 2 else "", weight, x.codes, outputs)
    is_cut = whole != list(to.value.shape[2:])
    full = (
        lite.made(f"{node.output[0]}.whole", (x.shape[0], outputs, *whole), to.value.grid, NHWC) if is_cut else to.value
    )
    sizes = lite.writer.ints([x.shape[0], *whole, outputs])
    options = {"padding": VALID, "fusedActivationFunction": to.fused, **where.options}
    lite.writer.operator("TRANSPOSE_CONV", [sizes, kernel, x.tensor, bias], [full.tensor], "TransposeConv", **options)
    if is_cut:
        ends = [where.pads[k] + to.value.shape[2 + k] for k in (0, 1)]
        bounds = [0, *where.pads[:2], 0], [x.shape[0], *ends, outputs], [1] * 4
        parts = [lite.writer.ints(part) for part in bounds]
        lite.writer.operator("STRIDED_SLICE", [full.tensor, *parts], [to.value.tensor], "StridedSlice")
    to.keep(lite)


def gemm(lite: LiteSheet, node: NodeProto) -> None:
    weight = weight_of(lite, node)
    if not attributes(node).get("transB"):
        raise Unwritable("its weight is transposed")
    _product(lite, node, node, weight, weight.integers, node.input[2] if len(node.input) > 2 else "")


def product_with_weight(lite: LiteSheet, node: NodeProto) -> None:
    """A linear layer over tokens: a MatMul by a transposed weight, and the sum with its bias."""
    weight, readers = weight_of(lite, node), lite.readers.get(node.output[0], [])
    if weight.integers.ndim != 2 or weight.axis == 0 and weight.scale.size > 1:
        raise Unwritable("its weight has no scale for each output")
    adds = readers[0] if len(readers) == 1 and readers[0].op_type == "Add" else None
    bias = "" if adds is None else next((each for each in adds.input if each in lite.constants), "")
    if bias and lite.constants[bias].shape == weight.integers.shape[1:]:
        _product(lite, node, adds or node, weight, weight.integers.T, bias)
    else:
        _product(lite, node, node, weight, weight.integers.T, "")


def _product(lite: LiteSheet, node: NodeProto, last: NodeProto, weight: HeldCodes, integers: Any, bias: str) -> None:
    """Write x w^T + b, which `last` gives, of a weight (outputs, inputs)."""
    x = lite.codes(node.input[0])
    if x.order[-1] != len(x.shape) - 1:
        x = lite.laid(x, plain(len(x.shape)))
    own = bias_of(lite, bias, weight, x.codes, len(integers))
    matrix = lite.writer.tensor(weight.name, integers.shape, LiteGrid(weight.scale), integers)
    found, fused = lite.result(last, x.order)
    lite.values[node.output[0]] = found
    options = {"fusedActivationFunction": fused, "keepNumDims": len(x.shape) > 2}
    lite.writer.operator("FULLY_CONNECTED", [x.tensor, matrix, own], [found.tensor], "FullyConnected", **options)


# --- pools ---------------------------------------------------------------------------------------------------------


def mean_of_windows(lite: LiteSheet, node: NodeProto) -> None:
    """Written as a depthwise convolution with weights of 1: TensorFlow Lite's own pool gives no other grid."""
    x, given = image(lite, node.input[0]), attributes(node)
    where = windows(node, len(lite.shapes[node.output[0]]) - 2)
    if any(where.pads) and not given.get("count_include_pad"):
        raise Unwritable("its border is not counted")
    padding, x = padded(lite, x, where, node.output[0])
    channels, (height, width) = x.shape[1], where.kernel
    ones = np.ones((1, height, width, channels), np.int8)
    share = LiteGrid(np.full(channels, 1 / (height * width), np.float32), 0, 3)
    depthwise(lite, x, ones, share, np.zeros(channels, np.int32), node, padding, where)


def depthwise(
    lite: LiteSheet,
    x: HeldValue,
    content: Any,
    codes: LiteGrid,
    sums: Any,
    node: NodeProto,
    padding: int = VALID,
    where: Windows | None = None,
) -> None:
    """Write what `node` computes as a depthwise convolution of one weight for each channel, `sums` its biases."""
    where, name = where or windows(node, 2), node.output[0]
    to = layer_result(lite, node)
    kernel = lite.writer.tensor(f"{name}.weight", content.shape, codes, content)
    unit = LiteGrid(np.asarray(x.codes.scale * codes.scale, np.float32))
    bias = lite.writer.tensor(f"{name}.bias", sums.shape, unit, sums)
    options = {"padding": padding, "depthMultiplier": 1, "fusedActivationFunction": to.fused}
    options |= where.options | where.dilated
    inputs = [x.tensor, kernel, bias]
    lite.writer.operator("DEPTHWISE_CONV_2D", inputs, [to.value.tensor], "DepthwiseConv2D", **options)
    to.keep(lite)


def max_pool(lite: LiteSheet, node: NodeProto) -> None:
    x, name = image(lite, node.input[0]), node.output[0]
    shape = lite.shapes[name]
    where = windows(node, len(shape) - 2)
    if any(each != 1 for each in where.dilations):
        raise Unwritable("it has dilations")
    padding, x = padded(lite, x, where, name, fill=-128)
    found = lite.made(name, _tall(shape), x.grid, NHWC)
    options = {"padding": padding, "filterHeight": where.kernel[0], "filterWidth": where.kernel[1], **where.options}
    lite.writer.operator("MAX_POOL_2D", [x.tensor], [found.tensor], "Pool2D", **options)
    lite.values[name] = lite.reshaped(found, shape, channels_last(len(shape)), f"{name}.line")
