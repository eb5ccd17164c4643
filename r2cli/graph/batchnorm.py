"""BatchNorm, which in evaluation is y = factor * x + shift: its folding, its sign, and channels that never vary."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from r2cli.graph.edit import bypass
from r2cli.graph.operators import NORMS, NormModule
from r2cli.graph.structure import Layer, layer_module, named_layers, norm_module, norm_statistics
from r2cli.quantized.channels import per_channel
from r2cli.quantized.value_counts import usable
from r2cli.storage.input_spec import Given, places

# A channel with less variance than this share of its BatchNorm's epsilon varies, after the BatchNorm, by less than a
# hundredth of gamma: sqrt(1e-4).
DEAD = 1e-4


def make_factors_positive(net: fx.GraphModule) -> None:
    """Negate filter, bias, mean and gamma of every channel whose gamma is negative; in place. The function stays.

    A negative factor cannot go into a scale, and codes need not have their negatives on the grid: -8 to 7 at 4 bits.
    """
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
    """Divide the filters of a layer that has a norm by `by` (channels,) > 0, and let the norm make up for it; in place.

    The function stays the same, with epsilon too. It costs nothing in a file: the scale behind a palette has a factor
    for every channel of such a layer anyway.
    """
    module, norm = layer_module(net, layer.name), norm_module(net, layer)
    assert norm is not None and norm.weight is not None
    running_mean, running_var = norm_statistics(norm)
    by, variance = by.double(), running_var.double()
    after = variance / by.square()
    # The variance shrinks and epsilon does not, so gamma takes up the difference.
    norm.weight.mul_(by * ((after + norm.eps) / (variance + norm.eps)).sqrt())
    running_var.copy_(after)
    running_mean.div_(by)
    module.weight.div_(per_channel(by, module.weight.ndim))
    if module.bias is not None:
        module.bias.div_(by)


def remove_norms(net: fx.GraphModule) -> dict[str, Tensor]:
    """Take every BatchNorm that follows a layer out of the graph, and put its shift into the bias of the layer.

    Returns the factors that are still to be applied to the output channels, (channels,) float64 and >= 0, by the name
    of the layer. `folded` multiplies them into the weights; `folded_scale` multiplies them into the scales of grids,
    which keeps the codes. The filter of a channel with a negative factor is negated, so that the factor can be a scale.
    """
    factors = {}
    for layer, module in list(named_layers(net)):
        norm = norm_module(net, layer)
        if norm is None:
            continue
        factor, shift = affine(norm)
        if module.bias is not None:  # the BatchNorm multiplied the bias too
            shift = shift + factor * module.bias.detach().double()
        with torch.no_grad():
            module.weight[factor < 0] *= -1
        module.bias = nn.Parameter(shift.float())
        factors[layer.name] = factor.abs()
        for node in [node for node in net.graph.nodes if node.target == layer.norm]:
            bypass(net, node)
    net.delete_all_unused_submodules()
    net.recompile()
    return factors


def affine(norm: NormModule) -> tuple[Tensor, Tensor]:
    """Return factor and shift, (channels,) float64 each, of a BatchNorm in evaluation: y = factor * x + shift."""
    running_mean, running_var = norm_statistics(norm)
    # float64: a variance near 0 gives factors in the hundreds, and the folded network must be the same to float32.
    factor = 1 / torch.sqrt(running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -factor * running_mean.double()
    return factor, (shift if norm.bias is None else shift + norm.bias.detach().double())


def folded(weight: Tensor, factor: Tensor | None) -> Tensor:
    """Return `weight` (channels, ...) times the factor (channels,) of `remove_norms`, float32; the same without one."""
    return weight if factor is None else (weight.double() * per_channel(factor, weight.ndim)).float()


def folded_scale(scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale of a grid or palette, () or (channels,), times the factor (channels,): as it is used, and exact.

    Both are float32 (channels,). If the factor is 0, so is the exact scale. The used scale must be above 0: it is then
    the least that fits a bias into int32, and leaves of the channel about 1e-5 of the others.
    """
    exact = (scale.double() * factor).float()
    return usable(exact), exact


def dead(norm: NormModule) -> Tensor:
    """Return which channels never vary, (channels,) bool."""
    return norm_statistics(norm)[1] < DEAD * norm.eps


def make_dead_channels_constant(net: fx.GraphModule, *, keep_filters: bool = False) -> dict[str, int]:
    """Let every channel whose output never varies give a constant, its BatchNorm's beta; in place.

    The variance of such a channel is far below epsilon. So its factor is gamma / sqrt(epsilon), some 300 times gamma,
    and after folding its filter, which computes nothing, would have the largest weights of the layer. The filter is set
    to zero, and the mean to what the layer then gives, which is its bias. With `keep_filters` gamma is set to zero
    instead, for filters whose codes are chosen already. Returns how many channels were made constant, by layer.
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
            # With the mean at what the layer gives, the BatchNorm's output is exactly beta.
            norm_statistics(norm)[0][constant] = 0.0 if module.bias is None else module.bias[constant]
        made[layer.name] = int(constant.sum())
    return made


def lower_quiet_channels(net: fx.GraphModule) -> dict[str, int]:
    """Lower gamma in channels of little variance until their folded weights are no larger than the others'; in place.

    If the variance of a channel is less than epsilon, epsilon decides its factor, which can be some 300, although its
    output hardly varies. The mean of the channel stays what it was, and it varies less: this changes the function a
    little. Returns how many channels were lowered, by layer.
    """
    lowered = {}
    for layer, module in named_layers(net):
        norm = norm_module(net, layer)
        if norm is None or norm.weight is None:
            continue
        factor, _ = affine(norm)
        reach = factor.abs() * module.weight.detach().flatten(1).abs().amax(1).double()
        quiet = norm_statistics(norm)[1] < norm.eps
        if bool(quiet.all()):  # no other channel says what is usual
            continue
        limit = reach[~quiet].amax()
        high = quiet & (reach > limit)
        if bool(high.any()):
            norm.weight[high] *= (limit / reach[high]).float()
            lowered[layer.name] = int(high.sum())
    return lowered


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Given]) -> None:
    """Set the statistics of every BatchNorm to the average over the values of `batches` of images (n, ...); in place.

    Rounded weights give other means and variances than the weights that the statistics were collected with. Everything
    else, such as dropout, runs as in evaluation, and the model is in evaluation mode afterwards.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    hooks = [norm.register_forward_pre_hook(_by_values()) for norm in norms]
    for images in batches:
        model(*places(images))
    # Training goes on with its own momentum.
    for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
        norm.momentum = momentum
        norm.eval()
        hook.remove()


def _by_values() -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return what a BatchNorm does before each batch, so that every value counts alike, however long the batch is.

    Of a channel's only value, as a last batch of one image has it, there is no variance: that batch is normalized by
    what was found so far, and is not counted.
    """
    seen = 0

    def before(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        nonlocal seen
        assert isinstance(norm, NORMS)
        count = given[0].numel() // given[0].shape[1]
        norm.train(count > 1)
        if norm.training:
            if not seen:
                norm.reset_running_stats()
            seen += count
            norm.momentum = count / seen  # the share of this batch in the average

    return before
