"""Quantized weights in ONNX: the standard operators that turn packed codes into the float weight that a layer reads.

    8 to 5 bits          INT8 -> DequantizeLinear
    4 bits               INT4 -> Cast INT8 -> DequantizeLinear
    3 to 1 bits          packed UINT8 -> Gather in a shared table of 256 bytes' codes -> Reshape -> DequantizeLinear
    4 bits, midrise      the same
    palette              UINT8, up to 4 bits packed -> Div and Mod, its digits -> Gather in the layer's own table of
                         centroids -> channels of vectors apart -> DequantizeLinear for an int8 table, Mul by the scale
                         for a float one

Layers share the tables of bytes and the shapes; a shape has -1 as its first dimension, so that more layers can share
it. A palette unpacks by Div and Mod, because a table of bytes takes one or two KB, and the file of a small network is
hardly larger than its codes.

Why these operators: when a runtime loads the file, it computes all that depends on constants only, up to
DequantizeLinear, and then runs int8 kernels. INT4 without the Cast would be unpacked at every inference. If activations
stay float, no integer kernel reads the weight. ONNX Runtime does not precompute DequantizeLinear then, which took four
times as long as the float network (benchmarks/palette_speed.md). So Cast, Sub and Mul take its place: they are
precomputed, and the network has the memory and the speed of float32.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from r2cli.errors import R2Error
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.quantized.packing import Plane, pack, split_planes, twos_complement, unpack_plane
from r2cli.quantized.palette import Palette

Shared = dict[str, ir.Value]  # initializers that several layers read, by name
Array = np.ndarray[Any, Any]


def emit(
    graph: ir.Graph, name: str, coded: Coded, shared: Shared, *, read_as_float: bool
) -> tuple[ir.Value, list[ir.Node]]:
    """Return the float value of the quantized weight `name`, and the nodes that compute it.

    `read_as_float` says that activations are float, so that no integer kernel reads the weight. Raises R2Error for a
    grid whose integers do not fit int8.
    """
    codec = coded.codec
    if isinstance(codec, Palette):
        nodes, integers = _palette(graph, name, coded, codec, shared)
    else:
        nodes, integers = _grid(graph, name, coded, codec, shared)
    if integers is not None:
        decode = _multiply if read_as_float else _dequantize
        nodes += decode(
            graph, name, integers, codec, len(codec.shape if isinstance(codec, Palette) else coded.codes.shape)
        )
    for position, node in enumerate(nodes):
        node.outputs[0].name = f"{name}.{position}"
    return nodes[-1].outputs[0], nodes


def _grid(graph: ir.Graph, name: str, coded: Coded, grid: Grid, shared: Shared) -> tuple[list[ir.Node], ir.Value]:
    """Return the nodes that compute the integers of a uniform grid, and the integers."""
    nodes: list[ir.Node]
    if grid.bits <= 3 or (grid.midrise and grid.bits <= 4):
        nodes = _packed(graph, name, coded, tuple(coded.codes.shape), _integers(graph, grid, shared), shared)
        integers = nodes[-1].outputs[0]
    elif grid.bits == 4:
        narrow = initializer(graph, f"{name}.codes", _four_bits(coded.codes))
        nodes = [ir.node("Cast", [narrow], {"to": ir.DataType.INT8})]
        integers = nodes[-1].outputs[0]
    elif grid.midrise and grid.bits == 8:
        raise R2Error(f"the weight '{name}' has an 8-bit grid without a zero level, whose codes leave int8: use 7 bits")
    else:
        stored = grid.integers(coded.codes) if grid.midrise else coded.codes
        integers, nodes = initializer(graph, f"{name}.codes", stored.to(torch.int8).numpy()), []
    return nodes, integers


def _palette(
    graph: ir.Graph, name: str, coded: Coded, palette: Palette, shared: Shared
) -> tuple[list[ir.Node], ir.Value | None]:
    """Return the nodes that look up the centroids, and their integers. The integers are None if the table is float."""
    groups, count = coded.codes.shape
    dim, shape = palette.dim, palette.shape
    # Codes need an axis of groups only if an offset for each group is added. Codes of five bits and more are stored one
    # a byte, so their initializer can have any shape and needs no Reshape.
    index_shape = (groups, count) if groups > 1 else shape if dim == 1 else (count,)
    nodes = _index(graph, name, coded, index_shape, shared)
    if groups > 1:
        if palette.bits <= 4:
            nodes.append(_reshape(graph, shared, nodes[-1], index_shape))
        offset = np.arange(groups, dtype=np.int32).reshape(-1, 1) << palette.bits
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], initializer(graph, f"{name}.offset", offset)]))
    rows = palette.lut.reshape(-1, dim) if dim > 1 else palette.lut.reshape(-1)
    lut = initializer(graph, f"{name}.lut", rows.numpy())
    nodes.append(ir.node("Gather", [lut, nodes[-1].outputs[0]], {"axis": 0}))
    if dim > 1:  # the same steps as `palette.from_vectors`
        positions = palette.positions
        nodes.append(_reshape(graph, shared, nodes[-1], (-1, positions, dim)))
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1]}))
        if shape[0] % dim:  # the last vector was filled up with channels that do not exist
            nodes.append(_reshape(graph, shared, nodes[-1], (-1, positions)))
            ends = [_shape(graph, shared, (0,)), _shape(graph, shared, (shape[0],))]
            nodes.append(ir.node("Slice", [nodes[-1].outputs[0], *ends]))
    if dim > 1 or groups > 1 or palette.bits <= 4:
        nodes.append(_reshape(graph, shared, nodes[-1], shape))
    if not palette.lut.is_floating_point():
        return nodes, nodes[-1].outputs[0]
    if bool((palette.scale != 1).any()):
        nodes.append(_scaled(graph, name, nodes[-1].outputs[0], palette, len(shape)))
    return nodes, None


def _index(graph: ir.Graph, name: str, coded: Coded, shape: tuple[int, ...], shared: Shared) -> list[ir.Node]:
    """Return the nodes that give a palette's codes as INT32, for Gather. From five bits on, they have `shape`."""
    bits = coded.codec.bits
    if bits <= 4:
        return _packed(graph, name, coded, None, _indices(graph, shared), shared)
    codes = initializer(graph, f"{name}.codes", coded.codes.reshape(shape).numpy())
    return [ir.node("Cast", [codes], {"to": ir.DataType.INT32})]


