"""Range regularizers, as closed-form gradients that are added to `.grad` after the backward pass.

Paper: "R^2: Range Regularization for Model Compression and Quantization" (arXiv 2303.08253), equations 1 to 3, and
Shkolnik et al., "Robust Quantization" (KURE, 2020). The loss is task + strength * sum over layers.

Each regularizer is one function of a weight's elements. It returns its value and the derivative of its own learnable
parameter, and adds `strength * dR/dw` to `grad`: autograd would build, keep and walk a graph over every weight at every
step, which costs up to three times a small step. Weights are walked in chunks that stay in cache.

Where we differ: in the stable form the margin's own gradient is clamped to [-strength, strength] (as written it is
minus the number of weights outside, and throws M out of the layer), and soft-min-max's exponent is in units of the
layer's standard deviation (as written, a layer of small weights never gets beyond a weak variance penalty) and at least
1: what alone keeps alpha up is exp(-alpha), and in layers of large weights, or of vectors, it would come to rest below
zero, where softmax picks the other end and the penalty drives the ends apart.

`clip` is the baseline that they are compared with, and no penalty: weights are clamped after every optimizer step.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from r2cli.errors import InputError, unknown
from r2cli.graph.structure import float_weight

CHUNK = 65536  # elements: five fp32 temporaries of this size fit a core's L2 cache
KURE_TARGET = 1.8  # the kurtosis of the uniform distribution
ALPHA_START = 0.1
ALPHA_LEAST = 1.0  # the least exponent of the stable soft-min-max, for weights in units of their deviation
MARGIN_START = 2.0  # standard deviations of the initial weights
CLIP = "clip"
CLIP_AT = 2.0  # deviations: where the margin starts, between what L-inf (1.7) and KURE (2.5) leave of digits' networks


class Term(Protocol):
    def __call__(
        self, w: Tensor, parameter: Tensor, grad: Tensor, strength: float, setting: "RegularizerSpec"
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class RegularizerSpec:
    """What to add to the loss: `strength` is lambda; `dim` is the vector length of a later palette (1: scalars).

    For clip, which adds nothing, `strength` is the number of deviations that weights are clamped to.
    """

    name: str
    strength: float
    stable: bool = True
    dim: int = 1
    margin_k: int = 1


def linf(
    w: Tensor, parameter: Tensor, grad: Tensor, strength: float, setting: RegularizerSpec
) -> tuple[Tensor, Tensor]:
    """R = max |w| (equation 1). Tied maxima share the gradient. No parameter."""
    chunks = list(_chunks(w, grad))
    tops = [torch.maximum(-low, high) for low, high in (torch.aminmax(c) for c, _ in chunks)]
    top = torch.stack(tops).amax()
    # On a CPU a look at the number is free and skips nearly every chunk; a GPU has one chunk and needs no look.
    hit = [chunk for chunk, own in zip(chunks, tops, strict=True) if len(chunks) == 1 or bool(own == top)]
    masks = [c.abs() == top for c, _ in hit]
    count = torch.stack([mask.sum() for mask in masks]).sum()
    for (c, g), mask in zip(hit, masks, strict=True):
        g.add_(torch.sign(c) * mask / count, alpha=strength)
    return top, torch.zeros_like(parameter)


def margin(
    w: Tensor, parameter: Tensor, grad: Tensor, strength: float, setting: RegularizerSpec
) -> tuple[Tensor, Tensor]:
    """R = |M| + (1/k) * sum max(|w| - |M|, 0) (equation 2, the sum over the hinge only; k = 1 unless `margin_k`)."""
    m = parameter.abs()
    outside = torch.zeros((), dtype=torch.float64, device=w.device)
    hinge = torch.zeros((), dtype=torch.float64, device=w.device)
    for c, g in _chunks(w, grad):
        direction = torch.sign(c).mul_(c.abs() > m)
        g.add_(direction, alpha=strength / setting.margin_k)
        count = direction.abs().sum()
        outside += count
        hinge += (c * direction).sum() - m * count
    value = m + hinge / setting.margin_k
    slope = torch.sign(parameter) * (1 - outside / setting.margin_k)
    return value, (slope.clamp(-1, 1) if setting.stable else slope).to(parameter.dtype)


def soft_minmax(
    w: Tensor, parameter: Tensor, grad: Tensor, strength: float, setting: RegularizerSpec
) -> tuple[Tensor, Tensor]:
    """R = <softmax(alpha w), w> - <softmax(-alpha w), w> (equation 3 without its exp(-alpha), added once a layer)."""
    unit = _deviation(w) if setting.stable else torch.ones((), dtype=torch.float64, device=w.device)
    # A filter driven to a constant has no deviation: any exponent then gives uniform weights and a range of zero.
    alpha = parameter / torch.where(unit > 0, unit, 1.0).to(parameter.dtype)
    low, high = torch.aminmax(w)
    sums = torch.zeros(2, 3, dtype=torch.float64, device=w.device)  # of 1, u, u^2 under p and q
    for c, _ in _chunks(w, grad):
        for row, (sign, extreme) in enumerate(((1, high), (-1, low))):
            u = c - extreme
            p = torch.exp(sign * alpha * u)
            sums[row] += torch.stack([p.sum(), (p * u).sum(), (p * u * u).sum()])
    mean = sums[:, 1] / sums[:, 0]  # of u: distance from the extreme, so the variance below does not cancel
    variance = sums[:, 2] / sums[:, 0] - mean**2
    s_max, s_min = high + mean[0], low + mean[1]
    top, bottom = s_max.to(w.dtype), s_min.to(w.dtype)
    scale = (strength / sums[:, 0]).to(w.dtype)
    for c, g in _chunks(w, grad):
        p = torch.exp(alpha * (c - high)).mul_(scale[0])
        q = torch.exp(alpha * (low - c)).mul_(scale[1])
        g.add_(p.mul_(1 + alpha * (c - top))).sub_(q.mul_(1 - alpha * (c - bottom)))
    slope = variance.sum() / torch.where(unit > 0, unit, 1.0)
    return s_max - s_min, slope.to(parameter.dtype)


def kure(
    w: Tensor, parameter: Tensor, grad: Tensor, strength: float, setting: RegularizerSpec
) -> tuple[Tensor, Tensor]:
    """R = (mean(((w - mean) / std)^4) - 1.8)^2, std biased. No parameter; a constant tensor costs 0.

    KURE's authors average over layers, so that a strength of ours is theirs divided by the number of layers.
    """
    mean, std = w.mean(dtype=torch.float64), _deviation(w)
    inverse = torch.where(std > 0, 1 / std, 0.0)
    cubes = torch.zeros(2, dtype=torch.float64, device=w.device)  # sums of z^3 and z^4
    for c, _ in _chunks(w, grad):
        z = (c - mean.to(w.dtype)).mul_(inverse.to(w.dtype))
        cube = z * z * z
        cubes += torch.stack([cube.sum(), (cube * z).sum()])
    third, fourth = cubes / w.numel()
    factor = strength * 2 * (fourth - KURE_TARGET) * 4 * inverse / w.numel()
    for c, g in _chunks(w, grad):
        z = (c - mean.to(w.dtype)).mul_(inverse.to(w.dtype))
        slope = (z * z).sub_(fourth.to(w.dtype)).mul_(z).sub_(third.to(w.dtype))
        g.add_(slope.mul_(factor.to(w.dtype)))
    value = torch.where(std > 0, (fourth - KURE_TARGET) ** 2, 0.0)
    return value, torch.zeros_like(parameter)


def clip(w: Tensor, strength: float) -> None:
    """Clamp `w`, of any shape and in place, to `strength` deviations from zero on both sides.

    The deviation is the root mean square, which is the standard deviation where the mean is zero: the symmetric grid of
    a later quantizer is centred on zero, and a filter that is constant stays as it is.
    """
    bound = strength * w.square().mean().sqrt()
    w.clamp_(-bound, bound)


REGULARIZERS: Mapping[str, Term] = {"linf": linf, "margin": margin, "soft-minmax": soft_minmax, "kure": kure}


class Regularizer:
    """One regularizer on every convolution and linear weight of a model.

    `parameters` holds M (one a column of a layer) or alpha (one a layer), by weight name; the optimizer updates them.
    """

    def __init__(self, setting: RegularizerSpec, model: nn.Module) -> None:
        if setting.name not in (*REGULARIZERS, CLIP):
            raise unknown("regularizer", setting.name, ["none", *REGULARIZERS, CLIP])
        if setting.name == CLIP and setting.strength < 1:
            raise InputError(
                f"--reg-weight {setting.strength:g} is below one deviation, so that clip would shrink all weights to "
                "nothing: give 1 or more"
            )
        self.setting = setting
        self.weights = regularized(model)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, w in self.weights.items():
            if setting.dim > w.shape[0]:
                raise InputError(f"--reg-dim {setting.dim} is more than the {w.shape[0]} output channels of '{name}'")
            if setting.name == "margin":
                start = MARGIN_START * torch.stack([column.std() for column in columns(w.detach(), setting.dim)])
            elif setting.name == "soft-minmax":
                start = torch.full((1,), ALPHA_START, device=w.device, dtype=w.dtype)
            else:
                continue
            self.parameters[name] = nn.Parameter(start)

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Add the penalty's gradients to `.grad` of weights and parameters; returns strength * R, a scalar."""
        strength = self.setting.strength
        total = torch.zeros((), dtype=torch.float64)
        if self.setting.name == CLIP:
            return total
        for name, w in self.weights.items():
            if w.grad is None:  # a layer that the loss does not reach
                w.grad = torch.zeros_like(w)
            if w.grad.stride() != w.stride():  # both are walked in memory's order
                w.grad = torch.empty_like(w).copy_(w.grad)
            value, slope = penalty(w, self.parameters.get(name), w.grad, strength, self.setting)
            if name in self.parameters:
                self.parameters[name].grad = strength * slope
            total = total.to(value.device) + strength * value
        return total

    @torch.no_grad()
    def after_step(self) -> None:
        """What comes after the optimizer's step: clip clamps the weights, per column of vectors as the others do."""
        if self.setting.name == CLIP:
            for w in self.weights.values():
                for column in columns(w.detach(), self.setting.dim):
                    clip(column, self.setting.strength)

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """Move weights and parameters by -`rate` times the penalty's gradients alone; returns strength * R, a scalar.

        What is in `.grad` is lost.
        """
        for w in self.weights.values():
            if w.grad is not None:
                w.grad.zero_()
        total = self.add_gradients()
        for moved in (*self.weights.values(), *self.parameters.values()):
            if moved.grad is not None:
                moved.sub_(moved.grad, alpha=rate)
        return total


