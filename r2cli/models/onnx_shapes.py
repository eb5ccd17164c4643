"""Operators of ONNX that move, choose and repeat values, and those that compute shapes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2cli.models.onnx_values import (
    FEW,
    KINDS,
    Attributes,
    Operator,
    Uncomputable,
    Value,
    axis_of,
    bounded,
    is_numbers,
    listed,
    tensor,
)


def shape(a: Attributes, x: Value) -> list[Any]:
    sizes = list(x.shape) if isinstance(x, Tensor) else [len(x)] if isinstance(x, list) else []
    return sizes[slice(a.get("start", 0), a.get("end"))]


def size(a: Attributes, x: Value) -> Any:
    return math.prod(shape({}, x))


def reshape(a: Attributes, x: Value, to: Value = None) -> Value:
    wanted = listed(a.get("shape") if to is None else to)
    if is_numbers(x) and len(wanted) <= 1:
        return listed(x) if wanted else listed(x)[0]
    x = tensor(a, x)
    if not a.get("allowzero"):
        wanted = [x.shape[axis] if isinstance(n, int) and n == 0 else n for axis, n in enumerate(wanted)]
    return x.reshape(wanted)


def flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    if axis == 1:
        return x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def squeeze(a: Attributes, x: Value, axes: Value = None) -> Value:
    axes = a.get("axes") if axes is None else axes
    if is_numbers(x):
        return listed(x)[0] if len(listed(x)) == 1 else x
    if axes is None:
        axes = [axis for axis, n in enumerate(x.shape) if isinstance(n, int) and n == 1]
    return x.squeeze(tuple(axis_of(x, axis) for axis in axes))


def unsqueeze(a: Attributes, x: Value, axes: Value = None) -> Value:
    axes = listed(a.get("axes") if axes is None else axes)
    if is_numbers(x):
        if not isinstance(x, list) and len(axes) == 1:
            return [x]
        x = tensor(a, x)
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def transpose(a: Attributes, x: Value) -> Value:
    if is_numbers(x):
        return x
    return x.permute(a.get("perm") or list(reversed(range(x.ndim))))


def concat(a: Attributes, *values: Value) -> Value:
    if all(map(is_numbers, values)):
        return [one for value in values for one in listed(value)]
    parts = [tensor(a, value) for value in values]
    axis = axis_of(parts[0], a["axis"])
    if any(part.ndim != parts[0].ndim for part in parts):
        raise Uncomputable(f"its inputs have {[part.ndim for part in parts]} axes")
    return torch.cat(_of_one_batch(parts, axis), axis)


def _of_one_batch(parts: list[Tensor], axis: int) -> list[Tensor]:
    """Repeat what a file has for a batch of one, such as the class token, for the batch of the others."""
    if axis == 0 or all(isinstance(part.shape[0], int) and part.shape[0] == 1 for part in parts):
        return parts
    batch = next(part.shape[0] for part in parts if not isinstance(part.shape[0], int) or part.shape[0] != 1)
    alone = [isinstance(part.shape[0], int) and part.shape[0] == 1 for part in parts]
    return [part.expand(batch, *part.shape[1:]) if one else part for part, one in zip(parts, alone, strict=True)]


def split(a: Attributes, x: Value, sizes: Value = None) -> tuple[Value, ...]:
    sizes, count = a.get("split") if sizes is None else sizes, a["outputs"]
    if is_numbers(x):
        sizes = sizes or [len(x) // count] * count
        ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
        return tuple(x[end - n : end] for end, n in zip(ends, sizes, strict=True))
    axis = axis_of(x, a.get("axis", 0))
    each = math.ceil(int(x.shape[axis]) / count)
    return torch.split(x, listed(sizes) if sizes is not None else each, axis)


def cut(a: Attributes, x: Value, starts: Value = None, ends: Value = None, *more: Value) -> Value:
    starts, ends = (
        listed(a.get("starts") if starts is None else starts),
        listed(a.get("ends") if ends is None else ends),
    )
    axes = more[0] if more and more[0] is not None else a.get("axes")
    axes = list(range(len(starts))) if axes is None else listed(axes)
    steps = listed(more[1]) if len(more) > 1 and more[1] is not None else [1] * len(starts)
    if is_numbers(x):
        return x[slice(_end(starts[0]), _end(ends[0]), steps[0])]
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        dim = axis_of(x, axis)
        if step < 0:  # torch has no steps backwards: the same values forwards, turned
            rows = list(range(int(x.shape[dim])))[slice(_end(start), _end(end), step)]
            x = x.index_select(dim, torch.tensor(rows, dtype=torch.int64, device=x.device))
        else:
            x = x[(slice(None),) * dim + (slice(_end(start), _end(end), step),)]
    return x


def _end(bound: Any) -> Any:
    """A bound of a slice; None where it only says 'to the end'."""
    return None if isinstance(bound, int) and abs(bound) >= 2**31 - 1 else bound


def gather(a: Attributes, x: Value, index: Value) -> Value:
    if is_numbers(x) and is_numbers(index):
        return [x[one] for one in index] if isinstance(index, list) else listed(x)[index]
    x = tensor(a, x)
    axis = axis_of(x, a.get("axis", 0))
    if isinstance(index, int | torch.SymInt):
        return x.select(
            axis, index % x.shape[axis] if isinstance(index, int) and isinstance(x.shape[axis], int) else index
        )
    index = tensor(a, index)
    if axis == 0 and x.ndim == 2 and isinstance(x, torch.nn.Parameter):
        return F.embedding(index, x)
    index = torch.where(index < 0, index + x.shape[axis], index)
    if index.ndim == 1:
        return x.index_select(axis, index)
    chosen = x.index_select(axis, index.reshape(-1))
    return chosen.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def gather_elements(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = axis_of(x, a.get("axis", 0))
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


def gather_nd(a: Attributes, x: Value, index: Value) -> Value:
    if a.get("batch_dims"):
        raise Uncomputable("it gathers for each item of a batch")
    return tensor(a, x)[tuple(tensor(a, index).unbind(-1))]


def scatter_nd(a: Attributes, x: Tensor, index: Value, values: Value) -> Tensor:
    if a.get("reduction", "none") != "none":
        raise Uncomputable("it adds where it writes")
    return torch.index_put(x, tuple(tensor(a, index).unbind(-1)), tensor(a, values))


def scatter_elements(a: Attributes, x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    if a.get("reduction", "none") != "none":
        raise Uncomputable("it adds where it writes")
    return torch.scatter(x, axis_of(x, a.get("axis", 0)), index, values)


def expand(a: Attributes, x: Value, to: Value) -> Value:
    wanted = listed(to)
    if is_numbers(x) and len(wanted) == 1 and isinstance(wanted[0], int) and wanted[0] <= FEW:
        return listed(x) * wanted[0] if len(listed(x)) == 1 else listed(x)
    x = tensor(a, x)
    sizes = [1] * (len(wanted) - x.ndim) + list(x.shape)
    wanted = [1] * (len(sizes) - len(wanted)) + wanted
    after = [n if isinstance(w, int) and w == 1 else w for n, w in zip(sizes, wanted, strict=True)]
    bounded(after)
    return x.expand(after)


def tile(a: Attributes, x: Value, repeats: Value) -> Value:
    counts = listed(repeats)
    if is_numbers(x):
        bounded([len(listed(x)), *counts])
        return listed(x) * counts[0] if counts else x
    bounded([n * count for n, count in zip(x.shape, counts, strict=True)])
    return x.repeat(counts)


def filled(a: Attributes, sizes: Value) -> Value:
    sizes, value = bounded(listed(sizes)), a.get("value", 0.0)
    kind = KINDS[a.get("kind", "float32")]
    if len(sizes) == 1 and isinstance(sizes[0], int) and sizes[0] <= FEW and not kind.is_floating_point:
        return [value] * sizes[0]
    return torch.full(list(sizes), value, dtype=kind, device=a["device"])


def counted(a: Attributes, start: Value, limit: Value, delta: Value) -> Tensor:
    start, limit, delta = (listed(one)[0] for one in (start, limit, delta))
    if isinstance(limit, int | float) and isinstance(start, int | float) and delta:
        bounded([int((limit - start) / delta)])
    kind = torch.float32 if any(isinstance(one, float) for one in (start, limit, delta)) else torch.int64
    return torch.arange(start, limit, delta, dtype=kind, device=a["device"])


def one_hot(a: Attributes, index: Value, depth: Value, values: Value) -> Tensor:
    if a.get("axis", -1) != -1:
        raise Uncomputable("its classes are not the last axis")
    count, (off, on) = listed(depth)[0], listed(values)
    rows = torch.arange(bounded([count])[0], device=a["device"])
    return torch.where(tensor(a, index).unsqueeze(-1) % count == rows, on, off)


def depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    block = a["blocksize"]
    if a.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, block, block, channels // block**2, height, width)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // block**2, height * block, width * block)


def space_to_depth(a: Attributes, x: Tensor) -> Tensor:
    block, (batch, channels, height, width) = a["blocksize"], x.shape
    parts = x.reshape(batch, channels, height // block, block, width // block, block)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * block**2, height // block, width // block)


def triangle(a: Attributes, x: Tensor, k: Value = None) -> Tensor:
    return (torch.triu if a.get("upper", 1) else torch.tril)(x, listed(k)[0] if k is not None else 0)


def einsum(a: Attributes, *values: Tensor) -> Tensor:
    return torch.einsum(a["equation"], *values)


def first(a: Attributes, x: Value, *_: Value) -> Value:
    return x


SHAPES: dict[str, Operator] = {
    "Identity": Operator(first),
    "Shape": Operator(shape),
    "Size": Operator(size),
    "Reshape": Operator(reshape, (1,)),
    "Flatten": Operator(flatten),
    "Squeeze": Operator(squeeze, (1,)),
    "Unsqueeze": Operator(unsqueeze, (1,)),
    "Transpose": Operator(transpose),
    "Concat": Operator(concat),
    "Split": Operator(split, (1,)),
    "Slice": Operator(cut, (1, 2, 3, 4)),
    "Gather": Operator(gather),
    "GatherElements": Operator(gather_elements),
    "GatherND": Operator(gather_nd),
    "ScatterND": Operator(scatter_nd),
    "ScatterElements": Operator(scatter_elements),
    "Expand": Operator(expand, (1,)),
    "Tile": Operator(tile, (1,)),
    "ConstantOfShape": Operator(filled, (0,)),
    "Range": Operator(counted, (0, 1, 2)),
    "OneHot": Operator(one_hot, (1, 2)),
    "DepthToSpace": Operator(depth_to_space),
    "SpaceToDepth": Operator(space_to_depth),
    "Trilu": Operator(triangle, (1,)),
    "Einsum": Operator(einsum),
}