def _dequantize(graph: ir.Graph, name: str, integers: ir.Value, codec: Grid | Palette, ndim: int) -> list[ir.Node]:
    inputs = [integers, initializer(graph, f"{name}.scale", (codec.scale / codec.integer_factor).numpy())]
    zero = _zero_point(codec)
    if bool(zero.any()) or ndim == 2:  # ONNX Runtime's QGemm needs a zero point, even if it is zero
        inputs.append(initializer(graph, f"{name}.zero_point", zero.numpy()))
    return [ir.node("DequantizeLinear", inputs, {} if codec.axis is None else {"axis": codec.axis})]


def _multiply(graph: ir.Graph, name: str, integers: ir.Value, codec: Grid | Palette, ndim: int) -> list[ir.Node]:
    nodes = [ir.node("Cast", [integers], {"to": ir.DataType.FLOAT})]
    zero = _zero_point(codec)
    if bool(zero.any()):
        column = initializer(graph, f"{name}.zero_point", codec.along(zero, ndim).numpy())
        nodes.append(ir.node("Cast", [column], {"to": ir.DataType.FLOAT}))
        nodes.append(ir.node("Sub", [cast.outputs[0] for cast in nodes]))
    return [*nodes, _scaled(graph, name, nodes[-1].outputs[0], codec, ndim)]


def _scaled(graph: ir.Graph, name: str, value: ir.Value, codec: Grid | Palette, ndim: int) -> ir.Node:
    column = codec.along(codec.scale / codec.integer_factor, ndim)
    return ir.node("Mul", [value, initializer(graph, f"{name}.scale", column.numpy())])


def _zero_point(codec: Grid | Palette) -> Tensor:
    zero = codec.zero_point if isinstance(codec, Grid) else torch.zeros_like(codec.scale, dtype=torch.int32)
    return (zero * codec.integer_factor).to(torch.int8)


# --- packed codes --------------------------------------------------------------------------------------------------

# From a plane and its bytes as INT32 (n,) to nodes of which the last gives (n, 8 // plane.bits).
Lookup = Callable[[Plane, ir.Value], list[ir.Node]]


