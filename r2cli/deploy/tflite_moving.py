"""Operations that move or pick values, in TensorFlow Lite: the same for codes and for floats.

A value keeps the order of axes of what it is picked from, so that nothing is turned until an operator wants it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import NodeProto

from r2cli.deploy.onnx_sheet import Unwritable
from r2cli.deploy.tflite_lines import requantized
from r2cli.deploy.tflite_sheet import NHWC, HeldValue, LiteSheet, attributes, is_same_order, plain

Bounds = tuple[int, int, int]  # start, end and step


def same(lite: LiteSheet, node: NodeProto) -> None:
    lite.values[node.output[0]] = lite.held(node.input[0])


def reshape(lite: LiteSheet, node: NodeProto) -> None:
    """Also Flatten, Squeeze and Unsqueeze."""
    if node.input[0] in lite.constants:
        lite.constants[node.output[0]] = lite.constants[node.input[0]].reshape(lite.shapes[node.output[0]])
        return
    x, name = lite.held(node.input[0]), node.output[0]
    order = plain(len(x.shape))
    x = x if is_same_order(x, order) else lite.laid(x, order)
    shape = lite.shapes[name]
    lite.values[name] = lite.reshaped(x, shape, plain(len(shape)), name)


def transpose(lite: LiteSheet, node: NodeProto) -> None:
    """Only the order in which the tensor's axes are read changes."""
    name, source = node.output[0], node.input[0]
    if source in lite.decoded:
        own, order = lite.decoded[source], attributes(node)["perm"]
        axis = order.index(own.axis) if own.scale.size > 1 else 0
        lite.decoded[name] = replace(own, integers=own.integers.transpose(order), axis=axis)
        return
    if source in lite.constants:
        lite.constants[name] = lite.constants[source].transpose(attributes(node).get("perm"))
        return
    x = lite.held(source)
    order = attributes(node).get("perm", list(reversed(range(len(x.shape)))))
    shape = tuple(x.shape[axis] for axis in order)
    lite.values[name] = replace(x, shape=shape, order=tuple(order.index(axis) for axis in x.order))


def pad(lite: LiteSheet, node: NodeProto) -> None:
    x, mode, name = lite.held(node.input[0]), attributes(node).get("mode", b"constant").decode(), node.output[0]
    rank = len(x.shape)
    pads = np.reshape(lite.ints(node.input[1]), (2, rank))
    if (pads < 0).any() or mode not in ("constant", "reflect"):
        raise Unwritable(f"it crops, or its mode is {mode}")
    value = float(lite.constants[node.input[2]]) if len(node.input) > 2 and node.input[2] else 0.0
    if value and x.grid is not None:
        x = lite.floats(node.input[0])
    found = lite.passed(name, x, x.order)
    inputs = [x.tensor, lite.writer.ints([[pads[0][axis], pads[1][axis]] for axis in x.order])]
    if mode == "reflect":
        lite.writer.operator("MIRROR_PAD", inputs, [found.tensor], "MirrorPad", mode=0)
    elif not value:
        lite.writer.operator("PAD", inputs, [found.tensor], "Pad")
    else:
        inputs.append(lite.constant(f"{name}.fill", np.array([value], np.float32)).tensor)
        lite.writer.operator("PADV2", inputs, [found.tensor], "PadV2")


def slice_(lite: LiteSheet, node: NodeProto) -> None:
    x = lite.held(node.input[0])
    starts, ends = (lite.ints(each) for each in node.input[1:3])
    axes = lite.ints(node.input[3]) if len(node.input) > 3 and node.input[3] else list(range(len(starts)))
    steps = lite.ints(node.input[4]) if len(node.input) > 4 else [1] * len(starts)
    if any(step < 1 for step in steps):
        raise Unwritable("it goes backwards")
    bounds: list[Bounds] = [(0, length, 1) for length in x.shape]
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis %= len(x.shape)
        bounds[axis] = (*slice(start, end).indices(x.shape[axis])[:2], step)
    _strided(lite, x, bounds, node.output[0])


def _strided(lite: LiteSheet, x: HeldValue, bounds: Sequence[Bounds], name: str) -> None:
    parts = [lite.writer.ints(part) for part in zip(*(bounds[axis] for axis in x.order), strict=True)]
    found = lite.passed(name, x, x.order)
    lite.writer.operator("STRIDED_SLICE", [x.tensor, *parts], [found.tensor], "StridedSlice")


def split(lite: LiteSheet, node: NodeProto) -> None:
    x = lite.held(node.input[0])
    axis, start = attributes(node).get("axis", 0) % len(x.shape), 0
    for name in node.output:
        bounds: list[Bounds] = [(0, length, 1) for length in x.shape]
        bounds[axis] = (start, start + lite.shapes[name][axis], 1)
        _strided(lite, x, bounds, name)
        start += lite.shapes[name][axis]


