"""Operations that move, repeat or pick values, in ONNX. The parameters are those of torch's functions."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from r2cli.deploy.onnx_sheet import Sheet, Unwritable, Value, as_tuple
from r2cli.deploy.onnx_writer import OnnxWriter


def reshape(sheet: Sheet, x: Value, *_: Any, **__: Any) -> str:
    """Write any change of shape that keeps the order of values: its result's shape says it all."""
    if x.shape == sheet.shape:
        return x.name
    batch_first = sheet.shape[:1] == x.shape[:1] == (None,) and None not in x.shape[1:]
    if batch_first and sheet.shape[1:] == (prod(x.shape[1:]),):  # type: ignore[arg-type]
        return sheet.node("Flatten", x, axis=1)
    return sheet.node("Reshape", x, sheet.sizes(sheet.shape))


def permute(sheet: Sheet, x: Value, *dims: Any) -> str:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    return sheet.node("Transpose", x, perm=[axis % len(x.shape) for axis in order])


def transpose(sheet: Sheet, x: Value, dim0: int, dim1: int) -> str:
    order = list(range(len(x.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return sheet.node("Transpose", x, perm=order)


def batch(writer: OnnxWriter, given: Value) -> str:
    """Write the size of the batch as the network runs, (1,) INT64: that of its input `given` over a sample's.

    OpenVINO 2026.4 moves a Shape of the input behind the first convolution, and then adds the bias of that one's first
    channel to all of them.
    """
    sample = prod(length or 1 for length in given.shape[1:])
    count = writer.node("Div", [writer.node("Size", [given.name]), writer.constant(sample, np.int64)])
    return writer.node("Reshape", [count, writer.ints([1])])


def expand(sheet: Sheet, x: Value, *_: Any, **__: Any) -> str:
    """Write the repetition along axes of one; the batch's size is computed where such an axis becomes the batch."""
    if x.shape == sheet.shape:
        return x.name
    own = (*(1 for _ in range(len(sheet.shape) - len(x.shape))), *x.shape)
    wanted = [1 if length is None and have is None else length for length, have in zip(sheet.shape, own, strict=True)]
    if None not in wanted:
        return sheet.node("Expand", x, sheet.writer.ints([int(length or 1) for length in wanted]))
    parts = [sheet.batch() if length is None else sheet.writer.ints([length]) for length in wanted]
    return sheet.node("Expand", x, sheet.writer.node("Concat", parts, axis=0))


def slice_(
    sheet: Sheet, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> str:
    if sheet.shape == x.shape and step == 1:
        return x.name
    ends = [np.iinfo(np.int64).max if end is None else end]
    bounds = [sheet.writer.ints([start or 0]), sheet.writer.ints(ends), sheet.writer.ints([dim])]
    return sheet.node("Slice", x, *bounds, sheet.writer.ints([step]))


def select(sheet: Sheet, x: Value, dim: int, index: int) -> str:
    return sheet.node("Gather", x, sheet.writer.constant(index, np.int64, "index"), axis=dim)


def chunk(sheet: Sheet, x: Value, *_: Any, dim: int = 0, **__: Any) -> list[str]:
    """Write a division along `dim` (the argument that is left), into the lengths that the results have."""
    axis = int(_[1]) if len(_) > 1 else dim
    lengths = [shape[axis] for shape in sheet.shapes]
    if None in lengths:
        raise Unwritable("it divides the batch")
    return sheet.writer.several("Split", [x.name, sheet.writer.ints(lengths)], len(lengths), axis=axis)  # type: ignore[arg-type]


def getitem(_: Sheet, parts: Sequence[Value], index: int) -> Value:
    return parts[index]


def unbind(sheet: Sheet, x: Value, dim: int = 0) -> list[str]:
    count = x.shape[dim]
    return [sheet.node("Gather", x, sheet.writer.constant(i, np.int64, "index"), axis=dim) for i in range(count or 0)]


def cat(sheet: Sheet, tensors: Sequence[Value], dim: int = 0) -> str:
    """Write a Concat of all but what torch passes over: tensors (0,), with which transformers' caches begin."""
    held = [each for each in tensors if each.shape != (0,) or len(sheet.shape) == 1]
    return held[0].name if len(held) == 1 else sheet.node("Concat", *held, axis=dim)


def stack(sheet: Sheet, tensors: Sequence[Value], dim: int = 0) -> str:
    axis = dim % len(sheet.shape)
    return sheet.node("Concat", *(sheet.node("Unsqueeze", x, sheet.writer.ints([axis])) for x in tensors), axis=axis)


def roll(sheet: Sheet, x: Value, shifts: Any, dims: Any = 0) -> str:
    before = [0] * len(x.shape)
    for by, axis in zip(as_tuple(shifts), as_tuple(dims), strict=True):
        before[axis] += by
    return _wrap(sheet, x, before, [-by for by in before])


def pad(sheet: Sheet, x: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> str:
    """Write F.pad: (left, right) of the last axis, then of the one before it, and so on."""
    axes = len(x.shape)
    before, after = [0] * axes, [0] * axes
    for place in range(len(pad) // 2):
        before[axes - 1 - place], after[axes - 1 - place] = pad[2 * place], pad[2 * place + 1]
    if mode == "circular":
        return _wrap(sheet, x, before, after)
    kinds = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    filled = None if mode != "constant" or not value else float(value)
    return sheet.node("Pad", x, sheet.writer.ints([*before, *after]), filled, mode=kinds[mode])


def pad_with(sheet: Sheet, x: Value, pads: Sequence[int], value: float) -> str:
    return pad(sheet, x, pads, value=value)


def _wrap(sheet: Sheet, x: Value, before: Sequence[int], after: Sequence[int]) -> str:
    """Write a circular pad, or a roll, by picking places: `wrap` needs opset 19, and a join of slices runs in float."""
    name = x.name
    for axis, length in enumerate(x.shape):
        if not before[axis] and not after[axis]:
            continue
        if length is None:
            raise Unwritable("it wraps an axis whose length depends on the batch")
        places = [place % length for place in range(-before[axis], length + after[axis])]
        name = sheet.node("Gather", name, sheet.writer.ints(places), axis=axis)
    return name


def pixel_shuffle(sheet: Sheet, x: Value, upscale_factor: int) -> str:
    return sheet.node("DepthToSpace", x, blocksize=upscale_factor, mode="CRD")


def pixel_unshuffle(sheet: Sheet, x: Value, downscale_factor: int) -> str:
    """Write it by axes apart and together again: SpaceToDepth orders channels otherwise."""
    *first, height, width = x.shape
    by, at = downscale_factor, len(first)
    apart = sheet.node("Reshape", x, sheet.sizes((*first, (height or 1) // by, by, (width or 1) // by, by)))
    turned = sheet.node("Transpose", apart, perm=[*range(at), at + 1, at + 3, at, at + 2])
    return sheet.node("Reshape", turned, sheet.sizes(sheet.shape))


def channel_shuffle(sheet: Sheet, x: Value, groups: int) -> str:
    n, c, *size = x.shape
    apart = sheet.node("Reshape", x, sheet.sizes((n, groups, (c or 1) // groups, *size)))
    turned = sheet.node("Transpose", apart, perm=[0, 2, 1, *range(3, len(x.shape) + 1)])
    return sheet.node("Reshape", turned, sheet.sizes(x.shape))


def interpolate(
    sheet: Sheet,
    x: Value,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> str:
    kinds = {"nearest": "nearest", "bilinear": "linear", "linear": "linear", "trilinear": "linear", "bicubic": "cubic"}
    if mode not in kinds or antialias:
        raise Unwritable(f"its mode is {mode}{' with antialias' if antialias else ''}")
    sizes = list(zip(x.shape[2:], sheet.shape[2:], strict=True))
    grown = [(out or 1) / (have or 1) for have, out in sizes]
    if scale_factor is not None and not recompute_scale_factor and not align_corners:
        # torch takes places by the factor, which is no ratio of whole sizes where 7 * 1.5 becomes 10.
        grown = list(scale_factor) if isinstance(scale_factor, list | tuple) else [scale_factor] * len(grown)
    if mode == "nearest" and not all(_is_even(factor, *size) for factor, size in zip(grown, sizes, strict=True)):
        return _nearest(sheet, x, grown)
    grown = [_whole(factor, *size) for factor, size in zip(grown, sizes, strict=True)]
    scales = [1.0, 1.0, *grown]
    told = {"nearest": "asymmetric", "linear": "half_pixel", "cubic": "half_pixel"}[kinds[mode]]
    return sheet.node(
        "Resize",
        x,
        None,
        sheet.writer.constant(scales, np.float32, "scales"),
        mode=kinds[mode],
        coordinate_transformation_mode="align_corners" if align_corners else told,
        nearest_mode="floor" if mode == "nearest" else None,
        cubic_coeff_a=-0.75 if mode == "bicubic" else None,
    )


def _is_even(factor: float, have: int | None, out: int | None) -> bool:
    """Whether every value is repeated as often, or every so many values one is picked."""
    less, more = sorted((have or 1, out or 1))
    return more % less == 0 and factor == (out or 1) / (have or 1)


def _nearest(sheet: Sheet, x: Value, factors: Sequence[float]) -> str:
    """Pick the places that torch picks: a runtime may round one that lies between two of them to the other."""
    name = x.name
    for axis, factor in enumerate(factors, 2):
        have, out = x.shape[axis] or 1, sheet.shape[axis] or 1
        asked = {"size": out} if factor == out / have else {"scale_factor": factor}
        row = torch.arange(have, dtype=torch.float32).reshape(1, 1, -1)
        picked = F.interpolate(row, mode="nearest", **asked).reshape(-1).long().tolist()
        name = sheet.node("Gather", name, sheet.writer.ints(picked), axis=axis)
    return name


def _whole(factor: float, have: int | None, out: int | None) -> float:
    """The float32 nearest to `factor` with which ONNX Runtime, in float32, gets the size that torch gets in float64.

    Raises Unwritable where there is none.
    """
    scale = np.float32(factor)
    for _ in range(4):
        found = int(scale * np.float32(have or 1))
        if found == (out or 1):
            return float(scale)
        scale = np.nextafter(scale, np.float32(np.inf if found < (out or 1) else 0))
    raise Unwritable(f"it resizes {have} values by {factor}, which gives {out} in torch alone")


def repeat(sheet: Sheet, x: Value, *repeats: Any) -> str:
    given = list(repeats[0] if isinstance(repeats[0], tuple | list) else repeats)
    if any(not isinstance(each, int) for each in given):
        raise Unwritable("it repeats as often as the batch is large")
    shape = [1] * (len(given) - len(x.shape))
    name = sheet.node("Reshape", x, sheet.sizes((*shape, *x.shape))) if shape else x.name
    return sheet.node("Tile", name, sheet.writer.ints(given))


def repeat_interleave(sheet: Sheet, x: Value, repeats: int, dim: int) -> str:
    """Write each value along `dim` several times in a row."""
    shape, axis = x.shape, dim % len(x.shape)
    apart = sheet.node("Unsqueeze", x, sheet.writer.ints([axis + 1]))
    times = [repeats if place == axis + 1 else 1 for place in range(len(shape) + 1)]
    return sheet.node("Reshape", sheet.node("Tile", apart, sheet.writer.ints(times)), sheet.sizes(sheet.shape))


def flip(sheet: Sheet, x: Value, dims: Sequence[int]) -> str:
    name = x.name
    for axis in dims:
        ends = (sheet.writer.ints([value]) for value in (-1, np.iinfo(np.int64).min, axis, -1))
        name = sheet.node("Slice", name, *ends)
    return name


def index_select(sheet: Sheet, x: Value, dim: int, index: Value) -> str:
    return sheet.node("Gather", x, index, axis=dim)


def gather(sheet: Sheet, x: Value, dim: int, index: Value) -> str:
    return sheet.node("GatherElements", x, index, axis=dim)


def index(sheet: Sheet, x: Value, indices: Sequence[Value | None]) -> str:
    """Write x[..., index, ...] for one tensor of numbers along one axis, or x[index, index, ...] for the first axes."""
    given = [(axis, each) for axis, each in enumerate(indices) if each is not None]
    if any(each.dtype == torch.bool for _, each in given):
        raise Unwritable("a mask chooses among its values")
    if len(given) == 1:
        return sheet.node("Gather", x, given[0][1], axis=given[0][0])
    if [axis for axis, _ in given] != list(range(len(given))):
        raise Unwritable("several tensors choose along axes that are not the first")
    whole = sheet.shape[: len(sheet.shape) - len(x.shape) + len(given)]
    last = sheet.writer.ints([len(whole)])
    spread = [sheet.node("Unsqueeze", expand(replace(sheet, shapes=(whole,)), each), last) for _, each in given]
    return sheet.node("GatherND", x, sheet.writer.node("Concat", spread, axis=len(whole)))


def arange(sheet: Sheet, start: Any, end: Any, step: Any, *, dtype: Any = None, device: Any = None) -> str:
    """Write 0, 1, ... to the batch's size: what does not depend on it is a constant."""
    if sheet.shape != (None,) or (start, end, step) != (0, None, 1) or dtype not in (None, torch.int64):
        raise Unwritable("its length follows the batch in a way that r2 does not know")
    ends = sheet.writer.node("Squeeze", [sheet.batch(), sheet.writer.ints([0])])
    return sheet.writer.node("Range", [sheet.writer.constant(0, np.int64), ends, sheet.writer.constant(1, np.int64)])


def full(sheet: Sheet, sizes: Sequence[Any], value: float, *, dtype: Any = None, device: Any = None) -> str:
    """Write one number as often as the result has places; what follows the batch is computed as the network runs."""
    kind = np.int64 if dtype == torch.int64 else bool if dtype == torch.bool else np.float32
    one = Value(sheet.writer.constant(value, kind), (), dtype or torch.float32)
    return expand(sheet, one)
