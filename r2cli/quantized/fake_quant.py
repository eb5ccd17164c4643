"""Rounding that a gradient passes, and the training operations on uniform levels that all methods share.

`round_with_gradient` is the straight-through estimator at delta 0, and EWGS above it. `quantize` rounds to multiples of
a step between two codes; what its gradient is, a method says by a `Rule`. `quantize_behind` does the same behind a wide
grid, for a value that both a sum and low-bit layers read. Tensors are walked in chunks that stay in cache, and of a
forward pass only its input and its output are kept, which layers keep anyway.

Gradients at the bounds are written out, not left to `clamp`, whose own changed between versions of torch.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 65536  # elements: the chunks of five tensors of this size fit a core's L2 cache
FLOOR = 1e-8  # of a step, which must stay positive

Codes = tuple[int, int]  # the lowest and the highest, zero point taken off: 0 is the value 0
Bound = float | Tensor
# (gradient, input, output, least and greatest value, where the input's gradient goes) -> the trainable number's share
Slope = Callable[[Tensor, Tensor, Tensor, Bound, Bound, Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """What a method's gradient is: `slope` of one chunk of values, and the `factor` () on the sum over all chunks."""

    slope: Slope
    factor: Tensor


# --- one value at a time -------------------------------------------------------------------------------------------


def round_with_gradient(x: Tensor, delta: float | Tensor = 0.0) -> Tensor:
    """x rounded, ties to even, any shape; its gradient is g * (1 + delta * sign(g) * (x - round(x))).

    Lee et al., "Network Quantization with Element-wise Gradient Scaling" (2021), equation 5; delta 0 is the
    straight-through estimator. It can be differentiated twice, as EWGS's own delta asks.
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
        return g + delta * g.abs() * difference, None


def to_levels(x: Tensor, step: Tensor, codes: Codes, out: Tensor) -> Tensor:
    """The nearest of the levels step * codes[0] .. step * codes[1] to each of x, into `out`: as a Grid has them.

    In the precision of `step`: half a precision has too few digits for codes.
    """
    if out.dtype != step.dtype:
        return out.copy_(to_levels(x.to(step.dtype), step, codes, torch.empty_like(out, dtype=step.dtype)))
    return torch.div(x, step, out=out).round_().clamp_(*codes).mul_(step)


# --- tensors -------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, parameter: Tensor, step: Tensor, codes: Codes, rule: Rule) -> Tensor:
    """x (any shape) on the levels of `step` (), with a method's gradient for x and for `parameter` ()."""
    out: Tensor = _Quantize.apply(x, parameter, step.detach(), codes, rule)
    return out


def quantize_straight(x: Tensor, step: Tensor, codes: Codes) -> Tensor:
    """x (any shape) on the levels of a fixed step (), the gradient passed straight through; nothing is kept."""
    out: Tensor = _Straight.apply(x, step, codes)
    return out


def quantize_behind(
    x: Tensor, wide: tuple[Tensor, Codes], parameter: Tensor, step: Tensor, codes: Codes, rule: Rule
) -> tuple[Tensor, Tensor]:
    """x on a wide grid (step (), codes), and that on the levels of `step`: what sums read, and what layers read.

    The wide grid passes the gradient straight through; where its lowest code is 0 it is a ReLU as well.
    """
    both: tuple[Tensor, Tensor] = _Behind.apply(x, *wide, parameter, step.detach(), codes, rule)
    return both


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, step: Tensor, codes: Codes, rule: Rule) -> Tensor:
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
        rule: Rule = ctx.rule
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
        ctx: Any, x: Tensor, wide: Tensor, most: Codes, parameter: Tensor, step: Tensor, codes: Codes, rule: Rule
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
        rule: Rule = ctx.rule
        gx, ends, shares = torch.empty_like(x), bounds(step, ctx.codes), []
        again = torch.empty(min(chunk_size(x), x.numel()), dtype=x.dtype, device=x.device)
        for a, b, c, d, out in chunks(like(g, x), like(own, x), x, y, gx):
            first = again[: len(a)]
            to_levels(c, wide, ctx.most, first)
            shares.append(rule.slope(b, first, d, *ends, out))
            out += a
            if ctx.most[0] == 0:
                torch.ops.aten.threshold_backward.grad_input(out, c, 0, grad_input=out)
        return gx.to(kind), None, None, total(shares) * rule.factor, None, None, None


def _as_precise(step: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the precision of `step`, in which sums over them are taken."""
    return tuple(tensor.to(step.dtype) for tensor in tensors)


# --- parts of slopes -----------------------------------------------------------------------------------------------


def inside(g: Tensor, x: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
    """g where low < x < high and 0 elsewhere, at the bounds too, into `out`: all of one shape."""
    if isinstance(low, Tensor):
        return torch.mul(g, (x > low) & (x < high), out=out)
    found: Tensor = torch.ops.aten.hardtanh_backward.grad_input(g, x, low, high, grad_input=out)
    return found


def below(bound: Bound, x: Tensor) -> Bound:
    """The next normal number of the precision of x below `bound`: what is above it is at least the bound."""
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
    """The least and the greatest level: numbers, but on a GPU, which would have to be waited for."""
    low, high = codes[0] * step, codes[1] * step
    return (low, high) if step.is_cuda else (low.item(), high.item())


# --- walking -------------------------------------------------------------------------------------------------------


def chunk_size(x: Tensor) -> int:
    """Elements of a chunk: as many as keep every thread of a CPU busy; on a GPU all."""
    return x.numel() if x.is_cuda else CHUNK * torch.get_num_threads()


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces (n,) of dense tensors of one layout, in the order of memory."""
    size = max(1, chunk_size(tensors[0]))
    return zip(*(torch.split(torch.as_strided(t, (t.numel(),), (1,)), size) for t in tensors), strict=True)


def dense(x: Tensor) -> Tensor:
    """x itself if its elements fill their memory, else a copy that does."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def like(g: Tensor, x: Tensor) -> Tensor:
    """g in the layout of x, which is dense."""
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


def total(shares: list[Tensor]) -> Tensor:
    """The sum () of chunks' sums, in float64."""
    return torch.stack(shares).double().sum().to(shares[0].dtype)
