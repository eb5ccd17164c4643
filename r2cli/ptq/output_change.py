"""How much the network's outputs change when one layer alone is rounded: a sensitivity that needs no labels.

The float network runs once, and all its values are kept. For each layer and each width only what lies behind the layer
runs again, with the rounded weight, or with the rounded input. What is measured is the deviation of the outputs, as a
share of their size: |y' - y| / |y|. Deviations are added up over layers, and not their squares, which grow so fast with
few bits that a layer would get many where the sum of all others counts. Divergences of class probabilities hardly see
small changes of a network that is sure of itself (benchmarks/mixed.md).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from r2cli.calibration import calibrate, deployed, observers
from r2cli.calibration.observers import Observer
from r2cli.errors import InputError
from r2cli.ptq import layer_sweep
from r2cli.quantized.decibels import noises
from r2cli.storage.input_spec import Given, Shape, count, places, split

IMAGES = 128  # at most
BATCH = 64


@dataclass(frozen=True)
class TriedRounding:
    """A layer that is rounded: its weight (outputs, ...), or what it reads, by a function; None is as it is."""

    weight: Tensor | None = None
    reads: Callable[[Tensor], Tensor] | None = None


Tried = Mapping[str, Mapping[Any, TriedRounding]]  # by the layer's name, and by what is tried


@torch.no_grad()
def measure(net: fx.GraphModule, tried: Tried, images: Iterable[Given], shape: Shape) -> dict[str, dict[Any, float]]:
    """Return, for each layer and each way to round it that is `tried`, the share by which the outputs of `net` change.

    `images` are batches of inputs of `shape` on the device of `net`. Raises InputError where there is no image.
    """
    found = {name: dict.fromkeys(own, 0.0) for name, own in tried.items()}
    behind = {name: _behind(net, name) for name in tried}
    size, seen = min(BATCH, layer_sweep.images_that_fit(net, shape)), 0
    for given in images:
        for part in split(given, size):
            values = _values(net, part)
            expected = _results(net, values)
            for name, own in tried.items():
                for key, rounded in own.items():
                    outputs = _again(net, name, rounded, values, behind[name])
                    found[name][key] += float(noises(outputs, expected).sum())
            seen += count(part)
        if seen >= IMAGES:
            break
    if not seen:
        raise InputError(
            "what a layer changes at the outputs needs images, and there are none: give --sensitivity sqnr"
        )
    return {name: {key: math.sqrt(each / seen) for key, each in own.items()} for name, own in found.items()}


def _values(net: fx.GraphModule, given: Given) -> dict[fx.Node, Any]:
    """What every node of the float network gives."""
    values: dict[fx.Node, Any] = {}
    inputs = iter(places(given))
    for node in net.graph.nodes:
        if node.op != "output":
            values[node] = next(inputs) if node.op == "placeholder" else layer_sweep.run(net, node, values)
    return values


def _behind(net: fx.GraphModule, name: str) -> list[fx.Node]:
    """The nodes that call the layer, or depend on it, in order."""
    reached: dict[fx.Node, None] = {}
    for node in net.graph.nodes:
        own = node.op == "call_module" and str(node.target) == name
        if node.op != "output" and (own or any(source in reached for source in node.all_input_nodes)):
            reached[node] = None
    return list(reached)


def _again(
    net: fx.GraphModule, name: str, rounded: TriedRounding, values: dict[fx.Node, Any], behind: Iterable[fx.Node]
) -> tuple[Tensor, ...]:
    """The outputs where the layer is rounded."""
    now = dict(values)
    for node in behind:
        if node.op != "call_module" or str(node.target) != name:
            now[node] = layer_sweep.run(net, node, now)
            continue
        given = tuple(now[source] for source in node.all_input_nodes)
        given = given if rounded.reads is None else tuple(map(rounded.reads, given))
        state = {} if rounded.weight is None else {"weight": rounded.weight}
        now[node] = torch.func.functional_call(net.get_submodule(name), state, given)
    return _results(net, now)


def _results(net: fx.GraphModule, values: Mapping[fx.Node, Any]) -> tuple[Tensor, ...]:
    return tuple(values[node] for node in net.graph.output_node().all_input_nodes)


def _told(observer: Observer) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, given: Any) -> None:
        observer(given[0])

    return hook


@torch.no_grad()
def input_grids(
    net: fx.GraphModule, names: Iterable[str], images: Iterable[Given], widths: Iterable[int]
) -> dict[str, dict[int, Callable[[Tensor], Tensor]]]:
    """Return, for each named layer and each of `widths`, what rounds the values that the layer reads to such a grid."""
    watch = {name: observers.observer(observers.usual(min(widths, default=8)))() for name in names}
    hooks = [net.get_submodule(name).register_forward_pre_hook(_told(own)) for name, own in watch.items()]
    seen = 0
    for given in images:
        net(*places(given))
        seen += count(given)
        if seen >= IMAGES:
            break
    for hook in hooks:
        hook.remove()
    device = next(net.parameters()).device
    return {
        name: {
            bits: deployed.FakeQuantize(calibrate.activation_grid(*own.range(bits), bits)).to(device) for bits in widths
        }
        for name, own in watch.items()
    }
