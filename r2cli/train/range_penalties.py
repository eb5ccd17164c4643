"""The range regularizers: the penalty R of one layer's weights, as a formula and as a fast kernel.

Papers: "R^2: Range Regularization for Model Compression and Quantization" (arXiv 2303.08253), equations 1 to 3, for
L-inf, margin and soft-min-max; Shkolnik et al., "Robust Quantization" (2020), for KURE. The loss is
task + strength * sum over layers of R.

The formulas come first, written for autograd. The kernels after them give the same R and the same gradients in closed
form; tests/test_regularizers.py holds the two equal. Autograd would build, keep and walk a graph over every weight at
every step. In units of a plain training step of ResNet-18 with its 224-pixel stem, a step takes, by kernel and by
autograd: L-inf 1.05 and 1.24, margin 1.18 and 1.23, soft-min-max 1.55 and 1.75, KURE 1.33 and 1.71
(benchmarks/regularizers.md). Weights are walked in chunks that stay in cache.

Where we differ, in the stable form:

- The gradient of the margin M is clamped to [-strength, strength]. As written, it is 1 minus the number of weights
  outside, times the strength, and throws M out of the layer's range.
- The exponent of soft-min-max is in units of the layer's standard deviation. As written, alpha comes to rest where a
  layer of small weights has little more than a weak variance penalty.
- That exponent is at least 1. Only exp(-alpha) keeps alpha up. In layers of large weights, or of vectors, alpha would
  come to rest below 0, where each softmax picks the other end, and the penalty drives the ends apart.

`clip` is the baseline that they are compared with. It is no penalty: weights are clamped after every optimizer step.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from r2cli.errors import InputError
from r2cli.quantized import fake_quant

CHUNK = 65536  # elements: five fp32 temporaries of this size fit a core's L2 cache
KURE_TARGET = 1.8  # the kurtosis of the uniform distribution
ALPHA_START = 0.1
ALPHA_LEAST = 1.0  # the least exponent of the stable soft-min-max, for weights in units of their deviation
MARGIN_START = 2.0  # standard deviations of the initial weights


@dataclass(frozen=True)
class RegularizerSpec:
    """What to add to the loss. `strength` is lambda.

    `stable` says whether the regularizer has the changes listed above. `dim` is the length of the vectors of a later
    palette, 1 for scalars. `margin_k` is the k that the margin's hinge is divided by. For clip, which adds nothing to
    the loss, `strength` is the number of standard deviations that weights are clamped to.
    """

    name: str
    strength: float
    stable: bool = True
    dim: int = 1
    margin_k: int = 1


class Kernel(Protocol):
    """Returns R () of the weights `w` (any shape) and dR/dparameter (), and adds strength * dR/dw to `grad`."""

    def __call__(
        self, w: Tensor, parameter: Tensor, grad: Tensor, strength: float, spec: RegularizerSpec
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class RangePenalty:
    """A regularizer: its formula, and whatever else it has of the following.

    - `reference` is R of one column of a layer's weights, for autograd. It is given the column's parameter (), which a
      regularizer without parameters ignores.
    - `kernel` gives the same, with the gradients, in closed form. If it is None, autograd of the reference does.
    - `start` gives the parameter of a layer before training, from its columns: one number per column, or one for all.
    - `once` is added once per layer: it gives its value and its slope by the parameter.
    - `least` is the least value of the parameter in the stable form.
    - `after_step` changes a column in place after the optimizer's step.
    - `require` raises InputError for a strength that makes no sense.
    """

    reference: Callable[[Tensor, Tensor, RegularizerSpec], Tensor] | None = None
    kernel: Kernel | None = None
    start: Callable[[list[Tensor]], Tensor] | None = None
    once: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    least: float | None = None
    after_step: Callable[[Tensor, float], None] | None = None
    require: Callable[[float], None] = lambda strength: None

    def term(
        self, w: Tensor, parameter: Tensor, grad: Tensor, strength: float, spec: RegularizerSpec
    ) -> tuple[Tensor, Tensor]:
        """Return R () of one column `w` and dR/dparameter (), and add strength * dR/dw to `grad`."""
        if self.kernel is not None:
            return self.kernel(w, parameter, grad, strength, spec)
        assert self.reference is not None
        with torch.enable_grad():
            own, number = w.detach().requires_grad_(), parameter.detach().requires_grad_()
            value = self.reference(own, number, spec)
            slopes = torch.autograd.grad(value, (own, number), allow_unused=True, materialize_grads=True)
        grad.add_(slopes[0], alpha=strength)
        return value.detach(), slopes[1]


# --- the formulas --------------------------------------------------------------------------------------------------


def linf_reference(w: Tensor, parameter: Tensor, spec: RegularizerSpec) -> Tensor:
    """R = max |w| (equation 1). amax shares the gradient among weights that are equally large."""
    return w.abs().amax()


def margin_reference(w: Tensor, parameter: Tensor, spec: RegularizerSpec) -> Tensor:
    """R = |M| + (1/k) * sum max(|w| - |M|, 0): equation 2, read with the sum over the hinge only, and k = `margin_k`.

    Least over M it is the mean of the k largest |w|, so that with k = 1 it is L-inf.
    """
    m = parameter.abs()
    return m + (w.abs() - m).clamp_min(0).sum() / spec.margin_k


def soft_minmax_reference(w: Tensor, parameter: Tensor, spec: RegularizerSpec) -> Tensor:
    """R = <softmax(alpha w), w> - <softmax(-alpha w), w>: equation 3 without exp(-alpha), which is added per layer."""
    # Detached: the unit sets how sharp the softmax is, and is no part of the penalty.
    unit = w.std(correction=0).detach() if spec.stable else 1.0
    exponent = (parameter * w / unit).flatten()
    return ((exponent.softmax(0) - (-exponent).softmax(0)) * w.flatten()).sum()


def kure_reference(w: Tensor, parameter: Tensor, spec: RegularizerSpec) -> Tensor:
    """R = (mean(((w - mean) / std)^4) - 1.8)^2, with the biased std, for which the mean is the kurtosis as defined."""
    z = (w - w.mean()) / w.std(correction=0)
    return ((z**4).mean() - KURE_TARGET) ** 2


# --- the kernels ---------------------------------------------------------------------------------------------------


def linf(w: Tensor, parameter: Tensor, grad: Tensor, strength: float, spec: RegularizerSpec) -> tuple[Tensor, Tensor]:
    """Compute `linf_reference`; equal maxima share the gradient. It has no parameter."""
    chunks = list(_chunks(w, grad))
    tops = [torch.maximum(-low, high) for low, high in (torch.aminmax(c) for c, _ in chunks)]
    top = torch.stack(tops).amax()
    # On a CPU a look at the number is free and skips nearly every chunk; a GPU has one chunk and needs no look.
    hit = [chunk for chunk, own in zip(chunks, tops, strict=True) if len(chunks) == 1 or bool(own == top)]
    masks = [c.abs() == top for c, _ in hit]  # exact equality: `top` is one of these numbers
    count = torch.stack([mask.sum() for mask in masks]).sum()
    for (c, g), mask in zip(hit, masks, strict=True):
        g.add_(torch.sign(c) * mask / count, alpha=strength)
    return top, torch.zeros_like(parameter)


def margin(w: Tensor, parameter: Tensor, grad: Tensor, strength: float, spec: RegularizerSpec) -> tuple[Tensor, Tensor]:
    """Compute `margin_reference`; in the stable form the slope of M is clamped."""
    m = parameter.abs()  # training may carry M below 0, and only its size counts
    outside = torch.zeros((), dtype=torch.float64, device=w.device)
    hinge = torch.zeros((), dtype=torch.float64, device=w.device)
    for c, g in _chunks(w, grad):
        direction = torch.sign(c).mul_(c.abs() > m)
        g.add_(direction, alpha=strength / spec.margin_k)
        count = direction.abs().sum()
        outside += count
        hinge += (c * direction).sum() - m * count  # c * sign(c) is |c|, for those outside
    value = m + hinge / spec.margin_k
    # As written it is 1 - (number outside), which may be minus thousands, where M itself is about 0.1.
    slope = torch.sign(parameter) * (1 - outside / spec.margin_k)
    return value, (slope.clamp(-1, 1) if spec.stable else slope).to(parameter.dtype)


def soft_minmax(
    w: Tensor, parameter: Tensor, grad: Tensor, strength: float, spec: RegularizerSpec
) -> tuple[Tensor, Tensor]:
    """Compute `soft_minmax_reference` with sums in float64.

    Exponents are taken from the weights where they are greatest, so that no exponential overflows.
    """
    unit = _deviation(w) if spec.stable else torch.ones((), dtype=torch.float64, device=w.device)
    # A filter driven to a constant has no deviation: any exponent then gives uniform weights and a range of zero.
    alpha = parameter / torch.where(unit > 0, unit, 1.0).to(parameter.dtype)
    low, high = torch.aminmax(w)
    # Where alpha is negative, each softmax picks the other end.
    low, high = torch.where(alpha < 0, high, low), torch.where(alpha < 0, low, high)
    sums = torch.zeros(2, 3, dtype=torch.float64, device=w.device)  # of 1, u, u^2 under p and q
    for c, _ in _chunks(w, grad):
        for row, (sign, extreme) in enumerate(((1, high), (-1, low))):
            u = c - extreme
            p = torch.exp(sign * alpha * u)
            sums[row] += torch.stack([p.sum(), (p * u).sum(), (p * u * u).sum()])
    # Means and variances of u, the distance from the extreme: those of w itself would be differences of large numbers.
    mean = sums[:, 1] / sums[:, 0]
    variance = sums[:, 2] / sums[:, 0] - mean**2
    s_max, s_min = high + mean[0], low + mean[1]
    top, bottom = s_max.to(w.dtype), s_min.to(w.dtype)
    scale = (strength / sums[:, 0]).to(w.dtype)
    for c, g in _chunks(w, grad):
        p = torch.exp(alpha * (c - high)).mul_(scale[0])
        q = torch.exp(alpha * (low - c)).mul_(scale[1])
        # dR/dw = p (1 + alpha (w - s_max)) - q (1 - alpha (w - s_min))
        g.add_(p.mul_(1 + alpha * (c - top))).sub_(q.mul_(1 - alpha * (c - bottom)))
    slope = variance.sum() / torch.where(unit > 0, unit, 1.0)  # dR/dalpha is the sum of both variances
    return s_max - s_min, slope.to(parameter.dtype)


def kure(w: Tensor, parameter: Tensor, grad: Tensor, strength: float, spec: RegularizerSpec) -> tuple[Tensor, Tensor]:
    """Compute `kure_reference`; a constant tensor costs 0. It has no parameter.

    The authors average over layers and we sum, so a strength of ours is one of theirs divided by the number of layers.
    """
    mean, std = w.mean(dtype=torch.float64), _deviation(w)
    inverse = torch.where(std > 0, 1 / std, 0.0)  # a constant tensor has no shape, and gets no gradient
    cubes = torch.zeros(2, dtype=torch.float64, device=w.device)  # sums of z^3 and z^4
    for c, _ in _chunks(w, grad):
        z = (c - mean.to(w.dtype)).mul_(inverse.to(w.dtype))
        cube = z * z * z
        cubes += torch.stack([cube.sum(), (cube * z).sum()])
    third, fourth = cubes / w.numel()
    # dK/dw = 4 / (n std) * (z^3 - mean(z^3) - K z): the mean and the std depend on every weight too.
    factor = strength * 2 * (fourth - KURE_TARGET) * 4 * inverse / w.numel()
    for c, g in _chunks(w, grad):
        z = (c - mean.to(w.dtype)).mul_(inverse.to(w.dtype))
        slope = (z * z).sub_(fourth.to(w.dtype)).mul_(z).sub_(third.to(w.dtype))
        g.add_(slope.mul_(factor.to(w.dtype)))
    value = torch.where(std > 0, (fourth - KURE_TARGET) ** 2, 0.0)
    return value, torch.zeros_like(parameter)


def clip(w: Tensor, strength: float) -> None:
    """Clamp `w` (any shape), in place, to `strength` deviations from zero on both sides.

    The deviation is the root mean square. It equals the standard deviation if the mean is zero, and it is the one to
    use because the symmetric grid of a later quantizer is centred on zero. A constant filter stays as it is.
    """
    bound = strength * w.square().mean().sqrt()
    w.clamp_(-bound, bound)


def _deviation(w: Tensor) -> Tensor:
    """Return the biased standard deviation () of `w`, float64."""
    if not w.numel():
        return torch.tensor(math.nan)
    low, high = torch.aminmax(w)  # the rounded variance of a constant is not always 0
    return torch.where(low < high, w.var(correction=0).to(torch.float64).sqrt(), 0.0)


def _chunks(w: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield matching views of `w` and `grad` that stay in a core's cache; on a GPU all at once."""
    rows = max(1, CHUNK // math.prod(w.shape[1:])) if w.device.type == "cpu" else max(1, w.shape[0])
    return zip(torch.split(w, rows), torch.split(grad, rows), strict=True)


# --- what there is -------------------------------------------------------------------------------------------------


def _require_one(strength: float) -> None:
    """Raise InputError for a strength of clip below 1."""
    # Some weight is always at least one deviation from 0. Clamped below that, all shrink, and so does the deviation.
    if strength < 1:
        raise InputError(
            f"--reg-weight {strength:g} is below one deviation, so that clip would shrink all weights to nothing: give "
            "1 or more"
        )


LINF = RangePenalty(linf_reference, linf)
MARGIN = RangePenalty(
    margin_reference,
    margin,
    start=lambda columns: MARGIN_START * torch.stack([fake_quant.deviation(column) for column in columns]),
)
SOFT_MINMAX = RangePenalty(
    soft_minmax_reference,
    soft_minmax,
    start=lambda columns: columns[0].new_full((1,), ALPHA_START),
    once=lambda alpha: (torch.exp(-alpha[0]), -torch.exp(-alpha)),
    least=ALPHA_LEAST,
)
KURE = RangePenalty(kure_reference, kure)
CLIP = RangePenalty(after_step=clip, require=_require_one)