def penalty(
    w: Tensor, parameter: Tensor | None, grad: Tensor, strength: float, setting: RegularizerSpec
) -> tuple[Tensor, Tensor]:
    """One weight's R, summed over the `dim` columns of its vectors, and dR/dparameter; adds strength * dR/dw to `grad`.

    For dim 1 the column is the weight itself. Channels left over when `dim` does not divide them are not regularized.
    """
    term = REGULARIZERS[setting.name]
    own = w.new_zeros(1) if parameter is None else parameter.detach()
    floored = setting.name == "soft-minmax" and setting.stable
    if floored:
        own = own.clamp(min=ALPHA_LEAST)
    value = torch.zeros((), dtype=torch.float64, device=w.device)
    slopes = []
    for index, (column, column_grad) in enumerate(
        zip(columns(w.detach(), setting.dim), columns(grad, setting.dim), strict=True)
    ):
        part, slope = term(column, own[index if len(own) > 1 else 0], column_grad, strength, setting)
        value += part
        slopes.append(slope)
    if setting.name != "soft-minmax":
        return value, torch.stack(slopes)
    slope = torch.stack(slopes).sum(0, keepdim=True) - torch.exp(-own)
    if floored:  # on the floor alpha may only rise
        slope = torch.where(own > ALPHA_LEAST, slope, slope.clamp(max=0))
    return value + torch.exp(-own[0]), slope


