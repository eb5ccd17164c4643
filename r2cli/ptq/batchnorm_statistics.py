"""Statistics of a network's values without data: in each channel, the output of a BatchNorm is N(beta, gamma^2).

Paper: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2.1 and
appendix C (the mean behind a ReLU), section 5 (ranges of beta plus or minus 6 gamma).

Where we differ from the paper: the statistics are carried through the graph, so that residual networks need no data
either.

- A sum has the sum of the means, and of the variances, as if its parts were independent. A ReLU treats it as normal.
  Its range is the mean plus or minus 6 deviations, within the sum of the ranges.
- A pooled value keeps the mean, deviation and range of its input. The mean of a maximum is higher, so bias correction
  after a max pooling corrects only a part.
- The image has the range that its normalisation gives, and mean 0, because normalisation is made for that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from r2cli.errors import InputError
from r2cli.graph import batchnorm, operators, placement, structure
from r2cli.graph.channel_clip import Clip
from r2cli.storage.input_spec import NetworkInput

DEVIATIONS = 6.0  # a range reaches this many deviations from the mean on each side, as in the paper

SUMS: tuple[Any, ...] = (torch.add,)
POOLS: tuple[Any, ...] = (
    *(F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
)
FLATTEN: tuple[Any, ...] = (torch.flatten, torch.reshape)


@dataclass(frozen=True)
class Normal:
    """Mean and standard deviation of each output channel of a layer before its activation: (channels,) float64."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class ValueStatistics:
    """The statistics of a value of the graph for each channel: (channels,) float64."""

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor


def statistics(net: fx.GraphModule) -> dict[str, Normal]:
    """Give the statistics after the BatchNorm of each layer that has one, by name. Call it before their removal."""
    found = {}
    for layer in structure.layers(net):
        norm = structure.norm_module(net, layer)
        if norm is None:
            continue
        variance = structure.norm_statistics(norm)[1].double()
        ones = torch.ones_like(variance)
        # |gamma|, because a deviation has no sign: with a negative one, the mean behind a ReLU would come out wrong.
        gamma = ones if norm.weight is None else norm.weight.detach().double().abs()
        mean = 0 * ones if norm.bias is None else norm.bias.detach().double()
        # Because of epsilon, a channel of little variance has less than gamma, and one without variance is a constant.
        std = torch.where(batchnorm.dead(norm), 0.0, gamma * (variance / (variance + norm.eps)).sqrt())
        found[layer.name] = Normal(mean.clone(), std)
    return found


