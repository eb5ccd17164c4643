"""BatchNorm in evaluation is y = factor * x + shift: folding it, its sign, and channels that never vary."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from r2cli.graph.edit import bypass
from r2cli.graph.operators import NORMS, NormModule
from r2cli.graph.structure import Layer, layer_module, named_layers, norm_module, norm_statistics
from r2cli.quantized.channels import per_channel
from r2cli.quantized.value_counts import usable

# A channel with less variance than this share of its BatchNorm's epsilon varies by less than a hundredth of gamma.
DEAD = 1e-4


def make_factors_positive(net: fx.GraphModule) -> None:
    """Negate filters, mean and gamma of every channel whose BatchNorm would negate it: the same function; in place."""
    for layer, module in named_layers(net):
        norm = norm_module(net, layer)
        if norm is None or norm.weight is None:
            continue
        with torch.no_grad():
            sign = torch.where(norm.weight < 0, -1.0, 1.0)
            for part in (module.bias, norm.running_mean, norm.weight):
                if part is not None:
                    part.mul_(sign)
            module.weight.mul_(per_channel(sign, module.weight.ndim))


@torch.no_grad()
def divide_filters(net: fx.GraphModule, layer: Layer, by: Tensor) -> None:
    """Divide the filters of a layer that has a norm, `by` (channels,) > 0, which the norm makes up for; in place.

    The same function, epsilon included. The scale behind a palette has a factor for every such channel in any case.
    """
    module, norm = layer_module(net, layer.name), norm_module(net, layer)
    assert norm is not None and norm.weight is not None
    running_mean, running_var = norm_statistics(norm)
    by, variance = by.double(), running_var.double()
    after = variance / by.square()
    norm.weight.mul_(by * ((after + norm.eps) / (variance + norm.eps)).sqrt())
    running_var.copy_(after)
    running_mean.div_(by)
    module.weight.div_(per_channel(by, module.weight.ndim))
    if module.bias is not None:
        module.bias.div_(by)


def remove_norms(net: fx.GraphModule) -> dict[str, Tensor]:
    """Take every BatchNorm that follows a layer out of the graph, its shift into the layer's bias.

    Returns the factor that is left to apply to each such layer's output channels, (channels,) float64 and >= 0, by the
    layer's name: `folded` multiplies it into the weights, `folded_scale` into the scale of their grid (the same codes
    and function).
    A channel whose factor would be negative has its filter negated first, so no code needs a sign that its grid lacks.
    """
    factors = {}
    for layer, module in list(named_layers(net)):
        norm = norm_module(net, layer)
        if norm is None:
            continue
        factor, shift = affine(norm)
        if module.bias is not None:
            shift = shift + factor * module.bias.detach().double()
        with torch.no_grad():
            module.weight[factor < 0] *= -1
        module.bias = nn.Parameter(shift.float())
        factors[layer.name] = factor.abs()
        bypass(net, next(node for node in net.graph.nodes if node.target == layer.norm))
    net.delete_all_unused_submodules()
    net.recompile()
    return factors


def affine(norm: NormModule) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation as y = factor * x + shift: two (channels,) float64."""
    running_mean, running_var = norm_statistics(norm)
    factor = 1 / torch.sqrt(running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -factor * running_mean.double()
    return factor, (shift if norm.bias is None else shift + norm.bias.detach().double())


def folded(weight: Tensor, factor: Tensor | None) -> Tensor:
    """`weight` (channels, ...) with the factor (channels,) that `remove_norms` left: float32; itself without one."""
    return weight if factor is None else (weight.double() * per_channel(factor, weight.ndim)).float()


def folded_scale(scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The scale () or (channels,) of a grid or palette with that factor (channels,): as it is used, and exact.

    Where the factor is zero, so is the exact scale; the used one is the least that is of use, and what is left of the
    channel is 1e-5 of the others. Both float32 (channels,).
    """
    exact = (scale.double() * factor).float()
    return usable(exact), exact


def dead(norm: NormModule) -> Tensor:
    """Which channels never vary, (channels,) bool: folding would multiply their filters by some 300."""
    return norm_statistics(norm)[1] < DEAD * norm.eps


def make_dead_channels_constant(net: fx.GraphModule, *, keep_filters: bool = False) -> dict[str, int]:
    """Give beta, the BatchNorm's shift, in all channels whose output never varies; in place.

    Such a channel's variance is far below the BatchNorm's epsilon, so folding would multiply its filter by some 300,
    and one grid per tensor would go to a channel that says nothing. Its filter is set to zero, and the mean to what the
    layer then gives, which is its bias. With `keep_filters` gamma is set to zero instead: that is for filters whose
    codes are chosen already. Returns how many channels of each layer were made constant.
    """
    made = {}
    for layer, module in named_layers(net):
        norm = norm_module(net, layer)
        if norm is None or (keep_filters and norm.weight is None):
            continue
        constant = dead(norm)
        if not bool(constant.any()):
            continue
        if keep_filters:
            norm.weight[constant] = 0.0
        else:
            module.weight[constant] = 0.0
            norm_statistics(norm)[0][constant] = 0.0 if module.bias is None else module.bias[constant]
        made[layer.name] = int(constant.sum())
    return made


def lower_quiet_channels(net: fx.GraphModule) -> dict[str, int]:
    """Lower the gamma of channels of little variance until, folded, they are no larger than the others; in place.

    Less variance than the BatchNorm's epsilon means a factor that epsilon alone decides, up to 300, on a channel whose
    output hardly varies. Its mean stays what it was; it varies less. Returns how many were lowered, by layer.
    """
    lowered = {}
    for layer, module in named_layers(net):
        norm = norm_module(net, layer)
        if norm is None or norm.weight is None:
            continue
        factor, _ = affine(norm)
        reach = factor.abs() * module.weight.detach().flatten(1).abs().amax(1).double()
        quiet = norm_statistics(norm)[1] < norm.eps
        if bool(quiet.all()):
            continue
        limit = reach[~quiet].amax()
        high = quiet & (reach > limit)
        if bool(high.any()):
            norm.weight[high] *= (limit / reach[high]).float()
            lowered[layer.name] = int(high.sum())
    return lowered


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the statistics of every BatchNorm to those of `batches` of images, each weighing the same; in place.

    Weights that were rounded give other means and variances than those that the statistics were collected with. All
    else runs as in evaluation, and the model is left in it.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain average
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
