"""Range regularization of a network, as gradients that are added to `.grad` after the backward pass.

What R is of one layer, each regularizer says (`range_penalties.py`, and whatever else is registered); here it comes to
every layer, to each column of vectors apart, with the parameters that it learns. The loss is
task + strength * sum over layers of R.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from r2cli import registry
from r2cli.errors import InputError
from r2cli.graph.structure import float_weight
from r2cli.train.range_penalties import RangePenalty
from r2cli.train.range_penalties import RegularizerSpec as RegularizerSpec


class Regularizer:
    """One regularizer on every convolution and linear weight of a model.

    `parameters` holds what it learns, M (one a column of a layer) or alpha (one a layer) for example, by weight name;
    the optimizer updates them.
    """

    def __init__(self, setting: RegularizerSpec, model: nn.Module) -> None:
        self.own: RangePenalty = registry.load(registry.REGULARIZERS, setting.name)
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
        """Add the penalty's gradients to `.grad` of weights and parameters; returns strength * R, a scalar."""
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
                self.parameters[name].grad = strength * slope
            total = total.to(value.device) + strength * value
        return total

    @torch.no_grad()
    def after_step(self) -> None:
        """What comes after the optimizer's step, to each column of vectors apart as the penalty does."""
        if self.own.after_step is not None:
            for w in self.weights.values():
                for column in columns(w.detach(), self.setting.dim):
                    self.own.after_step(column, self.setting.strength)

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
    if regularizer.once is not None:
        more, its_slope = regularizer.once(own)
        value, slope = value + more, slope + its_slope
    if least is not None:  # on the floor a parameter may only rise
        slope = torch.where(own > least, slope, slope.clamp(max=0))
    return value, slope


def _by_parameter(slopes: Sequence[Tensor], count: int) -> Tensor:
    """The columns' slopes () as those of `count` parameters: one a column, or one for all."""
    each = torch.stack(list(slopes))
    return each if len(each) == count else each.sum(0, keepdim=True)


def columns(w: Tensor, dim: int) -> list[Tensor]:
    """The `dim` columns of `palette.to_vectors`' full blocks as views of `w` that can be written through.

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