def concatenation(lite: LiteSheet, node: NodeProto) -> None:
    """On a grid where all are and it is rounded, else in floats."""
    axis, name = attributes(node)["axis"], node.output[0]
    if all(map(lite.has_codes, node.input)) and lite.is_rounded(node):
        parts = lite.aligned(map(lite.codes, node.input))
        found, fused = lite.result(node, parts[0].order)
        parts = [requantized(lite, part, found.codes, f"{name}.{k}") for k, part in enumerate(parts)]
    else:
        parts, fused = lite.aligned(map(lite.floats, node.input)), 0
        found = lite.passed(name, parts[0], parts[0].order)
    options = {"axis": found.order.index(axis % len(found.shape)), "fusedActivationFunction": fused}
    lite.writer.operator("CONCATENATION", [each.tensor for each in parts], [found.tensor], "Concatenation", **options)


def gather(lite: LiteSheet, node: NodeProto) -> None:
    """What is at places of an axis, or at one place, and then without that axis."""
    x, indices, name = lite.held(node.input[0]), lite.constants.get(node.input[1]), node.output[0]
    if indices is None or indices.ndim > 1:
        raise Unwritable("what it picks is computed as the network runs, or has several axes")
    axis = attributes(node).get("axis", 0) % len(x.shape)
    order = x.order if indices.ndim else tuple(each - (each > axis) for each in x.order if each != axis)
    picked(lite, x, axis, indices % x.shape[axis], lite.passed(name, x, order))


def picked(lite: LiteSheet, x: HeldValue, axis: int, places: Any, found: HeldValue) -> None:
    inputs = [x.tensor, lite.writer.ints(places)]
    lite.writer.operator("GATHER", inputs, [found.tensor], "Gather", axis=x.order.index(axis))


def nearest(lite: LiteSheet, node: NodeProto) -> None:
    """A resize to the nearest value, by places: TensorFlow Lite's own rounds some of them otherwise."""
    x, name = lite.held(node.input[0]), node.output[0]
    shape = lite.shapes[name]
    for axis in range(2, len(shape)):
        have, out = x.shape[axis], shape[axis]
        if have == out:
            continue
        sizes = [*x.shape[:axis], out, *x.shape[axis + 1 :]]
        found = lite.made(f"{name}.{axis}", sizes, x.grid, x.order)
        picked(lite, x, axis, [place * have // out for place in range(out)], found)
        x = found
    lite.values[name] = x


def enlarged(lite: LiteSheet, node: NodeProto) -> None:
    """A resize to the nearest value of a whole multiple of the size, which accelerators have; else `nearest`."""
    x, name = lite.held(node.input[0]), node.output[0]
    shape = lite.shapes[name]
    if len(shape) != 4 or any(out % have for have, out in zip(x.shape[2:], shape[2:], strict=True)):
        nearest(lite, node)
        return
    x = lite.laid(x, NHWC)
    found = lite.passed(name, x, NHWC)
    inputs, options = [x.tensor, lite.writer.ints(shape[2:])], {"alignCorners": False, "halfPixelCenters": False}
    lite.writer.operator("RESIZE_NEAREST_NEIGHBOR", inputs, [found.tensor], "ResizeNearestNeighbor", **options)


def depth_to_space(lite: LiteSheet, node: NodeProto) -> None:
    """ONNX counts channels as (c, block, block) where its mode is CRD, TensorFlow Lite always as (block, block, c)."""
    x, given, name = lite.held(node.input[0]), attributes(node), node.output[0]
    block = given["blocksize"]
    x = lite.laid(x, NHWC)
    if given.get("mode", b"DCR") == b"CRD":
        places = np.arange(x.shape[1]).reshape(-1, block * block).T.reshape(-1)
        turned = lite.made(f"{name}.turned", x.shape, x.grid, NHWC)
        picked(lite, x, 1, places, turned)
        x = turned
    found = lite.passed(name, x, NHWC)
    lite.writer.operator("DEPTH_TO_SPACE", [x.tensor], [found.tensor], "DepthToSpace", blockSize=block)


def expand(lite: LiteSheet, node: NodeProto) -> None:
    x, name = lite.held(node.input[0]), node.output[0]
    shape = lite.shapes[name]
    more = len(shape) - len(x.shape)
    order = (*range(more), *(axis + more for axis in x.order))
    x = lite.reshaped(x, (1,) * more + x.shape, order, f"{name}.axes")
    found = lite.passed(name, x, order)
    sizes = lite.writer.ints([shape[axis] for axis in order])
    lite.writer.operator("BROADCAST_TO", [x.tensor, sizes], [found.tensor], "BroadcastTo")


def tile(lite: LiteSheet, node: NodeProto) -> None:
    x, times = lite.held(node.input[0]), lite.ints(node.input[1])
    found = lite.passed(node.output[0], x, x.order)
    inputs = [x.tensor, lite.writer.ints([times[axis] for axis in x.order])]
    lite.writer.operator("TILE", inputs, [found.tensor], "Tile")
