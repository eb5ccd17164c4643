"""Cross-layer equalization and high-bias absorption: change weights so that one grid per tensor loses less.

The network computes the same function afterwards.

Paper: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), sections 4.1 and
4.2 and appendix B. If a ReLU is between two layers, channel i of the first can be divided by s_i, and that of the
second multiplied by it:

    s_i = sqrt(r1_i / r2_i)         r1_i = max|W1[i, :]|,  r2_i = max|W2[:, i]|

Both ranges are sqrt(r1_i r2_i) then. A depthwise layer between two others has the same channels as both: all ranges of
such a run become their geometric mean at once. The runs are repeated until nothing changes. A channel that a layer does
not use keeps s = 1: its range is 0, or next to nothing beside its bias, whose values would grow with it.

Absorption: if x before the ReLU is N(beta, gamma^2) and c = max(0, beta - 3|gamma|), then ReLU(x) = c + ReLU(x - c),
except for one value in 740. So c can move from the first bias, through the weights, to the second bias.

Where we differ from the paper: ReLU6 stays exact, with a bound of 6 / s for each channel (channel_clip.py). The second
layer may have any groups. Nothing is absorbed into a layer with zero padding: its borders would change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from r2cli.graph import channel_clip, operators, structure
from r2cli.graph.operators import LayerModule
from r2cli.graph.transposed import TransposedConv
from r2cli.ptq.batchnorm_statistics import Normal
from r2cli.quantized.channels import per_channel

CONVERGED = 1e-3  # stop after a pass whose largest |ln s| is below this: a change of 0.1 %
PASSES = 200  # stop after this many passes in any case
NOTHING = 2.0**-12  # of its bias: weights up to this change a channel by less than a step of 8 bits
ABSORBED = 3.0  # standard deviations between the mean and what is absorbed, as in the paper

RELU6: tuple[Any, ...] = (F.relu6,)
RELUS: tuple[Any, ...] = (F.relu,)
# f(s x) = s f(x) for s > 0 in each channel, and f(x + c) = f(x) + c where x and c are positive.
SHIFTED: tuple[Any, ...] = (
    *(*RELUS, channel_clip.Clip, F.leaky_relu, nn.PReLU, F.max_pool1d, F.max_pool2d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
)
# Only f(s x) = s f(x) holds for these: they average zeros of padding too.
SCALED: tuple[Any, ...] = (*SHIFTED, F.avg_pool1d, F.avg_pool2d)
FLATTEN: tuple[Any, ...] = (torch.flatten,)


@dataclass(frozen=True)
class Link:
    """A layer, the only layer that reads its output, and the nodes between them, in order."""

    first: structure.Layer
    second: structure.Layer
    between: tuple[fx.Node, ...]


def links(net: fx.GraphModule) -> dict[str, Link]:
    """Return the links of `net` whose channels can be scaled, by the name of their first layer."""
    weights = [module.weight for _, module in structure.named_layers(net)]
    found = {}
    usable = {layer.node: layer for layer in structure.layers(net) if _stands_alone(net, layer, weights)}
    for layer in usable.values():
        between = []
        # Only single readers: what a residual sum reads too must not be scaled for one of them.
        node = structure.only_user(structure.node_of(net, layer))
        while node is not None and operators.is_a(net, node, (*SCALED, *RELU6, *FLATTEN)):
            between.append(node)
            node = structure.only_user(node)
        second = usable.get(node.name) if node is not None else None
        if second is not None and _channels_match(net, layer, second, between):
            found[layer.name] = Link(layer, second, tuple(between))
    return found


def runs(net: fx.GraphModule) -> list[list[Link]]:
    """Join links that follow each other through depthwise layers, which have the same channels at both ends."""
    joined = links(net)
    # Row i and column i of a depthwise weight are the same filter: its range counts once for the links on both sides.
    inner = {
        link.second.name for link in joined.values() if _is_depthwise(structure.layer_module(net, link.second.name))
    }
    found = []
    for name, link in joined.items():
        if name in inner:
            continue
        run = [link]
        while run[-1].second.name in inner and run[-1].second.name in joined:
            run.append(joined[run[-1].second.name])
        found.append(run)
    return found


@torch.no_grad()
def equalize(net: fx.GraphModule, factors: dict[str, Tensor], normals: dict[str, Normal]) -> dict[str, str]:
    """Equalize all runs of `net`, in place. Its BatchNorms are removed already. The function stays the same.

    `factors` are scales of layers that are not in their weights (`batchnorm.remove_norms`), and `normals` are the
    statistics of their outputs. Both are changed accordingly. Returns a note for each layer that was scaled, by name.
    """
    found = runs(net)
    reach = reaches(net, found, factors)
    total: dict[str, Tensor] = {}
    # On the ranges alone: each pass would otherwise read and write all weights, which are scaled once, at the end.
    for _ in range(PASSES):
        largest = 0.0
        for run in found:
            for link, s in zip(run, scales(run, reach), strict=True):
                first, second = reach[link.first.name], reach[link.second.name]
                first /= s.reshape(first.shape[0], -1, 1)
                second *= s.reshape(second.shape[0], 1, -1)
                total[link.first.name] = s * total.get(link.first.name, torch.ones_like(s))
                largest = max(largest, float(s.log().abs().max()))
        if largest < CONVERGED:
            break
    for run in found:
        for link in run:
            _scale(net, link, total[link.first.name], factors)
    bounds: dict[str, Tensor] = {}
    notes = {}
    for run in found:
        for link in run:
            s = total[link.first.name]
            notes[link.first.name] = f"equalized, 1/s {float(1 / s.max()):.2g} to {float(1 / s.min()):.2g}"
            if link.first.name in normals:
                # What is divided by s has a mean and a deviation divided by s: absorption and correction rely on it.
                own = normals[link.first.name]
                normals[link.first.name] = Normal(own.mean / s.cpu(), own.std / s.cpu())
            bounds |= {node.name: (6 / s).float().cpu() for node in link.between if operators.is_a(net, node, RELU6)}
    channel_clip.put(net, bounds)
    return notes


@torch.no_grad()
def absorb(net: fx.GraphModule, normals: dict[str, Normal]) -> dict[str, str]:
    """Move the part of each bias that a ReLU almost never cuts to the bias of the next layer, in place.

    The weights of `net` are folded. The means in `normals` change accordingly. Returns a note with the number of
    channels for each layer, by name.
    """
    notes = {}
    for name, link in links(net).items():
        first, second = structure.layer_module(net, name), structure.layer_module(net, link.second.name)
        whole = all(operators.is_a(net, node, (*SHIFTED, *FLATTEN)) for node in link.between) and not _pads(second)
        # Known statistics are needed, and both biases: one gives up what the other takes.
        if name not in normals or first.bias is None or second.bias is None or not whole:
            continue
        own = normals[name]
        high = (own.mean - ABSORBED * own.std).clamp(min=0).to(first.weight.device)
        clips = _bounds(net, link)
        for one in clips:  # more than the bound cannot be absorbed: the clip never lets it pass
            high = torch.minimum(high, one.high.double())
        if not bool(high.any()):
            continue
        # The values are lower by `high` now, and so is the bound that cuts them.
        for one in clips:
            one.high.copy_((one.high.double() - high).float())
        weight = by_channel(second, len(high)).double()
        first.bias -= high.float()
        second.bias += torch.einsum("goik,gi->go", weight, high.reshape(len(weight), -1)).flatten().float()
        normals[name] = Normal(own.mean - high.cpu(), own.std)
        notes[name] = f"{int((high > 0).sum())} of {len(high)} high biases absorbed"
    return notes


def without_relu6(net: fx.GraphModule) -> int:
    """Replace every ReLU6 by ReLU, in place. This changes the function. Returns how many were replaced."""
    found = [node for node in net.graph.nodes if operators.is_a(net, node, RELU6)]
    channel_clip.put(net, {node.name: torch.tensor(channel_clip.NEVER) for node in found})
    return len(found)


def scales(run: Sequence[Link], reach: Mapping[str, Tensor]) -> list[Tensor]:
    """Return s for every link of a run, (channels,) float64: it makes all ranges equal to their geometric mean.

    `reach` has, for each layer, the greatest |w| between an input and an output, (groups, outputs, inputs of a group).
    """
    ranges = [reach[run[0].first.name].amax(2).flatten(), *(reach[link.second.name].amax(1).flatten() for link in run)]
    stacked = torch.stack(ranges)  # (layers, channels)
    mean = stacked.log().mean(0).exp()
    found, s = [], torch.ones_like(mean)
    for own in ranges[:-1]:
        s = s * own / mean  # the inputs of each layer have been multiplied by the s before it
        # A channel that is 0 somewhere has no range to equalize: s would be 0, infinite or NaN.
        found.append(torch.where((stacked > 0).all(0) & s.isfinite() & (s > 0), s, 1.0))
    return found


def reaches(net: fx.GraphModule, found: Sequence[Sequence[Link]], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the `reach` of every layer in the runs."""
    reach: dict[str, Tensor] = {}
    links = [link for run in found for link in run]
    # The inputs of a linear layer after a flatten are grouped by the channels before it.
    inputs = {link.second.name: _outputs(net, link.first) for link in links}
    for name in {layer.name for link in links for layer in (link.first, link.second)}:
        module = structure.layer_module(net, name)
        channels = inputs.get(name, module.weight.shape[1] * _groups(module))
        own = by_channel(module, channels).abs().amax(3).double()
        if name in factors:
            own = own * factors[name].to(own.device).reshape(own.shape[0], -1, 1)
        if module.bias is not None:
            bias = module.bias.abs().double().reshape(own.shape[0], -1, 1)
            own = own.where(own.amax(2, keepdim=True) > NOTHING * bias, 0.0)
        reach[name] = own
    return reach