def columns(w: Tensor, dim: int) -> list[Tensor]:
    """The `dim` columns of `codec.to_vectors`' full blocks as views of `w` that can be written through.

    Column j is every `dim`-th output channel from j: (channels // dim, elements of a filter); for dim 1, (elements,).
    """
    if w.ndim == 4 and not w.is_contiguous():
        w = w.permute(0, 2, 3, 1)  # channels last: dense in this order
    if dim == 1:
        return [w.view(-1)]
    whole = w.shape[0] // dim * dim
    return [w[:whole].view(whole, -1)[j::dim] for j in range(dim)]


def regularized(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that range regularization acts on: all convolutions' and linear layers', first and last included."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            found[f"{name}.weight"] = float_weight(module)
    return found


def default_strength(name: str, *, size: int, images: int) -> float:
    """The paper's 0.01 for ImageNet-size training; for small images what measured best (`--reg-weight` overrides)."""
    if name == CLIP:
        return CLIP_AT
    small = {"linf": 0.1, "margin": 0.1 if images < 10_000 else 0.03, "soft-minmax": 0.1, "kure": 0.01}
    return small[name] if size <= 64 else 0.01


def _deviation(w: Tensor) -> Tensor:
    """Biased standard deviation, float64."""
    if not w.numel():
        return torch.tensor(math.nan)
    low, high = torch.aminmax(w)  # the rounded variance of a constant is not always 0
    return torch.where(low < high, w.var(correction=0).to(torch.float64).sqrt(), 0.0)


def _chunks(w: Tensor, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching views of `w` and `grad` that stay in a core's cache; the whole at once on a GPU."""
    rows = max(1, CHUNK // math.prod(w.shape[1:])) if w.device.type == "cpu" else max(1, w.shape[0])
    return zip(torch.split(w, rows), torch.split(grad, rows), strict=True)
