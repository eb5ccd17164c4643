"""The network's graph, read once with torch.fx: which layers hold weights, which BatchNorm follows, where values flow.

Weights are changed on the modules, so parameter names never change. A value on an edge is known by the name of the node
that produces it, so that a checkpoint finds its edges again.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torchvision.ops import stochastic_depth

from r2cli import exported
from r2cli.attention import REWRITTEN, cut, pad_to_windows
from r2cli.clip import Clip
from r2cli.errors import InputError, R2Error, unknown

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# A channel with less variance than this share of its BatchNorm's epsilon varies by less than a hundredth of gamma.
DEAD = 1e-4
GRIDS = "grids."  # the modules on edges, by the name of the node whose value they round
# The end of a name of a second grid on a value, behind the first, which the layers that read the value read alone.
FOR_LAYERS, LAYER_GRIDS = "/layers", "layer_grids."

# Fused into the layer or the sum before them, by us and by every runtime.
ACTIVATIONS: tuple[Any, ...] = (nn.ReLU, nn.ReLU6, Clip, F.relu, F.relu6, torch.relu, torch.relu_, "relu", "relu_")
# They do nothing in evaluation.
NOTHING: tuple[Any, ...] = (nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout, stochastic_depth)
# They choose, move or copy values that are on a grid already, so their output needs no grid of its own.
PASSING: tuple[Any, ...] = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.Flatten),
    *(F.max_pool2d, torch.flatten, torch.reshape, torch.permute, torch.transpose),
    *(operator.getitem, "flatten", "view", "reshape", "permute", "transpose", "contiguous"),
    *(torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze", "expand", "roll", pad_to_windows, cut),
    *(torch.chunk, torch.split, "chunk", "split", torch.select, torch.ops.aten.slice.Tensor),
)
# Their values are tuples.
TUPLES: tuple[Any, ...] = (torch.chunk, torch.split, "chunk", "split")
# They read a value's shape and not the value.
SHAPES: tuple[Any, ...] = (getattr, "size", "dim", Tensor.size)


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


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in REWRITTEN or super().is_leaf_module(m, module_qualified_name)


class Unreadable(InputError):
    """A network whose graph torch.fx cannot trace, nor torch.export read where that was tried; `why` is without a
    way out."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"{why}: take out what depends on the values of tensors, or quantize the weights alone: --act-bits none, "
            "and for r2 ptq --method none"
        )
        self.why = why


def trace(model: nn.Module, example: Tensor | None = None) -> fx.GraphModule:
    """`model` as a graph over the same modules, in evaluation mode.

    Where torch.fx cannot trace it, torch.export reads it with an `example` of its inputs (n, ...), n > 1, if there is
    one. Raises Unreadable naming what cannot be traced.
    """
    try:
        net = _traced(model)
    except Unreadable as unreadable:
        if example is None:
            raise
        try:
            net = exported.read(model, example)
        except Exception as error:  # torch.export passes on whatever the network raises
            first = next(iter(str(error).strip().splitlines()), "")
            raise Unreadable(f"{unreadable.why}, and torch.export cannot either ({first})") from error
    for node in list(net.graph.nodes):
        if is_a(net, node, NOTHING):
            _bypass(net, node)
        elif is_a(net, node, (nn.SiLU, F.silu)):
            _as_product(net, node, torch.sigmoid)
        elif is_a(net, node, (nn.Hardswish, F.hardswish)):
            _as_product(net, node, F.hardsigmoid)
    net.recompile()
    return net


def _traced(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    try:
        net = fx.GraphModule(model.eval(), tracer.trace(model))
        rewritten = {name: REWRITTEN[type(m)](m, name) for name, m in net.named_modules() if type(m) in REWRITTEN}
        for name, module in rewritten.items():
            net.set_submodule(name, module.eval())
        return fx.symbolic_trace(net) if rewritten else net
    except Exception as error:
        last = next(reversed(tracer.graph.nodes), None) if hasattr(tracer, "graph") else None
        raise Unreadable(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}"
            f"{f', at the node {last.name!r}' if last is not None else ''})"
        ) from error


def propagate(net: fx.GraphModule, shape: tuple[int, ...]) -> None:
    """Note the shape and type of every value in the graph, `tensor_meta`, for two inputs of `shape`.

    Two, so that nothing mistakes the batch for a dimension of size one.
    """
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    given = next(node for node in net.graph.nodes if node.op == "placeholder")
    with torch.no_grad():
        ShapeProp(net).propagate(torch.zeros(2, *shape, device=device, dtype=given.meta.get("dtype")))


def _as_product(net: fx.GraphModule, node: fx.Node, factor: Callable[..., Tensor]) -> None:
    """Write an activation x * factor(x) as that: its parts can run on integers."""
    with net.graph.inserting_before(node):
        gate = net.graph.call_function(factor, (node.args[0],))
        product = net.graph.call_function(operator.mul, (node.args[0], gate))
    node.replace_all_uses_with(product)
    net.graph.erase_node(node)


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
        _bypass(net, next(node for node in net.graph.nodes if node.target == layer.norm))
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


