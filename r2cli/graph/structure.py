"""The structure of a network's graph: which layers hold weights, which BatchNorm follows them, and what reads a value.

The graph is one of torch.fx. Weights are changed on the modules, so the names of parameters stay. A value is known by
the name of the node that computes it, so that a checkpoint finds its values again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from r2cli.config import layer_form
from r2cli.config.layer_form import LayerForm
from r2cli.errors import InputError, unknown
from r2cli.graph.channel_clip import Clip
from r2cli.graph.operators import ACTIVATIONS, LAYERS, NORMS, SHAPES, LayerModule, NormModule, is_a, module_of
from r2cli.storage.input_spec import Shape

T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """A convolution, a linear layer or a recurrent layer's weight: its path, and the names of its node and BatchNorm.

    `norm` is the BatchNorm that reads the output of the layer, if nothing else reads it; else None.
    """

    name: str
    node: str
    norm: str | None

    @property
    def weight(self) -> str:
        """The name of its weight in the state_dict."""
        return f"{self.name}.weight"


def propagate(net: fx.GraphModule, shape: Shape) -> None:
    """Record the shape and type of every value in the graph, as `tensor_meta`, for a batch of two inputs of `shape`,
    or of the shapes of several.

    The batch is two, so that nothing mistakes it for a dimension of size one.
    """
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    given = [node for node in net.graph.nodes if node.op == "placeholder"]
    shapes: Any = shape if shape and isinstance(shape[0], tuple) else (shape,)
    with torch.no_grad():
        blank = [
            torch.zeros(2, *own, device=device, dtype=node.meta.get("dtype"))
            for node, own in zip(given, shapes, strict=True)
        ]
        ShapeProp(net).propagate(*blank)


def layers(net: fx.GraphModule) -> list[Layer]:
    """Return the layers with weights, in the order in which they run.

    A layer that runs twice is listed once, without a norm unless the same one is behind it each time: two BatchNorms
    cannot go into one weight.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in net.graph.nodes:
        if isinstance(module_of(net, node), LAYERS):
            calls.setdefault(node.target, []).append(node)
    found = []
    for name, nodes in calls.items():
        norms = {only_user(node) for node in nodes}
        norm = next(iter(norms))
        same = len({None if each is None else each.target for each in norms}) == 1
        own = str(norm.target) if same and norm is not None and _follows(net, norm, len(nodes)) else None
        found.append(Layer(name, nodes[0].name, own))
    return found


def weighted(model: nn.Module, *, embeddings: bool) -> dict[str, nn.Module]:
    """Return the modules of `model` with weights to compress, by name: its layers, and with `embeddings` those too.

    It needs no graph, so they are in the order of the modules. Raises InputError if there are none, and for attention
    whose weights are in no layer.
    """
    kinds = (*LAYERS, nn.Embedding) if embeddings else LAYERS
    found: dict[str, nn.Module] = {n: module for n, module in model.named_modules() if isinstance(module, kinds)}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise InputError(f"the weights of the attention '{name}' are in no layer: use linear layers there")
        if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.Bilinear):
            kind = "bilinear" if isinstance(module, nn.Bilinear) else "recurrent"
            raise InputError(
                f"the weights of the {kind} layer '{name}' need the network's graph, which is not read here"
            )
    if embeddings and not any(isinstance(module, nn.Embedding) for module in found.values()):
        raise InputError(f"{type(model).__name__} has no embeddings: leave --embeddings out")
    if not found:
        raise InputError(f"{type(model).__name__} has no convolution or linear layer")
    return found


def forms(names: Iterable[str], keep: Mapping[str, int | str]) -> dict[str, LayerForm]:
    """Return what `keep` says of every layer: all that its patterns say, the last word on a thing from the last one.

    Raises InputError for a pattern that matches no name.
    """
    known = list(names)
    found = dict.fromkeys(known, LayerForm())
    for pattern, words in keep.items():
        found |= {name: found[name].then(layer_form.of(words)) for name in _matched(known, pattern)}
    return found


