"""Quantized weights in ONNX: the standard operators that turn packed codes into the float weight that a layer reads.

    8 to 5 bits          INT8 -> DequantizeLinear
    4, 2 and 1 bits      packed UINT8 -> Gather in a shared table of 256 bytes' codes -> Reshape -> DequantizeLinear
    3 bits               the same for a plane of 1 bit and one of 2 bits, which are added as INT32
    groups of inputs     the same, and a product with expanded scales in the place of DequantizeLinear; if opset 21 is
                         asked for, one DequantizeLinear of blocks on INT4 or INT8
    palette              UINT8, up to 4 bits packed -> Div and Mod, its digits -> Gather in the layer's own table of
                         centroids -> channels of vectors apart -> DequantizeLinear for an int8 table, Mul by the scale
                         for a float one

Some targets look for INT8 weights right before DequantizeLinear: for those the integers themselves are written, of all
widths and of palettes with int8 tables, without zero points (`is_packed`).

Layers share the tables of bytes and the shapes; a shape has -1 as its first dimension, so that more layers can share
it. A palette unpacks by Div and Mod, because a table of bytes takes one or two KB, and the file of a small network is
hardly larger than its codes.

Why these operators: every runtime knows them, which is not so of INT4 and of sums of INT8. When a runtime loads the
file, it computes all that depends on constants only, up to DequantizeLinear, and then runs int8 kernels. If activations
stay float, no integer kernel reads the weight. ONNX Runtime does not precompute DequantizeLinear then, which took four
times as long as the float network (benchmarks/palette_speed.md). So Cast, Sub and Mul take its place: they are
precomputed, and the network has the memory and the speed of float32.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import Tensor

from r2cli.config.targets import DEFAULT, TARGETS, Target
from r2cli.deploy.onnx_writer import OnnxWriter
from r2cli.errors import R2Error
from r2cli.quantized.coded import Codec, Coded
from r2cli.quantized.grid import Grid
from r2cli.quantized.packing import Plane, pack, packed_bytes, split_planes, twos_complement, unpack_plane
from r2cli.quantized.palette import Palette

Array = np.ndarray[Any, Any]


def emit(
    graph: OnnxWriter,
    name: str,
    coded: Coded,
    *,
    read_as_float: bool,
    with_zero: bool = False,
    exchanges: int | None = None,
    target: Target = TARGETS[DEFAULT],
) -> str:
    """Write the nodes that compute the quantized weight `name`, and return the name of its float value: `name`.

    `read_as_float` says that activations are float, so that no integer kernel reads the weight. `with_zero` writes a
    zero point of zeros too. `exchanges` are the groups of a transposed convolution: channels of its weight (outputs,
    inputs of a group, ...) are exchanged. Raises R2Error for a grid whose integers do not fit int8.
    """
    graph.enter(name)
    codec = coded.codec
    if not is_packed(codec, target):
        codec, value, is_integer, shape = _plain(graph, name, coded)
    elif isinstance(codec, Palette):
        value, is_integer = _palette(graph, name, coded, codec)
        shape = codec.shape
    else:
        value, is_integer, shape = _grid(graph, name, coded, codec), True, tuple(coded.codes.shape)
    ndim = len(shape)
    if exchanges == 1 and is_integer:  # of integers, which is done once; with groups a scale fits no axis afterwards
        value, exchanges = _exchange(graph, value, shape, 1), None
        codec = codec if codec.axis is None else replace(codec, axis=1)
    if is_integer:
        # ONNX Runtime's QGemm needs a zero point, even if it is zero. Up to 1.23 it aborts the process where weights
        # beyond 64 have none and `runtime.EXACT_PRODUCTS` is asked for.
        with_zero = with_zero or ndim == 2 or codec.bits > 4 or isinstance(codec, Palette) or not target.packed
        decode = _multiply if read_as_float else _dequantize
        value = decode(graph, name, value, codec, ndim, with_zero)
    if exchanges is not None:
        value = _exchange(graph, value, shape, exchanges)
    return graph.rename(value, name)


BLOCKS = 21  # the opset with blocks in DequantizeLinear


def emit_blocks(graph: OnnxWriter, name: str, coded: Coded, grid: Grid, target: Target) -> str:
    """Write a matrix with groups of inputs as one DequantizeLinear of blocks, and return its name: (inputs, outputs).

    It is the form that ONNX Runtime runs as MatMulNBits, on the codes themselves.
    """
    graph.enter(name)
    codes, kind = coded.codes.T.contiguous(), TensorProto.INT8
    content = codes.numpy().tobytes()
    if grid.bits == 4 and is_packed(grid, target):
        kind, content = TensorProto.INT4, pack(codes, 4).numpy().tobytes()
    parts = [
        graph.add(helper.make_tensor(f"{name}.codes", kind, codes.shape, content, raw=True)),
        graph.initializer(f"{name}.scale", grid.scale.T.numpy()),
    ]
    if bool(grid.zero_point.any()) or kind == TensorProto.INT8:  # which ONNX Runtime makes UINT8 on some processors
        zero = grid.zero_point.T.contiguous().to(torch.int8)
        held = pack(zero, 4).numpy() if kind == TensorProto.INT4 else zero.numpy()
        parts.append(graph.add(helper.make_tensor(f"{name}.zero_point", kind, zero.shape, held.tobytes(), raw=True)))
    value = graph.node("DequantizeLinear", parts, axis=0, block_size=grid.group)
    return graph.rename(value, name)


def is_blocks(coded: Coded, opset: int | None) -> bool:
    """Whether a weight is written by `emit_blocks` in a file for which that opset is asked."""
    codec = coded.codec
    return (opset or 0) >= BLOCKS and isinstance(codec, Grid) and bool(codec.group) and codec.bits in (4, 8)


def is_packed(codec: Codec, target: Target) -> bool:
    """Whether the codes of a weight are stored as they are, with its table or zero points, and not its integers."""
    has_zeros = isinstance(codec, Grid) and bool(codec.zero_point.any())
    return target.packed and (target.weight_zero_points or not has_zeros)


def stored_bytes(coded: Coded, target: Target) -> int:
    """Return the bytes that a weight's codes take in the file. Codes of 5 to 7 bits take a byte each."""
    if not is_packed(coded.codec, target):
        return plain(coded).numel()
    return packed_bytes(coded.codes.numel(), coded.codec.bits if coded.codec.bits <= 4 else 8)


