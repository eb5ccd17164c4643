"""Operators of ONNX with weights, and pools: convolutions, products of matrices, norms."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2cli.models.onnx_values import Attributes, Operator, Uncomputable, Value, bounded, operand, tensor

CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOLS: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
MEAN_POOLS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _sizes(a: Attributes, name: str, rank: int) -> list[int]:
    given = list(a.get(name) or [1] * rank)
    if len(given) != rank:
        raise Uncomputable(f"its {name} are {given} for {rank} axes")
    return given


def _spatial(x: Tensor) -> int:
    if not 3 <= x.ndim <= 5:
        raise Uncomputable(f"its input has {x.ndim} axes")
    return x.ndim - 2


def _pads(a: Attributes, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """The padding of each axis before and after it, whatever way the file says it."""
    rank = len(kernel)
    strides, dilations = _sizes(a, "strides", rank), _sizes(a, "dilations", rank)
    auto = a.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = list(a.get("pads") or [0] * 2 * rank)
        return pads[:rank], pads[rank:]
    if auto == "VALID":
        return [0] * rank, [0] * rank
    total = []
    for size, window, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        reach = (window - 1) * dilation + 1
        total.append(max(0, (math.ceil(int(size) / stride) - 1) * stride + reach - int(size)))
    less, more = [one // 2 for one in total], [one - one // 2 for one in total]
    return (less, more) if auto == "SAME_UPPER" else (more, less)


def _around(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Padding as F.pad has it: the last axis first."""
    return [size for pair in reversed(list(zip(before, after, strict=True))) for size in pair]


def conv(a: Attributes, x: Tensor, weight: Tensor, bias: Value = None) -> Tensor:
    rank = _spatial(x)
    before, after = _pads(a, x, weight.shape[2:])
    if before != after:
        x, before = F.pad(x, _around(before, after)), [0] * rank
    strides, dilations = _sizes(a, "strides", rank), _sizes(a, "dilations", rank)
    found: Tensor = CONVOLUTIONS[rank](x, weight, bias, strides, before, dilations, a.get("group", 1))
    return found


def conv_transpose(a: Attributes, x: Tensor, weight: Tensor, bias: Value = None) -> Tensor:
    rank = _spatial(x)
    strides, dilations, kernel = _sizes(a, "strides", rank), _sizes(a, "dilations", rank), weight.shape[2:]
    extra = list(a.get("output_padding") or [0] * rank)
    before, after = [0] * rank, [0] * rank
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    wanted = a.get("output_shape")
    if wanted is not None or a.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        sizes = [int(n) for n in x.shape[2:]]
        wanted = wanted or [n * s for n, s in zip(sizes, strides, strict=True)]
        over = [
            s * (n - 1) + e + r - w for n, s, e, r, w in zip(sizes, strides, extra, reach, wanted[-rank:], strict=True)
        ]
        if a.get("output_shape"):  # it may ask for more than there is
            extra = [e + max(0, -one) for e, one in zip(extra, over, strict=True)]
        less, more = [max(0, one) // 2 for one in over], [max(0, one) - max(0, one) // 2 for one in over]
        before, after = (less, more) if a.get("auto_pad") == "SAME_UPPER" else (more, less)
    elif a.get("auto_pad", "NOTSET") == "NOTSET":
        before, after = _pads(a, x, kernel)
    # torch pads both sides alike: what is more on one side is cut off the result.
    both = [min(pair) for pair in zip(before, after, strict=True)]
    group = a.get("group", 1)
    fits = all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True))
    if not fits:
        raise Uncomputable(f"its output_padding {extra} is not below its strides {strides}")
    found: Tensor = TRANSPOSED[rank](x, weight, bias, strides, both, extra, group, dilations)
    for axis in range(rank):
        start, end = before[axis] - both[axis], after[axis] - both[axis]
        if start or end:
            found = found.narrow(axis + 2, start, int(found.shape[axis + 2]) - start - end)
    return found


def linear(a: Attributes, x: Tensor, weight: Tensor, bias: Value = None) -> Tensor:
    """r2's own: a product by a constant matrix, which is (outputs, inputs) as torch has it."""
    return F.linear(x, weight, bias)


def gemm(a: Attributes, x: Tensor, y: Tensor, z: Value = None) -> Tensor:
    x, y = x.t() if a.get("transA") else x, y.t() if a.get("transB") else y
    found = torch.matmul(x, y) * a["alpha"] if a.get("alpha", 1) != 1 else torch.matmul(x, y)
    if z is None:
        return found
    z = operand(a, z)
    return torch.add(found, z if a.get("beta", 1) == 1 else z * a["beta"])