def rectified(mean: Tensor, std: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of clip(x, 0, most) for x of N(mean, std^2): any shape, float64. `most` may be inf.

    With a = -mean / std, z = (most - mean) / std, and pdf and cdf of N(0, 1), the mean is
    std (pdf(a) - pdf(z)) + mean (cdf(z) - cdf(a)) + most (1 - cdf(z)): appendix C, for a ReLU and for a ReLU6.
    """
    spread = std.clamp(min=1e-30)  # a constant channel has std 0; so a and z are huge instead of 0 / 0
    a, z = -mean / spread, (most - mean) / spread
    # Infinity times pdf(infinity) = 0 would be NaN, and so would infinity times 1 - cdf = 0.
    z_finite = z.clamp(max=1e15)
    inside = _cdf(z) - _cdf(a)
    above = torch.where(most.isinf(), 0.0, 1 - _cdf(z))
    bound = torch.where(most.isinf(), 0.0, most)
    first = spread * (_pdf(a) - _pdf(z)) + mean * inside + bound * above
    tails = a.clamp(-1e15, 1e15) * _pdf(a) - z_finite * _pdf(z)
    second = mean.square() * inside + 2 * mean * spread * (_pdf(a) - _pdf(z)) + spread.square() * (inside + tails)
    second = second + bound.square() * above
    return first, (second - first.square()).clamp(min=0).sqrt()


def _pdf(t: Tensor) -> Tensor:
    return torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)


def _cdf(t: Tensor) -> Tensor:
    # erfc and not 1 + erf, which far below the mean is 1 - 1 with all digits lost.
    return 0.5 * torch.erfc(-t / math.sqrt(2))


@torch.no_grad()
def values(net: fx.GraphModule, normals: Mapping[str, Normal], spec: NetworkInput) -> dict[str, ValueStatistics]:
    """Return the statistics of all nodes' values by name, for images of `spec`. BatchNorms are removed already."""
    structure.propagate(net, spec.shape)
    known: dict[str, ValueStatistics] = {}
    for node in net.graph.nodes:
        value = _value(net, node, normals, known, spec)
        if value is not None:
            known[node.name] = value
    return known


def ranges(
    net: fx.GraphModule, normals: Mapping[str, Normal], spec: NetworkInput, *, result: bool = False
) -> dict[str, tuple[float, float]]:
    """Return the (least, greatest) value of each node that needs a grid, as `placement.values` says.

    Raises InputError for one that is unknown.
    """
    known = values(net, normals, spec)
    found = {}
    for name in placement.values(net, spec.shape, result=result):
        if name not in known:
            raise InputError(
                f"the range of the value '{name}' is not known without data, because no BatchNorm gives its "
                "statistics: give --data, or --act-bits none"
            )
        found[name] = float(known[name].low.min()), float(known[name].high.max())
    return found


def _value(
    net: fx.GraphModule,
    node: fx.Node,
    normals: Mapping[str, Normal],
    known: Mapping[str, ValueStatistics],
    spec: NetworkInput,
) -> ValueStatistics | None:
    """Return the statistics of the value of `node`; None for an operation through which they are not known."""
    if node.op == "placeholder" and not spec.mean:
        return None
    if node.op == "placeholder":  # pixels from 0 to 1, normalised
        mean, std = torch.tensor(spec.mean).double(), torch.tensor(spec.std).double()
        return ValueStatistics(torch.zeros_like(mean), torch.ones_like(mean), -mean / std, (1 - mean) / std)
    if node.op == "call_module" and str(node.target) in normals:
        own = normals[str(node.target)]
        return ValueStatistics(own.mean, own.std, own.mean - DEVIATIONS * own.std, own.mean + DEVIATIONS * own.std)
    sources = [source.name for source in node.all_input_nodes if source.target not in operators.SHAPES]
    read = [known[name] for name in sources if name in known]
    if not read or len(read) < len(sources):  # one unknown input makes the value unknown
        return None
    first = read[0]
    if operators.is_a(net, node, operators.ACTIVATIONS):
        return _clipped(first, _most(net, node, first))
    # A sum with a number, such as x + 1, is left unknown.
    if operators.is_a(net, node, SUMS) and len(node.args) == 2 and all(isinstance(part, fx.Node) for part in node.args):
        return _sum(first, read[-1])
    if operators.is_a(net, node, POOLS):
        return first
    if operators.is_a(net, node, FLATTEN):
        return _flat(node, first)
    # Along the channels, each part keeps its own statistics.
    if node.target is torch.cat and 1 in (*node.args[1:], *node.kwargs.values()):
        parts = [known[str(part)] for part in node.args[0]]  # type: ignore[union-attr]
        return ValueStatistics(
            *(torch.cat([getattr(p, name) for p in parts]) for name in ("mean", "std", "low", "high"))
        )
    return None


def _most(net: fx.GraphModule, node: fx.Node, value: ValueStatistics) -> Tensor:
    """Return the upper bounds of the activation at `node`, (channels,)."""
    module = operators.module_of(net, node)
    if isinstance(module, Clip):
        return module.high.double().cpu()
    six = operators.is_a(net, node, (F.relu6,))
    return torch.full_like(value.mean, 6.0 if six else torch.inf)


def _clipped(value: ValueStatistics, most: Tensor) -> ValueStatistics:
    mean, std = rectified(value.mean, value.std, most)
    return ValueStatistics(mean, std, value.low.clamp(min=0), torch.minimum(value.high.clamp(min=0), most))


def _sum(one: ValueStatistics, other: ValueStatistics) -> ValueStatistics:
    """Return the statistics of a sum, as if its parts were independent: variances add up, and deviations do not."""
    mean, std = one.mean + other.mean, (one.std.square() + other.std.square()).sqrt()
    low = torch.maximum(one.low + other.low, mean - DEVIATIONS * std)
    return ValueStatistics(mean, std, low, torch.minimum(one.high + other.high, mean + DEVIATIONS * std))


def _flat(node: fx.Node, value: ValueStatistics) -> ValueStatistics | None:
    """Turn (n, channels, h, w) into (n, channels * h * w). Returns None for any other change of shape."""
    shape: tuple[int, ...] = getattr(node.meta.get("tensor_meta"), "shape", ())
    if len(shape) != 2 or shape[0] != 2 or shape[1] % len(value.mean):
        return None
    parts = (value.mean, value.std, value.low, value.high)
    return ValueStatistics(*(part.repeat_interleave(shape[1] // len(value.mean)) for part in parts))
