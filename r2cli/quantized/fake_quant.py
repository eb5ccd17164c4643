"""Rounding that passes a gradient, and the training operations on evenly spaced levels that all methods share.

- `round_with_gradient` is the straight-through estimator if delta is 0, and EWGS's if it is larger.
- `quantize` rounds to multiples of a step between two codes. A method says by a `SlopeRule` what the gradient is.
- `quantize_behind` does the same after a wide grid, for a value that both a sum and low-bit layers read.

Tensors are walked in chunks that stay in cache. A forward pass keeps only its input and its output, which the layers
before and after it keep anyway; autograd's plain operations would keep every value between them too.

Gradients at the bounds are written out and not left to `clamp`, because those of `clamp` changed between versions of
torch.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 65536  # elements: five tensors of this size fit a core's L2 cache
FLOOR = 1e-8  # the least step, which must stay positive because values are divided by it

Codes = tuple[int, int]  # the lowest and the highest code, with the zero point taken off: 0 is the value 0
Bound = float | Tensor
# (gradient, input, output, least and greatest value, where to write the input's gradient) -> one chunk's share () of
# the parameter's gradient
Slope = Callable[[Tensor, Tensor, Tensor, Bound, Bound, Tensor], Tensor]


@dataclass(frozen=True)
class SlopeRule:
    """The gradient of a method: the `slope` of one chunk, and a `factor` () on the sum of the parameter's shares."""

    slope: Slope
    factor: Tensor


def deviation(x: Tensor) -> Tensor:
    """Return the standard deviation () of `x` (any shape), and at least `FLOOR`, as for a single value."""
    return x.std(correction=min(1, x.numel() - 1)).clamp_min(FLOOR)


# --- one value at a time -------------------------------------------------------------------------------------------


def round_with_gradient(x: Tensor, delta: float | Tensor = 0.0) -> Tensor:
    """Return x (any shape) rounded, ties to even, with the gradient g * (1 + delta * sign(g) * (x - round(x))).

    Source: Lee et al., "Network Quantization with Element-wise Gradient Scaling" (2021), equation 5. With delta 0 it is
    the straight-through estimator. It can be differentiated twice, which EWGS needs to find its delta.
    """
    rounded: Tensor = _Round.apply(x, torch.as_tensor(delta, device=x.device))
    return rounded


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> Tensor:
        rounded = torch.round(x)
        ctx.save_for_backward(x - rounded, delta)
        return rounded

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        difference, delta = ctx.saved_tensors
        # sign(g) * g is |g|. These are plain operations, so that autograd can differentiate them once more.
        return g + delta * g.abs() * difference, None


def to_levels(x: Tensor, step: Tensor, codes: Codes, out: Tensor) -> Tensor:
    """Write the level nearest to each of x (any shape) to `out`: step * codes[0] .. step * codes[1], as in a Grid.

    It computes in the precision of `step`, because 16 bits have too few digits for codes.
    """
    if out.dtype != step.dtype:
        return out.copy_(to_levels(x.to(step.dtype), step, codes, torch.empty_like(out, dtype=step.dtype)))
    return torch.div(x, step, out=out).round_().clamp_(*codes).mul_(step)


# --- tensors -------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, parameter: Tensor, step: Tensor, codes: Codes, rule: SlopeRule) -> Tensor:
    """Return x (any shape) on the levels of `step` (), with a method's gradient by x and by `parameter` ()."""
    out: Tensor = _Quantize.apply(x, parameter, step.detach(), codes, rule)
    return out


def quantize_straight(x: Tensor, step: Tensor, codes: Codes) -> Tensor:
    """Return x (any shape) on the levels of a fixed step (). The gradient passes unchanged, so nothing is kept."""
    out: Tensor = _Straight.apply(x, step, codes)
    return out


def quantize_behind(
    x: Tensor, wide: tuple[Tensor, Codes], parameter: Tensor, step: Tensor, codes: Codes, rule: SlopeRule
) -> tuple[Tensor, Tensor]:
    """Return x (any shape) on the `wide` grid (step (), codes), for sums, and that on the levels of `step`, for layers.

    The wide grid passes the gradient unchanged. If its lowest code is 0 it is a ReLU too, and its gradient is a ReLU's.
    """
    both: tuple[Tensor, Tensor] = _Behind.apply(x, *wide, parameter, step.detach(), codes, rule)
    return both


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, step: Tensor, codes: Codes, rule: SlopeRule) -> Tensor:
        x = dense(x)
        y = torch.empty_like(x)
        for a, b in chunks(x, y):
            to_levels(a, step, codes, b)
        ctx.save_for_backward(x, y, step)
        ctx.codes, ctx.rule = codes, rule
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, step = ctx.saved_tensors
        kind, (x, y, g) = x.dtype, _as_precise(step, x, y, g)
        rule: SlopeRule = ctx.rule
        # Only x, y and g are read: whether x was inside the range, and by how much it was rounded, follows from them.
        gx, ends = torch.empty_like(x), bounds(step, ctx.codes)
        shares = [rule.slope(a, b, c, *ends, d) for a, b, c, d in chunks(like(g, x), x, y, gx)]
        return gx.to(kind), total(shares) * rule.factor, None, None, None


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, codes: Codes) -> Tensor:
        x = dense(x)
        y = torch.empty_like(x)
        for a, b in chunks(x, y):
            to_levels(a, step, codes, b)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g, None, None


