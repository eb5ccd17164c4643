"""Pools, means and sums in ONNX. The parameters are those of torch's functions."""

from collections.abc import Callable
from typing import Any

import numpy as np

from r2cli.deploy.onnx_sheet import Sheet, Unwritable, Value, as_tuple, spread


def max_pool(
    sheet: Sheet,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> str:
    """Write the greatest of windows, with a border behind in the place of `ceil_mode`, as for a mean."""
    if return_indices:
        raise Unwritable("it returns indices")
    axes = len(x.shape) - 2
    kernel, strides, border = (spread(each, axes) for each in (kernel_size, stride or kernel_size, padding))
    steps = spread(dilation, axes)
    windows = [step * (size - 1) + 1 for size, step in zip(kernel, steps, strict=True)]
    beyond = _beyond(sheet, x, windows, strides, border) if ceil_mode else [0] * axes
    pads = [*border, *(pad + more for pad, more in zip(border, beyond, strict=True))]
    return sheet.node(
        "MaxPool",
        x,
        kernel_shape=kernel,
        strides=strides,
        pads=pads if any(pads) else None,
        dilations=steps if any(each != 1 for each in steps) else None,
    )


def avg_pool(
    sheet: Sheet,
    x: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> str:
    """Write a mean of windows. `ceil_mode` is written as a border behind: runtimes differ in what they divide by.

    torch counts the border that was asked for (`count_include_pad`), and never what the last window has beyond it.
    """
    axes = len(x.shape) - 2
    if divisor_override is not None:
        raise Unwritable("it has a divisor of its own")
    kernel, strides = spread(kernel_size, axes), spread(stride or kernel_size, axes)
    border, name = spread(padding, axes), x.name
    beyond = _beyond(sheet, x, kernel, strides, border) if ceil_mode else [0] * axes
    counted = any(border) and count_include_pad
    if counted and any(beyond):  # then the border is written as zeros, and what is beyond is not counted
        name, counted = sheet.node("Pad", name, sheet.writer.ints([0, 0, *border, 0, 0, *border])), False
        border = [0] * axes
    pads = [*border, *(pad + more for pad, more in zip(border, beyond, strict=True))]
    return sheet.node(
        "AveragePool",
        name,
        kernel_shape=kernel,
        strides=strides,
        pads=pads if any(pads) else None,
        count_include_pad=1 if counted else None,
    )


def _beyond(sheet: Sheet, x: Value, windows: list[int], strides: list[int], border: list[int]) -> list[int]:
    """By how many values each axis' last window reaches beyond the border. Raises Unwritable for sizes unknown."""
    found = []
    for length, count, size, stride, pad in zip(x.shape[2:], sheet.shape[2:], windows, strides, border, strict=True):
        if length is None or count is None:
            raise Unwritable("the size of its input follows the batch")
        found.append(max(0, (count - 1) * stride + size - length - 2 * pad))
    return found


def adaptive_avg_pool(sheet: Sheet, x: Value, output_size: Any) -> str:
    """Write a global average, or one of equal windows: only where each output is of as many inputs is there one."""
    have, want = x.shape[2:], sheet.shape[2:]
    if all(length == 1 for length in want):
        return sheet.node("GlobalAveragePool", x)
    if have == want:
        return x.name
    if any(length is None or length % (out or 1) for length, out in zip(have, want, strict=True)):
        return _uneven_means(sheet, x)
    kernel = [int(length or 1) // int(out or 1) for length, out in zip(have, want, strict=True)]
    return sheet.node("AveragePool", x, kernel_shape=kernel, strides=kernel)


def _uneven_means(sheet: Sheet, x: Value) -> str:
    """Write the mean of windows of several sizes, as torch has them, along each axis: a slice and a mean for each.

    Where every window is one value, as when 2 become 6, the values are repeated and nothing is computed.
    """
    name = x.name
    for axis in range(2, len(x.shape)):
        have, out = x.shape[axis], sheet.shape[axis]
        if have is None or out is None:
            raise Unwritable("the size of its input follows the batch")
        windows = [(place * have // out, -(-(place + 1) * have // out)) for place in range(out)]
        if all(end - start == 1 for start, end in windows):
            index = sheet.writer.constant([start for start, _ in windows], np.int64, "index")
            name = sheet.node("Gather", name, index, axis=axis)
            continue
        parts = []
        for start, end in windows:
            cut = sheet.node("Slice", name, *(sheet.writer.ints([value]) for value in (start, end, axis)))
            parts.append(sheet.node("ReduceMean", cut, axes=[axis], keepdims=1))
        name = sheet.node("Concat", *parts, axis=axis)
    return name


def reduced(operation: str) -> Callable[..., Any]:
    def write(sheet: Sheet, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> str:
        axes = list(range(len(x.shape))) if dim is None else list(as_tuple(dim))
        axes, x = [axis % len(x.shape) for axis in axes], sheet.cast(x, sheet.dtype)
        if operation == "ReduceSum":
            return sheet.node(operation, x, sheet.writer.ints(axes), keepdims=int(keepdim))
        return sheet.node(operation, x, axes=axes, keepdims=int(keepdim))

    return write


def adaptive_max_pool(sheet: Sheet, x: Value, output_size: Any) -> str:
    have, want = x.shape[2:], sheet.shape[2:]
    if all(length == 1 for length in want):
        return sheet.node("GlobalMaxPool", x)
    if any(length is None or length % (out or 1) for length, out in zip(have, want, strict=True)):
        raise Unwritable("its windows are of several sizes")
    kernel = [int(length or 1) // int(out or 1) for length, out in zip(have, want, strict=True)]
    return sheet.node("MaxPool", x, kernel_shape=kernel, strides=kernel)


def largest(operation: str) -> Callable[..., Any]:
    """Write torch.max or torch.min over one axis: its values and their places; or of all."""

    def write(sheet: Sheet, x: Value, dim: int | None = None, keepdim: bool = False) -> Any:
        places = "ArgMax" if operation == "ReduceMax" else "ArgMin"
        if dim is None:
            return sheet.node(operation, x, keepdims=0)
        values = sheet.node(operation, x, axes=[dim], keepdims=int(keepdim))
        return [values, sheet.node(places, x, axis=dim, keepdims=int(keepdim))] if len(sheet.shapes) > 1 else values

    return write


def place_of(operation: str) -> Callable[..., Any]:
    def write(sheet: Sheet, x: Value, dim: int | None = None, keepdim: bool = False) -> str:
        if dim is None:
            raise Unwritable("it has no axis")
        return sheet.node(operation, x, axis=dim, keepdims=int(keepdim))

    return write


def cumsum(sheet: Sheet, x: Value, dim: int) -> str:
    return sheet.node("CumSum", sheet.cast(x, sheet.dtype), sheet.writer.constant(dim, np.int64, "axis"))


def topk(sheet: Sheet, x: Value, k: int, dim: int = -1, *_: Any, **__: Any) -> list[str]:
    return sheet.writer.several("TopK", [x.name, sheet.writer.ints([k])], 2, axis=dim)