def _outputs(net: fx.GraphModule, layer: structure.Layer) -> int:
    """Return the number of output channels of a layer."""
    return int(structure.layer_module(net, layer.name).weight.shape[0])


def by_channel(module: LayerModule, channels: int) -> Tensor:
    """Return a layer's weight as (groups, outputs, inputs, positions of one input channel)."""
    groups, weight = _groups(module), module.weight
    return weight.reshape(groups, weight.shape[0] // groups, channels // groups, -1)


def _scale(net: fx.GraphModule, link: Link, s: Tensor, factors: dict[str, Tensor]) -> None:
    """Divide the channels of a link's first layer by `s` (channels,) and multiply what reads them; in place."""
    first, second = structure.layer_module(net, link.first.name), structure.layer_module(net, link.second.name)
    if link.first.name in factors:
        factors[link.first.name] = factors[link.first.name] / s.to(factors[link.first.name].device)
    else:
        first.weight.copy_((first.weight.double() / per_channel(s, first.weight.ndim)).float())
    if first.bias is not None:
        first.bias.copy_((first.bias.double() / s).float())
    for one in _bounds(net, link):
        one.high.copy_((one.high.double() / s).float())
    parts = by_channel(second, len(s)).double()
    second.weight.copy_((parts * s.reshape(len(parts), 1, -1, 1)).reshape(second.weight.shape).float())


def _bounds(net: fx.GraphModule, link: Link) -> list[channel_clip.Clip]:
    """Return the clips of a link that have a bound for each channel."""
    modules = [operators.module_of(net, node) for node in link.between]
    return [module for module in modules if isinstance(module, channel_clip.Clip) and module.high.ndim]


def _groups(module: LayerModule) -> int:
    return 1 if isinstance(module, operators.MATRICES) else module.groups


def _is_depthwise(module: LayerModule) -> bool:
    return not isinstance(module, operators.MATRICES) and module.groups == module.in_channels == module.out_channels


def _pads(module: LayerModule) -> bool:
    """Return whether a layer reads zeros around its input."""
    if isinstance(module, TransposedConv):  # its outputs at the edge have fewer inputs than the others
        return True
    return not isinstance(module, operators.MATRICES) and any(module._reversed_padding_repeated_twice)


def _stands_alone(net: fx.GraphModule, layer: structure.Layer, weights: Sequence[Any]) -> bool:
    """Return whether the layer runs once, and no other layer has its weights: scaling would change the other too."""
    own = structure.layer_module(net, layer.name).weight
    calls = sum(node.target == layer.name for node in net.graph.nodes)
    return calls == 1 and sum(weight is own for weight in weights) == 1


def _channels_match(
    net: fx.GraphModule, first: structure.Layer, second: structure.Layer, between: Sequence[fx.Node]
) -> bool:
    """Return whether the inputs of the second layer are the channels of the first one, each of them in one piece."""
    one, other = structure.layer_module(net, first.name), structure.layer_module(net, second.name)
    flattened = any(operators.is_a(net, node, FLATTEN) for node in between)
    if not isinstance(other, nn.Linear):
        return not isinstance(one, nn.Linear) and not flattened
    if isinstance(one, nn.Linear):
        # Pools and bounds for (n, channels, ...) do not fit (n, ..., channels).
        return not flattened and all(operators.is_a(net, node, (*RELUS, F.leaky_relu)) for node in between)
    return flattened and all(_from_channels_on(node) for node in between if operators.is_a(net, node, FLATTEN))


def _from_channels_on(node: fx.Node) -> bool:
    """Return whether a flatten joins all axes except the batch, of an image or a row of values."""
    return node.args[1:] in ((1, 2), (1, 3))