def _packed(
    graph: ir.Graph, name: str, coded: Coded, shape: tuple[int, ...] | None, look_up: Lookup, shared: Shared
) -> list[ir.Node]:
    """Return the nodes that unpack codes by `look_up`. The result has `shape`; with None, it has any shape.

    Three bits do not divide a byte, so they are stored as two planes of 1 and 2 bits, which are added here.
    """
    count = coded.codes.numel()
    nodes: list[ir.Node] = []
    parts = []
    planes = split_planes(coded.packed(), coded.codec.bits, count)
    for plane, content in planes:
        packed = initializer(graph, f"{name}.{plane.name}", content.numpy())
        nodes.append(ir.node("Cast", [packed], {"to": ir.DataType.INT32}))
        nodes += look_up(plane, nodes[-1].outputs[0])
        if content.numel() * (8 // plane.bits) != count:  # drop the zeros that filled the last byte
            nodes.append(_reshape(graph, shared, nodes[-1], (count,)))
            ends = [_shape(graph, shared, (0,)), _shape(graph, shared, (count,))]
            nodes.append(ir.node("Slice", [nodes[-1].outputs[0], *ends]))
        if shape is not None or len(planes) > 1:
            nodes.append(_reshape(graph, shared, nodes[-1], shape or (count,)))
        parts.append(nodes[-1].outputs[0])
    if len(planes) > 1:
        nodes.append(ir.node("Add", parts))
    return nodes


def _integers(graph: ir.Graph, grid: Grid, shared: Shared) -> Lookup:
    """Unpack a grid's bytes to its integers by a table int8 (256, 8 // bits) that layers share."""

    def look_up(plane: Plane, index: ir.Value) -> list[ir.Node]:
        # The names of shared tables are those of files that are out already.
        every = f"every.{'odd' if grid.midrise else 'plain'}{grid.bits}.{plane.name}"
        if every not in shared:
            shared[every] = initializer(graph, every, _table(grid, plane))
        return [ir.node("Gather", [shared[every], index], {"axis": 0})]

    return look_up


def _indices(graph: ir.Graph, shared: Shared) -> Lookup:
    """A palette's codes themselves, INT32, those of the high plane worth 4: by division, without a table."""

    def constant(values: list[int]) -> ir.Value:
        return _shared(graph, shared, "step", np.array(values, dtype=np.int32))

    def look_up(plane: Plane, index: ir.Value) -> list[ir.Node]:
        column = ir.node("Reshape", [index, _shape(graph, shared, (-1, 1))])
        shifted = ir.node("Div", [column.outputs[0], constant([2**low for low in range(0, 8, plane.bits)])])
        nodes = [column, shifted, ir.node("Mod", [shifted.outputs[0], constant([2**plane.bits])])]
        if plane.shift:
            nodes.append(ir.node("Mul", [nodes[-1].outputs[0], constant([2**plane.shift])]))
        return nodes

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


# --- initializers --------------------------------------------------------------------------------------------------


def _reshape(graph: ir.Graph, shared: Shared, node: ir.Node, sizes: tuple[int, ...]) -> ir.Node:
    """Reshape the output of `node` to `sizes`, with -1 as the first dimension, so that layers can share the shape."""
    return ir.node("Reshape", [node.outputs[0], _shape(graph, shared, (-1, *sizes[1:]))])


def _shape(graph: ir.Graph, shared: Shared, sizes: tuple[int, ...]) -> ir.Value:
    return _shared(graph, shared, "shape", np.array(sizes, dtype=np.int64))


def _shared(graph: ir.Graph, shared: Shared, kind: str, values: Array) -> ir.Value:
    name = f"{kind}.{'x'.join(map(str, values.tolist()))}"
    if name not in shared:
        shared[name] = initializer(graph, name, values)
    return shared[name]


def _four_bits(codes: Tensor) -> "ir.PackedTensor[Any]":
    """Return 4-bit codes (any shape) as an ONNX INT4 tensor. Our packing is the same as ONNX's."""
    return ir.PackedTensor(pack(codes, 4).numpy(), ir.DataType.INT4, shape=ir.Shape(codes.shape))


def initializer(graph: ir.Graph, name: str, content: "Array | ir.PackedTensor[Any]") -> ir.Value:
    """Add `content` to `graph` as an initializer, and return its value."""
    tensor = ir.tensor(content) if isinstance(content, np.ndarray) else content
    tensor.name = name
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.initializers[name] = value
    return value