def matmul(a: Attributes, x: Value, y: Value) -> Tensor:
    return torch.matmul(tensor(a, x), tensor(a, y))


# --- norms -----------------------------------------------------------------------------------------------------------


def batch_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.1, a.get("epsilon", 1e-5))


def instance_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, None, None, weight, bias, True, 0.1, a.get("epsilon", 1e-5))


def layer_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Value = None) -> Tensor:
    shape = [int(size) for size in x.shape[a.get("axis", -1) % x.ndim :]]
    weight = weight.expand(shape) if list(weight.shape) != shape else weight
    return F.layer_norm(x, shape, weight, bias, a.get("epsilon", 1e-5))


def group_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups = a["num_groups"]
    if len(weight) == groups != x.shape[1]:  # opset 18 has one number a group, as no network has
        weight, bias = (one.repeat_interleave(x.shape[1] // groups) for one in (weight, bias))
    return F.group_norm(x, groups, weight, bias, a.get("epsilon", 1e-5))


def rms_norm(a: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, [int(n) for n in x.shape[a.get("axis", -1) % x.ndim :]], weight, a.get("epsilon", 1e-5))


def lp_norm(a: Attributes, x: Tensor) -> Tensor:
    return torch.div(x, torch.linalg.vector_norm(x, a.get("p", 2), a.get("axis", -1), True))


def local_response_norm(a: Attributes, x: Tensor) -> Tensor:
    size = a["size"]
    if size % 2 == 0:
        raise Uncomputable("its size is even")
    return F.local_response_norm(x, size, a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0))


# --- pools -----------------------------------------------------------------------------------------------------------


def _windows(a: Attributes, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Of each axis: the padding before it, how far the last window reaches behind it, and how many windows there are.

    With ceil_mode the last window may reach beyond the padding, and none begins behind the values.
    """
    rank = len(kernel)
    (before, after), strides, dilations = _pads(a, x, kernel), _sizes(a, "strides", rank), _sizes(a, "dilations", rank)
    ends, counts = [], []
    for axis, size in enumerate(map(int, x.shape[2:])):
        stride, reach, held = strides[axis], (kernel[axis] - 1) * dilations[axis] + 1, size + before[axis]
        room = held + after[axis] - reach
        count = room // stride + 1
        if a.get("ceil_mode", 0) and room % stride and count * stride < held:
            count += 1
        counts.append(count)
        ends.append((count - 1) * stride + reach - held)
    return before, ends, counts


def _is_plain(a: Attributes, x: Tensor, kernel: Sequence[int]) -> bool:
    """Whether torch pads as the file does: both sides alike, and by half a window at most."""
    before, after = _pads(a, x, kernel)
    return before == after and all(2 * pad <= size for pad, size in zip(before, kernel, strict=True))


def max_pool(a: Attributes, x: Tensor) -> Tensor:
    if a["outputs"] > 1:
        raise Uncomputable("it gives indices too")
    rank, kernel = _spatial(x), list(a["kernel_shape"])
    strides, dilations = _sizes(a, "strides", rank), _sizes(a, "dilations", rank)
    pool, (before, ends, counts) = MAX_POOLS[rank], _windows(a, x, kernel)
    if _is_plain(a, x, kernel):
        found: Tensor = pool(x, kernel, strides, before, dilations, bool(a.get("ceil_mode", 0)))
        return found
    # Padding by minus infinity would be a value that no grid holds. So torch pads both sides, by as much as lets a
    # window begin where the file's first does, and takes all that begin inside; those too many are cut off.
    wider = [range(pad, size // 2 + 1, step) for pad, size, step in zip(before, kernel, strides, strict=True)]
    for pads in itertools.product(*wider):
        found = pool(x, kernel, strides, pads, dilations, True)
        starts = [(pad - own) // step for pad, own, step in zip(pads, before, strides, strict=True)]
        ranges = list(zip(found.shape[2:], starts, counts, strict=True))
        if all(int(size) >= start + count for size, start, count in ranges):
            for axis, (size, start, count) in enumerate(ranges, 2):
                found = found.narrow(axis, start, count) if int(size) > count else found
            return found
    padded = F.pad(x, _around(before, ends), "constant", float("-inf"))
    found = pool(padded, kernel, strides, [0] * rank, dilations)
    return found


def average_pool(a: Attributes, x: Tensor) -> Tensor:
    rank, kernel = _spatial(x), list(a["kernel_shape"])
    if set(a.get("dilations") or [1]) != {1}:
        raise Uncomputable("it averages values that are not neighbours")
    strides, counted, pool = _sizes(a, "strides", rank), bool(a.get("count_include_pad", 0)), MEAN_POOLS[rank]
    if _is_plain(a, x, kernel):
        before, ceil = _pads(a, x, kernel)[0], bool(a.get("ceil_mode", 0))
        found: Tensor = pool(x, kernel, strides, before, ceil, counted)
        return found
    before, ends, _ = _windows(a, x, kernel)
    held = [min(pair) for pair in zip(_pads(a, x, kernel)[1], ends, strict=True)]
    padded: Tensor = pool(F.pad(x, _around(before, ends)), kernel, strides, [0] * rank)
    if counted and held == ends:
        return padded
    ones = torch.ones(x.shape[2:], device=x.device)[None]
    if counted:  # the padding is, and what a window reaches beyond it is not
        ones = F.pad(ones, _around(before, held), "constant", 1.0)
        before, ends = [0] * rank, [end - own for end, own in zip(ends, held, strict=True)]
    return torch.div(padded, pool(F.pad(ones, _around(before, ends)), kernel, strides, [0] * rank))


def global_mean(a: Attributes, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), True)


def global_max(a: Attributes, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), True)


# --- sizes of images -------------------------------------------------------------------------------------------------


def resize(a: Attributes, x: Tensor, roi: Value = None, scales: Value = None, sizes: Value = None) -> Tensor:
    scales = a.get("scales") if scales is None else scales
    axes = [axis % x.ndim for axis in a.get("axes") or range(x.ndim)]
    before = [int(size) for size in x.shape[2:]]
    factors, after = [1.0] * len(before), list(before)
    for place, axis in enumerate(axes):
        if axis < 2:
            if (scales and scales[place] != 1) or (
                sizes and isinstance(sizes[place], int) and axis and sizes[1] != x.shape[1]
            ):
                raise Uncomputable("it changes the number of channels")
            continue
        size = before[axis - 2]
        factors[axis - 2] = scales[place] if scales else sizes[place] / size
        after[axis - 2] = math.floor(size * scales[place] + 1e-6) if scales else int(sizes[place])
    bounded([*x.shape[:2], *after])
    mode, at = a.get("mode", "nearest"), a.get("coordinate_transformation_mode", "half_pixel")
    if after == before:
        return x
    if mode == "nearest":
        return _nearest(a, x, at, before, after, factors)
    corners = at == "align_corners"
    if at not in ("half_pixel", "pytorch_half_pixel", "align_corners") or (
        at == "pytorch_half_pixel" and 1 in after and before != [1] * len(before)
    ):
        if mode != "linear" or a.get("antialias"):
            raise Uncomputable(f"it resizes by {mode} with {at} coordinates")
        return _linear(x, at, before, after, factors)
    kind = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}, "cubic": {2: "bicubic"}}[mode].get(x.ndim - 2)
    if kind is None or (mode == "cubic" and (a.get("cubic_coeff_a", -0.75) != -0.75 or a.get("exclude_outside"))):
        raise Uncomputable(f"it resizes {x.ndim - 2} axes by {mode}, with coefficients that torch does not have")
    exact = all(abs(size * factor - one) < 1e-4 for size, factor, one in zip(before, factors, after, strict=True))
    smooth = {"antialias": True} if a.get("antialias") else {}
    if exact or corners:
        return F.interpolate(x, **_new_size(before, after), mode=kind, align_corners=corners, **smooth)
    return F.interpolate(x, scale_factor=factors, mode=kind, align_corners=corners, **smooth)


def _new_size(before: Sequence[int], after: Sequence[int]) -> dict[str, Any]:
    """The new size for torch: as a factor where that is a whole number, so that it holds for other sizes too."""
    if any(new % size for size, new in zip(before, after, strict=True)):
        return {"size": list(after)}
    return {"scale_factor": [float(new // size) for size, new in zip(before, after, strict=True)]}


def _place(at: str, index: int, before: int, after: int, factor: float) -> float:
    """Where an output pixel is in the input, by the file's rule of coordinates."""
    if at == "align_corners":
        return index * (before - 1) / (after - 1) if after > 1 else 0.0
    if at == "asymmetric":
        return index / factor
    if at == "tf_half_pixel_for_nn":
        return (index + 0.5) / factor
    if at == "pytorch_half_pixel" and after == 1:
        return 0.0
    if at in ("half_pixel", "pytorch_half_pixel"):
        return (index + 0.5) / factor - 0.5
    raise Uncomputable(f"it resizes with {at} coordinates")


def _nearest(
    a: Attributes, x: Tensor, at: str, before: Sequence[int], after: Sequence[int], factors: Sequence[float]
) -> Tensor:
    """The nearest pixel by the file's rule: torch's own where that chooses the same ones."""
    rounding = {
        "round_prefer_floor": lambda place: math.ceil(place - 0.5),
        "round_prefer_ceil": lambda place: math.floor(place + 0.5),
        "floor": math.floor,
        "ceil": math.ceil,
    }[a.get("nearest_mode", "round_prefer_floor")]
    chosen = []
    for size, new, factor in zip(before, after, factors, strict=True):
        rows = [rounding(round(_place(at, index, size, new, factor), 6)) for index in range(new)]
        chosen.append([min(max(row, 0), size - 1) for row in rows])
    usual = [[index * size // new for index in range(new)] for size, new in zip(before, after, strict=True)]
    if chosen == usual:
        return F.interpolate(x, **_new_size(before, after), mode="nearest")
    for axis, rows in enumerate(chosen):
        if rows != list(range(before[axis])):
            x = x.index_select(axis + 2, torch.tensor(rows, device=x.device))
    return x


def _linear(x: Tensor, at: str, before: Sequence[int], after: Sequence[int], factors: Sequence[float]) -> Tensor:
    """Between two neighbours on each axis, by any rule of coordinates."""
    for axis, (size, new, factor) in enumerate(zip(before, after, factors, strict=True)):
        places = [min(max(_place(at, index, size, new, factor), 0.0), size - 1.0) for index in range(new)]
        first = [min(int(place), size - 1) for place in places]
        second = [min(row + 1, size - 1) for row in first]
        shape = [-1] + [1] * (x.ndim - axis - 3)
        part = torch.tensor([p - f for p, f in zip(places, first, strict=True)], device=x.device).reshape(shape)
        low, high = (x.index_select(axis + 2, torch.tensor(rows, device=x.device)) for rows in (first, second))
        x = low + (high - low) * part
    return x


def pad(a: Attributes, x: Tensor, pads: Value = None, value: Value = None, axes: Value = None) -> Tensor:
    pads, value = a.get("pads") if pads is None else pads, a.get("value") if value is None else value
    axes = [axis % x.ndim for axis in axes] if axes else list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for place, axis in enumerate(axes):
        before[axis], after[axis] = pads[place], pads[place + len(axes)]
    bounded([size + b + c for size, b, c in zip(x.shape, before, after, strict=True)])
    around, mode = _around(before, after), a.get("mode", "constant")
    while around and not any(around[-2:]):
        around = around[:-2]
    if not around:
        return x
    value = operand(a, value)
    if isinstance(value, Tensor):
        raise Uncomputable("it pads with a value that is computed")
    if mode == "constant":
        return F.pad(x, around, "constant", value or 0.0)
    name = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode]
    if len(around) > 2 * (x.ndim - 2) or x.ndim < 3:
        raise Uncomputable(f"it pads channels or the batch by {mode}")
    return F.pad(x, [*around, *[0] * (2 * (x.ndim - 2) - len(around))], name)


def prelu(a: Attributes, x: Tensor, slope: Value) -> Tensor:
    if isinstance(slope, Tensor) and slope.numel() == 1:
        return F.prelu(x, slope.reshape(1))
    if isinstance(slope, Tensor) and slope.ndim == x.ndim - 1 and slope.numel() == slope.shape[0] == x.shape[1]:
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * operand(a, slope), x)


LAYERS: dict[str, Operator] = {
    "Conv": Operator(conv),
    "ConvTranspose": Operator(conv_transpose),
    "Linear": Operator(linear),
    "Gemm": Operator(gemm),
    "MatMul": Operator(matmul),
    "BatchNormalization": Operator(batch_norm),
    "InstanceNormalization": Operator(instance_norm),
    "LayerNormalization": Operator(layer_norm),
    "GroupNormalization": Operator(group_norm),
    "RMSNormalization": Operator(rms_norm),
    "LpNormalization": Operator(lp_norm),
    "LRN": Operator(local_response_norm),
    "PRelu": Operator(prelu),
    "MaxPool": Operator(max_pool),
    "AveragePool": Operator(average_pool),
    "GlobalAveragePool": Operator(global_mean),
    "GlobalMaxPool": Operator(global_max),
    "Resize": Operator(resize, (1, 2, 3)),
    "Pad": Operator(pad, (1, 2, 3)),
}