def insert(net: fx.GraphModule, modules: Mapping[str, nn.Module]) -> None:
    """Put a module on the value of each named node, in the place of one that is there: all then read the module.

    With `FOR_LAYERS` at the end of its name the layers alone read it, and it reads what they read before.
    Raises R2Error for a name that no node has.
    """
    nodes = {node.name: node for node in net.graph.nodes}
    there = {str(node.target): node for node in net.graph.nodes if node.op == "call_module"}
    for name in sorted(modules, key=lambda name: name.endswith(FOR_LAYERS)):
        value = name.removesuffix(FOR_LAYERS)
        target = f"{GRIDS if value == name else LAYER_GRIDS}{value}"
        if target in there:
            net.set_submodule(target, modules[name])
            continue
        if value not in nodes:
            raise R2Error(f"the network has no value '{value}' to put a grid on: the checkpoint is of another network")
        net.add_submodule(target, modules[name])
        read = nodes[value] if value == name else there.get(f"{GRIDS}{value}", nodes[value])
        users = [user for user in read.users if value == name or isinstance(module_of(net, user), LAYERS)]
        with net.graph.inserting_after(read):
            there[target] = net.graph.call_module(target, (read,))
        for user in users:
            user.replace_input_with(read, there[target])
    net.recompile()


def source(net: fx.GraphModule, node: fx.Node) -> str | None:
    """The name of the node whose value `node` reads, behind what only passes it on; None if it has no grid."""
    read = node.args[0] if node.args else None
    while isinstance(read, fx.Node) and is_a(net, read, PASSING):
        read = read.args[0] if read.args else None
    if not isinstance(read, fx.Node) or not is_grid(read):
        return None
    target = str(read.target)
    if target.startswith(LAYER_GRIDS):
        return f"{target.removeprefix(LAYER_GRIDS)}{FOR_LAYERS}"
    return target.removeprefix(GRIDS)


def is_grid(node: fx.Node) -> bool:
    """Whether `node` rounds a value to its grid."""
    return node.op == "call_module" and str(node.target).startswith((GRIDS, LAYER_GRIDS))


def repeat_grids(net: fx.GraphModule) -> None:
    """Put a value's grid behind everything that passes the value on as well; in place.

    It changes no value: a maximum or a flatten of what is on a grid is on it. Runtimes run such a node on integers only
    where they find the grid on both of its sides.
    """
    for node in list(net.graph.nodes):
        where = source(net, node) if is_a(net, node, PASSING) and not is_a(net, node, TUPLES) else None
        if where is not None:
            with net.graph.inserting_after(node):
                call = net.graph.call_module(f"{GRIDS}{where}", (node,))
            node.replace_all_uses_with(call, delete_user_cb=lambda user, own=call: user is not own)
    net.recompile()


def dead(norm: nn.Module) -> Tensor:
    """Which channels never vary, (channels,) bool: folding would multiply their filters by some 300."""
    assert isinstance(norm, NORMS) and norm.running_var is not None
    return norm.running_var < DEAD * norm.eps


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
    return 6.0 if is_a(net, user, (nn.ReLU6, F.relu6)) else torch.inf


def module_of(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_a(net: fx.GraphModule, node: fx.Node, kinds: tuple[Any, ...]) -> bool:
    """Whether `node` calls one of `kinds`: module classes, functions, or method names."""
    module = module_of(net, node)
    if module is not None:
        return isinstance(module, tuple(kind for kind in kinds if isinstance(kind, type)))
    return node.op in ("call_function", "call_method") and node.target in kinds


def replace_calls(net: fx.GraphModule, match: Callable[[fx.Node], nn.Module | None]) -> None:
    """Replace every node for which `match` returns a module by a call of that module on the node's first argument."""
    for node in list(net.graph.nodes):
        module = match(node)
        if module is None:
            continue
        net.add_submodule(f"replaced.{node.name}", module)
        with net.graph.inserting_after(node):
            call = net.graph.call_module(f"replaced.{node.name}", (node.args[0],))
        node.replace_all_uses_with(call)
        net.graph.erase_node(node)
    net.recompile()


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads the value of `node`; None if there are more, or none."""
    users = [user for user in node.users if user.target not in SHAPES]
    return users[0] if len(users) == 1 else None


def _follows(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a BatchNorm with statistics that runs once."""
    norm = module_of(net, node)
    once = sum(other.target == node.target for other in net.graph.nodes) == 1
    return isinstance(norm, NORMS) and norm.running_var is not None and once


def _bypass(net: fx.GraphModule, node: fx.Node) -> None:
    before = node.args[0]
    assert isinstance(before, fx.Node)
    node.replace_all_uses_with(before)
    net.graph.erase_node(node)


def node_of(net: fx.GraphModule, layer: Layer) -> fx.Node:
    """The node that runs `layer`."""
    found: fx.Node = next(node for node in net.graph.nodes if node.name == layer.node)
    return found


def named_layers(net: fx.GraphModule) -> Iterator[tuple[Layer, nn.Module]]:
    for layer in layers(net):
        yield layer, net.get_submodule(layer.name)
