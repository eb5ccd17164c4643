"""Lines of codes, (x + c) on another grid, in TensorFlow Lite: a depthwise convolution of one weight for each channel.

A hard sigmoid is one, and so is a change of grid: LiteRT's own Quantize multiplies by a factor of few bits on x86
and Arm, and rounds one of 200 codes otherwise.
"""

import numpy as np
from onnx import NodeProto

from r2cli.deploy.onnx_sheet import Unwritable
from r2cli.deploy.tflite_layers import VALID
from r2cli.deploy.tflite_sheet import NHWC, HeldValue, LiteSheet
from r2cli.deploy.tflite_writer import LiteGrid

MOST = 127  # the weight


def requantized(lite: LiteSheet, x: HeldValue, codes: LiteGrid, name: str) -> HeldValue:
    """`x` on another grid, or floats on a grid."""
    if x.grid is None:
        found = lite.made(name, x.shape, codes, x.order)
        lite.writer.operator("QUANTIZE", [x.tensor], [found.tensor], "Quantize")
        return found
    return x if x.grid.same(codes) else line(lite, x, codes, codes, 0.0, name)


def is_scaled_sum(lite: LiteSheet, node: NodeProto) -> bool:
    """Whether the codes of a sum with a number are read on a finer grid, (x + c) * share, as a hard sigmoid's are."""
    to = [each for each in lite.readers.get(node.output[0], []) if each.op_type == "QuantizeLinear"]
    reads = lite.readers.get(to[0].output[0], []) if to else []
    is_read = bool(reads) and reads[0].op_type == "DequantizeLinear" and node.input[1] in lite.decoded
    return is_read and not lite.parameters(reads[0]).same(lite.parameters(to[0]))


def scaled_sum(lite: LiteSheet, node: NodeProto) -> None:
    rounds, number, name = lite.readers[node.output[0]][0], lite.decoded[node.input[1]], node.output[0]
    if number.integers.size != 1:
        raise Unwritable("its numbers differ")
    added = float((number.integers.reshape(-1)[0] - number.zero) * number.scale)
    grid = lite.parameters(lite.readers[rounds.output[0]][0])
    found = line(lite, lite.codes(node.input[0]), lite.parameters(rounds), grid, added, name)
    lite.values |= {name: found, rounds.output[0]: found}


def line(lite: LiteSheet, x: HeldValue, rounded: LiteGrid, read: LiteGrid, added: float, name: str) -> HeldValue:
    """The codes of x + `added` on the grid `rounded`, which stand for what they do on the grid `read`."""
    channels = x.shape[x.order[-1]] if x.order else 1
    # The tensor's last axis is the channels', and what is before it is an image.
    flat = (1, channels, int(np.prod(x.shape)) // channels, 1)
    own = lite.reshaped(x, flat, NHWC, f"{name}.image")
    sums, factor = _exact_line(x.codes, rounded, added, MOST)
    weight = LiteGrid(np.full(channels, factor * read.scale / x.codes.scale, np.float32), 0, 3)
    content = np.full((1, 1, 1, channels), MOST, np.int8)
    kernel = lite.writer.tensor(f"{name}.share", content.shape, weight, content)
    unit = LiteGrid(np.asarray(x.codes.scale * weight.scale, np.float32))
    bias = lite.writer.tensor(f"{name}.added", (channels,), unit, np.full(channels, sums, np.int32))
    found = lite.made(name, flat, read, NHWC)
    options = {"padding": VALID, "strideH": 1, "strideW": 1, "depthMultiplier": 1}
    options |= {"dilationHFactor": 1, "dilationWFactor": 1}
    inputs = [own.tensor, kernel, bias]
    lite.writer.operator("DEPTHWISE_CONV_2D", inputs, [found.tensor], "DepthwiseConv2D", **options)
    return lite.reshaped(found, x.shape, x.order, f"{name}.flat")


def _exact_line(x: LiteGrid, rounded: LiteGrid, added: float, most: int) -> tuple[int, float]:
    """The sum that stands for `added` beside products of codes with `most`, and the factor of both, with which each
    code becomes the one that ONNX Runtime gives. The plain ones miss some: what lies halfway between two codes, as a
    hard sigmoid of 0, is rounded to even there and up here."""
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
