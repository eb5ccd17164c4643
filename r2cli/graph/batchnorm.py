"""BatchNorm in evaluation is y = factor * x + shift: folding it, its sign, and channels that never vary."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from r2cli.graph.edit import bypass
from r2cli.graph.operators import LAYERS, NORMS
from r2cli.graph.structure import Layer, layers, named_layers

# A channel with less variance than this share of its BatchNorm's epsilon varies by less than a hundredth of gamma.
DEAD = 1e-4


def make_factors_positive(net: fx.GraphModule) -> None:
    """Negate filters, mean and gamma of every channel whose BatchNorm would negate it: the same function; in place."""
    for layer, module in named_layers(net):
        norm = net.get_submodule(layer.norm) if layer.norm else None
        if norm is None or norm.weight is None:
            continue
        assert isinstance(norm, NORMS) and norm.running_mean is not None and isinstance(module, LAYERS)
        with torch.no_grad():
            sign = torch.where(norm.weight < 0, -1.0, 1.0)
            for part in (module.bias, norm.running_mean, norm.weight):
                if part is not None:
                    part.mul_(sign)
            module.weight.mul_(sign.reshape(-1, *[1] * (module.weight.ndim - 1)))


@torch.no_grad()
def divide_filters(net: fx.GraphModule, layer: Layer, by: Tensor) -> None:
    """Divide the filters of a layer that has a norm, `by` (channels,) > 0, which the norm makes up for; in place.

    The same function, epsilon included. The scale behind a palette has a factor for every such channel in any case.
    """
    module, norm = net.get_submodule(layer.name), net.get_submodule(layer.norm or "")
    assert isinstance(module, LAYERS) and isinstance(norm, NORMS)
    assert norm.weight is not None and norm.running_mean is not None and norm.running_var is not None
    by, variance = by.double(), norm.running_var.double()
    after = variance / by.square()
    norm.weight.mul_(by * ((after + norm.eps) / (variance + norm.eps)).sqrt())
    norm.running_var.copy_(after)
    norm.running_mean.div_(by)
    module.weight.div_(by.reshape(-1, *[1] * (module.weight.ndim - 1)))
    if module.bias is not None:
        module.bias.div_(by)


def remove_norms(net: fx.GraphModule) -> dict[str, Tensor]:
    """Take every BatchNorm that follows a layer out of the graph, its shift into the layer's bias.

    Returns the factor that is left to apply to each such layer's output channels, (channels,) float64 and >= 0, by the
    layer's name: multiply it into the weights (folding) or into the scale of their grid (the same codes and function).
    A channel whose factor would be negative has its filter negated first, so no code needs a sign that its grid lacks.
    """
    factors = {}
    for layer in layers(net):
        if layer.norm is None:
            continue
        module, norm = net.get_submodule(layer.name), net.get_submodule(layer.norm)
        assert isinstance(module, LAYERS) and isinstance(norm, NORMS)
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


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation as y = factor * x + shift: two (channels,) float64."""
    assert isinstance(norm, NORMS) and norm.running_mean is not None and norm.running_var is not None
    factor = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -factor * norm.running_mean.double()
    return factor, (shift if norm.bias is None else shift + norm.bias.detach().double())


def dead(norm: nn.Module) -> Tensor:
    """Which channels never vary, (channels,) bool: folding would multiply their filters by some 300."""
    assert isinstance(norm, NORMS) and norm.running_var is not None
    return norm.running_var < DEAD * norm.eps


def silence_dead_channels(net: fx.GraphModule) -> dict[str, int]:
    """Set filters to zero whose output never varies, their constant into the BatchNorm's shift; in place.

    Such a channel's variance is far below the BatchNorm's epsilon, so folding would multiply its filter by some 300,
    and one grid per tensor would go to a channel that says nothing. Returns how many were silenced, by layer.
    """
    silenced = {}
    for layer, module in named_layers(net):
        if layer.norm is None:
            continue
        norm = net.get_submodule(layer.norm)
        assert isinstance(norm, NORMS) and norm.running_var is not None and norm.running_mean is not None
        assert isinstance(module, LAYERS)
        silent = dead(norm)
        if bool(silent.any()):
            module.weight[silent] = 0.0
            # The layer now gives its bias alone: shift the mean so that the output stays at beta.
            norm.running_mean[silent] = 0.0 if module.bias is None else module.bias[silent]
            silenced[layer.name] = int(silent.sum())
    return silenced


def lower_quiet_channels(net: fx.GraphModule) -> dict[str, int]:
    """Lower the gamma of channels of little variance until, folded, they are no larger than the others; in place.

    Less variance than the BatchNorm's epsilon means a factor that epsilon alone decides, up to 300, on a channel whose
    output hardly varies. Its mean stays what it was; it varies less. Returns how many were lowered, by layer.
    """
    lowered = {}
    for layer, module in named_layers(net):
        norm = net.get_submodule(layer.norm) if layer.norm else None
        if norm is None or norm.weight is None:
            continue
        assert isinstance(norm, NORMS) and norm.running_var is not None and isinstance(module, LAYERS)
        factor, _ = affine(norm)
        folded = factor.abs() * module.weight.detach().flatten(1).abs().amax(1).double()
        quiet = norm.running_var < norm.eps
        if bool(quiet.all()):
            continue
        limit = folded[~quiet].amax()
        high = quiet & (folded > limit)
        if bool(high.any()):
            norm.weight[high] *= (limit / folded[high]).float()
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