def by_pattern(names: Iterable[str], usual: T, exceptions: Mapping[str, T]) -> dict[str, T]:
    """Return a value for every name: that of the last pattern of `exceptions` that matches it, else `usual`.

    Raises InputError for a pattern that matches no name.
    """
    known = list(names)
    found = dict.fromkeys(known, usual)
    for pattern, own in exceptions.items():
        found |= dict.fromkeys(_matched(known, pattern), own)
    return found


def _matched(known: Sequence[str], pattern: str) -> list[str]:
    matched = [name for name in known if fnmatchcase(name, pattern)]
    if not matched:
        raise unknown("layer in --keep", pattern, known)
    return matched


def require_groups(name: str, module: nn.Module, size: int) -> None:
    """Raise InputError for groups of `size` inputs in what is neither a linear layer nor an embedding; 0: no groups."""
    if size and not isinstance(module, nn.Linear | nn.Embedding):
        raise InputError(
            f"--group-size {size} is for networks of linear layers, and '{name}' is a {type(module).__name__}: leave "
            "it out"
        )


def bound(net: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """Return the upper bound of the ReLU that reads `node`, (): infinity, or 6 for ReLU6; of a Clip, (channels,).

    Returns None if no ReLU does, or something else reads `node` too.
    """
    user = only_user(node)
    if user is None or not is_a(net, user, ACTIVATIONS):
        return None
    clip = module_of(net, user)
    if isinstance(clip, Clip):
        return clip.high
    return torch.tensor(6.0 if is_a(net, user, (F.relu6,)) else torch.inf)


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the only node that reads the value of `node`; None if there are more, or none."""
    users = [user for user in node.users if user.target not in SHAPES]
    return users[0] if len(users) == 1 else None


def _follows(net: fx.GraphModule, node: fx.Node, count: int) -> bool:
    """Return whether `node` is a BatchNorm that runs `count` times."""
    norm = module_of(net, node)
    as_often = sum(other.target == node.target for other in net.graph.nodes) == count
    return isinstance(norm, NORMS) and as_often


def last_readers(net: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, the values that no later node reads."""
    found: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(net.graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                found.setdefault(node, []).append(source)
    return found


def node_of(net: fx.GraphModule, layer: Layer) -> fx.Node:
    """Return the node that runs `layer`."""
    found: fx.Node = next(node for node in net.graph.nodes if node.name == layer.node)
    return found


# --- modules, typed ------------------------------------------------------------------------------------------------


def named_layers(net: fx.GraphModule) -> Iterator[tuple[Layer, LayerModule]]:
    """Yield the layers with their modules, in the order in which they run."""
    for layer in layers(net):
        yield layer, layer_module(net, layer.name)


def layer_module(net: nn.Module, name: str) -> LayerModule:
    """Return the module of the layer called `name`."""
    module = net.get_submodule(name)
    assert isinstance(module, LAYERS), name
    return module


def norm_module(net: nn.Module, layer: Layer) -> NormModule | None:
    """Return the BatchNorm after `layer`, which has running statistics; None if none follows."""
    if layer.norm is None:
        return None
    norm = net.get_submodule(layer.norm)
    assert isinstance(norm, NORMS), layer.norm
    return norm


def norm_statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance of a BatchNorm, (channels,) each. They are its buffers and no copies."""
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
    return mean, variance


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight that a layer or an embedding computes with: (output channels, ...)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the bias of a layer, (output channels,); None if it has none."""
    return module.bias if isinstance(module.bias, Tensor) else None


def float_weight(module: nn.Module) -> nn.Parameter:
    """Return the float weight (output channels, ...) that is trained: the original one of a quantizer or palette.

    In a layer without either it is the layer's own weight.
    """
    learned = parametrize.is_parametrized(module, "weight")
    weight = module.parametrizations.weight.original if learned else module.weight  # type: ignore[union-attr]
    assert isinstance(weight, nn.Parameter)
    return weight
