"""The network's graph, read once with torch.fx: which layers hold weights, which BatchNorm follows, where values flow.

Weights are changed on the modules, so parameter names never change. A value on an edge is known by the name of the node
that produces it, so that a checkpoint finds its edges again.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from r2cli.errors import InputError, unknown
from r2cli.graph.operators import ACTIVATIONS, LAYERS, NORMS, SHAPES, LayerModule, NormModule, is_a, module_of

T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer: its module's path, its node's name, and the BatchNorm that alone reads it."""

    name: str
    node: str
    norm: str | None

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"


def propagate(net: fx.GraphModule, shape: tuple[int, ...]) -> None:
    """Note the shape and type of every value in the graph, `tensor_meta`, for two inputs of `shape`.

    Two, so that nothing mistakes the batch for a dimension of size one.
    """
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    given = next(node for node in net.graph.nodes if node.op == "placeholder")
    with torch.no_grad():
        ShapeProp(net).propagate(torch.zeros(2, *shape, device=device, dtype=given.meta.get("dtype")))


def layers(net: fx.GraphModule) -> list[Layer]:
    """The layers with weights, in the order in which they run; one that runs twice is listed once, without a norm."""
    calls: dict[str, list[fx.Node]] = {}
    for node in net.graph.nodes:
        if isinstance(module_of(net, node), LAYERS):
            calls.setdefault(node.target, []).append(node)
    found = []
    for name, nodes in calls.items():
        norm = only_user(nodes[0]) if len(nodes) == 1 else None
        own = str(norm.target) if norm is not None and _follows(net, norm) else None
        found.append(Layer(name, nodes[0].name, own))
    return found


def weighted(model: nn.Module, *, embeddings: bool) -> dict[str, nn.Module]:
    """The modules of `model` that hold weights to compress, by name, in no graph's order: its layers, and its
    `embeddings` where they are wanted.

    Raises InputError where there is none of what is wanted, and for attention whose weights are in no layer.
    """
    kinds = (*LAYERS, nn.Embedding) if embeddings else LAYERS
    found: dict[str, nn.Module] = {n: module for n, module in model.named_modules() if isinstance(module, kinds)}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise InputError(f"the weights of the attention '{name}' are in no layer: use linear layers there")
    if embeddings and not any(isinstance(module, nn.Embedding) for module in found.values()):
        raise InputError(f"{type(model).__name__} has no embeddings: leave --embeddings out")
    if not found:
        raise InputError(f"{type(model).__name__} has no convolution or linear layer")
    return found


def by_pattern(names: Iterable[str], usual: T, exceptions: Mapping[str, T]) -> dict[str, T]:
    """What every layer gets: `usual`, or that of the last pattern that it matches.

    Raises InputError for a pattern that no layer matches.
    """
    known = list(names)
    found = dict.fromkeys(known, usual)
    for pattern, own in exceptions.items():
        matched = [name for name in known if fnmatchcase(name, pattern)]
        if not matched:
            raise unknown("layer in --keep", pattern, known)
        found |= dict.fromkeys(matched, own)
    return found


def bound(net: fx.GraphModule, node: fx.Node) -> float | None:
    """What the ReLU that alone reads `node` clips at: infinity, or 6 for ReLU6; None where none does."""
    user = only_user(node)
    if user is None or not is_a(net, user, ACTIVATIONS):
        return None
    return 6.0 if is_a(net, user, (F.relu6,)) else torch.inf


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads the value of `node`; None if there are more, or none."""
    users = [user for user in node.users if user.target not in SHAPES]
    return users[0] if len(users) == 1 else None


def _follows(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a BatchNorm with statistics that runs once."""
    norm = module_of(net, node)
    once = sum(other.target == node.target for other in net.graph.nodes) == 1
    return isinstance(norm, NORMS) and norm.running_var is not None and once


def node_of(net: fx.GraphModule, layer: Layer) -> fx.Node:
    """The node that runs `layer`."""
    found: fx.Node = next(node for node in net.graph.nodes if node.name == layer.node)
    return found


# --- modules, typed ------------------------------------------------------------------------------------------------


def named_layers(net: fx.GraphModule) -> Iterator[tuple[Layer, LayerModule]]:
    """The layers with their modules, in the order in which they run."""
    for layer in layers(net):
        yield layer, layer_module(net, layer.name)


def layer_module(net: nn.Module, name: str) -> LayerModule:
    """The module of the layer called `name`."""
    module = net.get_submodule(name)
    assert isinstance(module, LAYERS), name
    return module


def norm_module(net: nn.Module, layer: Layer) -> NormModule | None:
    """The BatchNorm, with statistics, behind `layer`; None where none follows."""
    if layer.norm is None:
        return None
    norm = net.get_submodule(layer.norm)
    assert isinstance(norm, NORMS), layer.norm
    return norm


def norm_statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The running mean and variance of a BatchNorm, (channels,) each: its own buffers."""
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
    return mean, variance


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer or an embedding, as it computes with it: (output channels, ...)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a layer, (output channels,); None where it has none."""
    return module.bias if isinstance(module.bias, Tensor) else None


def float_weight(module: nn.Module) -> nn.Parameter:
    """The weight that is trained: the one behind a quantizer or palette that stands before it, or the layer's own."""
    learned = parametrize.is_parametrized(module, "weight")
    weight = module.parametrizations.weight.original if learned else module.weight  # type: ignore[union-attr]
    assert isinstance(weight, nn.Parameter)
    return weight