class _Behind(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, wide: Tensor, most: Codes, parameter: Tensor, step: Tensor, codes: Codes, rule: SlopeRule
    ) -> tuple[Tensor, Tensor]:
        x = dense(x)
        first, second = torch.empty_like(x), torch.empty_like(x)
        for a, b, c in chunks(x, first, second):
            to_levels(a, wide, most, b)
            to_levels(b, step, codes, c)
        ctx.save_for_backward(x, wide, second, step)
        ctx.most, ctx.codes, ctx.rule = most, codes, rule
        return first, second

    @staticmethod
    def backward(ctx: Any, g: Tensor, own: Tensor) -> tuple[Tensor | None, ...]:
        x, wide, y, step = ctx.saved_tensors
        kind, (x, y, g, own) = x.dtype, _as_precise(step, x, y, g, own)
        rule: SlopeRule = ctx.rule
        gx, ends, shares = torch.empty_like(x), bounds(step, ctx.codes), []
        # The wide value is computed again, a chunk at a time: keeping it would take as much memory as the output.
        again = torch.empty(min(chunk_size(x), x.numel()), dtype=x.dtype, device=x.device)
        for a, b, c, d, out in chunks(like(g, x), like(own, x), x, y, gx):
            first = again[: len(a)]
            to_levels(c, wide, ctx.most, first)
            shares.append(rule.slope(b, first, d, *ends, out))
            out += a
            if ctx.most[0] == 0:  # a ReLU passes no gradient to what it cut, at 0 neither
                torch.ops.aten.threshold_backward.grad_input(out, c, 0, grad_input=out)
        return gx.to(kind), None, None, total(shares) * rule.factor, None, None, None


def _as_precise(step: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the precision of `step`, in which sums over them are taken."""
    return tuple(tensor.to(step.dtype) for tensor in tensors)


# --- parts of slopes -----------------------------------------------------------------------------------------------


def inside(g: Tensor, x: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
    """Write g to `out` where low < x < high, and 0 elsewhere, also at the bounds. All have one shape."""
    if isinstance(low, Tensor):
        return torch.mul(g, (x > low) & (x < high), out=out)
    found: Tensor = torch.ops.aten.hardtanh_backward.grad_input(g, x, low, high, grad_input=out)
    return found


def below(bound: Bound, x: Tensor) -> Bound:
    """Return the next normal number below `bound`, in the precision of x. What is above it is at least the bound."""
    if isinstance(bound, Tensor):
        return torch.nextafter(bound, bound.new_tensor(-torch.inf))
    return _below(bound, x.dtype)


@functools.lru_cache(maxsize=256)
def _below(bound: float, dtype: torch.dtype) -> float:
    # Comparing with a number smaller than the normal ones costs a CPU a third more.
    if bound == 0:
        return -torch.finfo(dtype).tiny
    return torch.nextafter(torch.tensor(bound, dtype=dtype), torch.tensor(-torch.inf, dtype=dtype)).item()


def bounds(step: Tensor, codes: Codes) -> tuple[Bound, Bound]:
    """Return the least and the greatest level: as numbers on a CPU, and as tensors on a GPU.

    Reading a number from a GPU would wait for all work that is queued there.
    """
    low, high = codes[0] * step, codes[1] * step
    return (low, high) if step.is_cuda else (low.item(), high.item())


# --- walking -------------------------------------------------------------------------------------------------------


def chunk_size(x: Tensor) -> int:
    """Return the elements of a chunk: as many as keep every thread of a CPU busy, and all on a GPU."""
    return x.numel() if x.is_cuda else CHUNK * torch.get_num_threads()


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield pieces (n,) of dense tensors of one layout, in the order of memory."""
    size = max(1, chunk_size(tensors[0]))
    return zip(*(torch.split(torch.as_strided(t, (t.numel(),), (1,)), size) for t in tensors), strict=True)


def dense(x: Tensor) -> Tensor:
    """Return x if its elements fill their memory without gaps, else a copy for which that holds."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def like(g: Tensor, x: Tensor) -> Tensor:
    """Return g in the layout of x, which is dense."""
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


def total(shares: list[Tensor]) -> Tensor:
    """Return the sum () of the shares of chunks, added up in float64."""
    return torch.stack(shares).double().sum().to(shares[0].dtype)