def plain(coded: Coded) -> Tensor:
    """Return the integers that the scale of `scale_of` multiplies, in the shape of the weight: int32."""
    codec = coded.codec
    if isinstance(codec, Grid):
        return codec.integers(coded.codes) * codec.integer_factor
    return replace(codec, scale=torch.ones(()), axis=None).decode(coded.codes).round().to(torch.int32)


def _plain(graph: OnnxWriter, name: str, coded: Coded) -> tuple[Codec, str, bool, tuple[int, ...]]:
    """Write the integers of a weight, INT8, and say what decodes them."""
    integers, codec = plain(coded), coded.codec
    if isinstance(codec, Grid):
        codec = replace(codec, zero_point=torch.zeros_like(codec.zero_point))
    value = graph.initializer(f"{name}.codes", integers.to(torch.int8).numpy())
    return codec, value, True, tuple(integers.shape)


def _exchange(graph: OnnxWriter, value: str, shape: tuple[int, ...], groups: int) -> str:
    """Write the steps of `transposed.exchanged`: (outputs, inputs of a group, ...) with inputs first."""
    outputs, inputs, *kernel = shape
    if inputs == 1 and outputs == groups:  # depthwise: both are the same
        return value
    if groups == 1:
        return graph.node("Transpose", [value], perm=[1, 0, *range(2, len(shape))])
    apart = _reshape(graph, value, (groups, outputs // groups, inputs, *kernel))
    turned = graph.node("Transpose", [apart], perm=[0, 2, 1, *range(3, len(shape) + 1)])
    return _reshape(graph, turned, (groups * inputs, outputs // groups, *kernel))


def scale_of(coded: Coded) -> Array:
    """Return what an integer of the weight stands for in the file: () or (channels,) float32."""
    scale: Array = (coded.codec.scale / coded.codec.integer_factor).numpy()
    return scale


def _grid(graph: OnnxWriter, name: str, coded: Coded, grid: Grid) -> str:
    """Write the integers of a uniform grid, INT8."""
    if grid.bits <= 4:
        shape = tuple(coded.codes.shape)
        return _packed(graph, name, coded, shape, _integers(graph, grid), TensorProto.INT8)
    if grid.midrise and grid.bits == 8:
        raise R2Error(f"the weight '{name}' has an 8-bit grid without a zero level, whose codes leave int8: use 7 bits")
    stored = grid.integers(coded.codes) if grid.midrise else coded.codes
    return graph.initializer(f"{name}.codes", stored.to(torch.int8).numpy())


def _palette(graph: OnnxWriter, name: str, coded: Coded, palette: Palette) -> tuple[str, bool]:
    """Write the centroids that the codes stand for, and say whether they are integers: else they are the weight."""
    groups, count = coded.codes.shape
    dim, shape = palette.dim, palette.shape
    # Codes need an axis of groups only if an offset for each group is added. Codes of five bits and more are stored one
    # a byte, so their initializer can have any shape and needs no Reshape.
    index_shape = (groups, count) if groups > 1 else shape if dim == 1 else (count,)
    value = _index(graph, name, coded, index_shape)
    if groups > 1:
        if palette.bits <= 4:
            value = _reshape(graph, value, index_shape)
        offset = np.arange(groups, dtype=np.int32).reshape(-1, 1) << palette.bits
        value = graph.node("Add", [value, graph.initializer(f"{name}.offset", offset)])
    rows = palette.lut.reshape(-1, dim) if dim > 1 else palette.lut.reshape(-1)
    value = graph.node("Gather", [graph.initializer(f"{name}.lut", rows.numpy()), value], axis=0)
    if dim > 1:  # the same steps as `palette.from_vectors`
        positions = palette.positions
        value = graph.node("Transpose", [_reshape(graph, value, (-1, positions, dim))], perm=[0, 2, 1])
        if shape[0] % dim:  # the last vector was filled up with channels that do not exist
            value = _first(graph, _reshape(graph, value, (-1, positions)), shape[0])
    if dim > 1 or groups > 1 or palette.bits <= 4:
        value = _reshape(graph, value, shape)
    if not palette.lut.is_floating_point():
        return value, True
    if bool((palette.scale != 1).any()):
        value = _scaled(graph, name, value, palette, len(shape))
    return value, False


def _index(graph: OnnxWriter, name: str, coded: Coded, shape: tuple[int, ...]) -> str:
    """Write a palette's codes as INT32, for Gather. From five bits on, they have `shape`."""
    if coded.codec.bits <= 4:
        return _packed(graph, name, coded, None, _indices(graph), TensorProto.INT32)
    codes = graph.initializer(f"{name}.codes", coded.codes.reshape(shape).numpy())
    return graph.node("Cast", [codes], to=TensorProto.INT32)


def _dequantize(graph: OnnxWriter, name: str, integers: str, codec: Grid | Palette, _: int, with_zero: bool) -> str:
    inputs = [integers, graph.initializer(f"{name}.scale", (codec.scale / codec.integer_factor).numpy())]
    zero = _zero_point(codec)
    if bool(zero.any()) or with_zero:
        inputs.append(graph.initializer(f"{name}.zero_point", zero.numpy()))
    return graph.node("DequantizeLinear", inputs, axis=codec.axis)


def _multiply(graph: OnnxWriter, name: str, integers: str, codec: Grid | Palette, ndim: int, _: bool) -> str:
    value = graph.node("Cast", [integers], to=TensorProto.FLOAT)
    zero = _zero_point(codec)
    if bool(zero.any()):
        column = _column(graph, f"{name}.zero_point", zero, codec, ndim)
        value = graph.node("Sub", [value, graph.node("Cast", [column], to=TensorProto.FLOAT)])
    return _scaled(graph, name, value, codec, ndim)


def _scaled(graph: OnnxWriter, name: str, value: str, codec: Grid | Palette, ndim: int) -> str:
    column = _column(graph, f"{name}.scale", codec.scale / codec.integer_factor, codec, ndim)
    return graph.node("Mul", [value, column])


def _column(graph: OnnxWriter, name: str, numbers: Tensor, codec: Grid | Palette, ndim: int) -> str:
    """Write the scale or zero point `name` in a shape that broadcasts against the weight; of groups, once an input."""
    group = codec.group if isinstance(codec, Grid) else 0
    if not group:
        return graph.initializer(name, codec.along(numbers, ndim).numpy())
    apart = graph.initializer(name, numbers.unsqueeze(2).numpy())
    wide = graph.node("Expand", [apart, graph.ints((1, 1, group))])
    value = graph.node("Reshape", [wide, graph.ints((0, -1))])
    inputs = codec.inputs  # type: ignore[union-attr]
    if inputs % group == 0:
        return value
    return graph.node("Slice", [value, graph.ints((0,)), graph.ints((inputs,)), graph.ints((1,))])


def _zero_point(codec: Grid | Palette) -> Tensor:
    zero = codec.zero_point if isinstance(codec, Grid) else torch.zeros_like(codec.scale, dtype=torch.int32)
    return (zero * codec.integer_factor).to(torch.int8)


# --- packed codes --------------------------------------------------------------------------------------------------

# From a plane and its bytes as INT32 (n,) to a value (n, 8 // plane.bits).
Lookup = Callable[[Plane, str], str]


def _packed(
    graph: OnnxWriter, name: str, coded: Coded, shape: tuple[int, ...] | None, look_up: Lookup, kind: int
) -> str:
    """Write the nodes that unpack codes by `look_up`. The result has `shape` (any, where it is None) and type `kind`.

    Three bits do not divide a byte, so they are stored as two planes of 1 and 2 bits, which are added here as INT32: a
    sum of INT8 is in no standard below opset 14.
    """
    count = coded.codes.numel()
    parts = []
    planes = split_planes(coded.packed(), coded.codec.bits, count)
    for plane, content in planes:
        packed = graph.initializer(f"{name}.{plane.name}", content.numpy())
        value = look_up(plane, graph.node("Cast", [packed], to=TensorProto.INT32))
        if content.numel() * (8 // plane.bits) != count:  # drop the zeros that filled the last byte
            value = _first(graph, _reshape(graph, value, (count,)), count)
        if shape is not None or len(planes) > 1:
            value = _reshape(graph, value, shape or (count,))
        parts.append(value)
    if len(planes) == 1:
        return parts[0]
    if kind == TensorProto.INT32:
        return graph.node("Add", parts)
    total = graph.node("Add", [graph.node("Cast", [part], to=TensorProto.INT32) for part in parts])
    return graph.node("Cast", [total], to=kind)


def _integers(graph: OnnxWriter, grid: Grid) -> Lookup:
    """Unpack a grid's bytes to its integers by a table int8 (256, 8 // bits) that layers share."""

    def look_up(plane: Plane, index: str) -> str:
        return graph.node("Gather", [graph.constant(_table(grid, plane), kind="bytes"), index], axis=0)

    return look_up


def _indices(graph: OnnxWriter) -> Lookup:
    """A palette's codes themselves, INT32, those of the high plane worth 4: by division, without a table."""

    def constant(values: list[int]) -> str:
        return graph.constant(values, np.int32, "step")

    def look_up(plane: Plane, index: str) -> str:
        column = graph.node("Reshape", [index, graph.ints((-1, 1))])
        shifted = graph.node("Div", [column, constant([2**low for low in range(0, 8, plane.bits)])])
        value = graph.node("Mod", [shifted, constant([2**plane.bits])])
        return graph.node("Mul", [value, constant([2**plane.shift])]) if plane.shift else value

    return look_up


def _table(grid: Grid, plane: Plane) -> Array:
    """(256, 8 // plane.bits) int8: the integers that each byte of a plane of a grid's packed codes stands for."""
    every = unpack_plane(torch.arange(256, dtype=torch.uint8), plane.bits) << plane.shift
    codes = twos_complement(every, grid.bits) if grid.lowest < 0 else every
    # The zero point comes later, with DequantizeLinear.
    plain = replace(grid, zero_point=torch.zeros((), dtype=torch.int32), axis=None)
    integers = plain.integers(codes)
    if plane.name == "low":  # planes are added: what a code of 0 stands for is in the high one already
        integers = integers - plain.integers(torch.zeros_like(codes))
    return (integers * grid.integer_factor).reshape(256, 8 // plane.bits).to(torch.int8).numpy()


def _reshape(graph: OnnxWriter, value: str, sizes: tuple[int, ...]) -> str:
    """Reshape `value` to `sizes`, with -1 as the first dimension, so that layers can share the shape."""
    return graph.node("Reshape", [value, graph.ints((-1, *sizes[1:]))])


def _first(graph: OnnxWriter, value: str, count: int) -> str:
    return graph.node("Slice", [value, graph.ints((0,)), graph.ints((count,))])
