"""Range regularization of a network, as gradients that are added to `.grad` after the backward pass.

Each regularizer says what R is for one layer (`range_penalties.py`, and other packages). Here it is applied to every
layer, and to each column of vectors separately, with the parameters that it learns. The loss is
task + strength * sum over layers of R.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from r2cli import registry
from r2cli.errors import InputError
from r2cli.graph.structure import float_weight
from r2cli.graph.transposed import TransposedConv
from r2cli.train.range_penalties import RangePenalty
from r2cli.train.range_penalties import RegularizerSpec as RegularizerSpec


class Regularizer:
    """One regularizer on every convolution and linear weight of a model.

    `parameters` has what it learns, by the name of the weight: for example M, one per column of a layer, or alpha, one
    per layer. The optimizer updates them. Raises InputError for a strength that makes no sense, and for vectors longer
    than a layer has channels.
    """

    def __init__(self, setting: RegularizerSpec, model: nn.Module) -> None:
        self.own: RangePenalty = registry.load(registry.REGULARIZERS, setting.name)
        if not 0 <= setting.strength < math.inf:
            raise InputError(f"a strength of {setting.strength} is impossible: give 0 or more")
        self.own.require(setting.strength)
        self.setting = setting
        self.weights = regularized(model)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, w in self.weights.items():
            if setting.dim > w.shape[0]:
                raise InputError(f"--reg-dim {setting.dim} is more than the {w.shape[0]} output channels of '{name}'")
            if self.own.start is not None:
                self.parameters[name] = nn.Parameter(self.own.start(columns(w.detach(), setting.dim)))

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Add the gradients of the penalty to `.grad` of weights and parameters. Returns strength * R ()."""
        strength = self.setting.strength
        total = torch.zeros((), dtype=torch.float64)
        if self.own.reference is None and self.own.kernel is None:
            return total
        for name, w in self.weights.items():
            if w.grad is None:  # a layer that the loss does not reach
                w.grad = torch.zeros_like(w)
            if w.grad.stride() != w.stride():  # both are walked in memory's order
                w.grad = torch.empty_like(w).copy_(w.grad)
            value, slope = penalty(w, self.parameters.get(name), w.grad, strength, self.setting)
            if name in self.parameters:
                self.parameters[name].grad = strength * slope  # set and not added: the loss does not reach it
            total = total.to(value.device) + strength * value
        return total

    @torch.no_grad()
    def after_step(self) -> None:
        """Do what the regularizer does after the optimizer's step, to each column of vectors separately."""
        if self.own.after_step is not None:
            for w in self.weights.values():
                for column in columns(w.detach(), self.setting.dim):
                    self.own.after_step(column, self.setting.strength)

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """Move weights and parameters by -`rate` times the gradients of the penalty. Returns strength * R ().

        What was in `.grad` is lost.
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
    """Return R () of one weight and dR/dparameter, and add strength * dR/dw to `grad`.

    R is summed over the `dim` columns of the weight's vectors. With dim 1 the only column is the weight itself. If
    `dim` does not divide the channels, those that are left over are not regularized. `parameter` has one number per
    column, or one for all, and its slope has the same shape.
    """
    regularizer: RangePenalty = registry.load(registry.REGULARIZERS, setting.name)
    own = w.new_zeros(1) if parameter is None else parameter.detach()
    least = regularizer.least if setting.stable else None
    if least is not None:
        own = own.clamp(min=least)
    value = torch.zeros((), dtype=torch.float64, device=w.device)
    slopes = []
    for index, (column, column_grad) in enumerate(
        zip(columns(w.detach(), setting.dim), columns(grad, setting.dim), strict=True)
    ):
        part, slope = regularizer.term(column, own[index if len(own) > 1 else 0], column_grad, strength, setting)
        value += part
        slopes.append(slope)
    slope = _by_parameter(slopes, len(own))
    # exp(-alpha) belongs to the layer: added in every column, it would count `dim` times.
    if regularizer.once is not None:
        more, its_slope = regularizer.once(own)
        value, slope = value + more, slope + its_slope
    if least is not None:  # on the floor a parameter may only rise
        slope = torch.where(own > least, slope, slope.clamp(max=0))
    return value, slope


def _by_parameter(slopes: Sequence[Tensor], count: int) -> Tensor:
    """Return the slopes () of the columns as those of `count` parameters: one per column, or one for all."""
    each = torch.stack(list(slopes))
    return each if len(each) == count else each.sum(0, keepdim=True)


def columns(w: Tensor, dim: int) -> list[Tensor]:
    """Return the `dim` columns of the vectors of `w` (channels, ...) as views, which can be written to.

    Column j is every `dim`-th output channel from j on: (channels // dim, elements of a filter), or (elements,) for dim
    1. So the columns are of the vectors that `palette.to_vectors` makes for a palette, without a last block that is
    not full.
    """
    if w.ndim == 4 and not w.is_contiguous():
        w = w.permute(0, 2, 3, 1)  # channels last: dense in this order
    if dim == 1:
        return [w.view(-1)]
    whole = w.shape[0] // dim * dim
    return [w[:whole].view(whole, -1)[j::dim] for j in range(dim)]


def regularized(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that range regularization acts on, by name: those of all convolutions and linear layers.

    The first and the last layer are among them, as in the paper. A weight that two layers share is there once, and one
    that is frozen, because it requires no gradient, is not.
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | TransposedConv):
            weight = float_weight(module)
            if weight.requires_grad and all(weight is not other for other in found.values()):
                found[f"{name}.weight"] = weight
    return found
