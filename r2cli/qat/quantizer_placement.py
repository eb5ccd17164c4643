"""Where quantizers stand: on every layer's weight, and on the edges of the graph.

By default all that computes is rounded where its value appears, so that the whole exported graph runs on integers: what
only layers read to their own low bits; what a sum or anything else reads as well to 8 bits, and behind that, for the
layers, to theirs. The papers' placement is on the inputs of layers alone. In both the network's own input has a wide
grid, which reaches below zero.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from r2cli.errors import InputError
from r2cli.graph import batchnorm, edit, operators, placement, structure
from r2cli.graph.edit import FOR_LAYERS
from r2cli.graph.read import Unreadable, trace
from r2cli.graph.structure import Layer
from r2cli.qat.quantizers import ActivationQuantizer, TwoGrids, WeightQuantizer, WideQuantizer

WIDE = 8  # bits


@dataclass(frozen=True)
class Place:
    """What stands on one value, named as in the graph without BatchNorms: a wide grid, levels of `low` bits, or both.

    `shared`: not all that reads the value is a layer, so the low levels are the layers' alone.
    """

    value: str
    wide: bool = False
    low: int | None = None
    shared: bool = False

    @property
    def low_key(self) -> str:
        return self.value + (FOR_LAYERS if self.shared else "")


@dataclass(frozen=True)
class Prepared:
    """A network with its learners: `net` is the graph that trains, over the modules of the graph `model`.

    `weights` are by the name of the layer, `edges` by the name of the value, as a checkpoint has it.
    """

    model: fx.GraphModule
    net: fx.GraphModule
    layers: tuple[Layer, ...]
    weights: Mapping[str, WeightQuantizer]
    edges: Mapping[str, ActivationQuantizer | WideQuantizer]

    @property
    def activations(self) -> list[ActivationQuantizer]:
        return [edge for edge in self.edges.values() if isinstance(edge, ActivationQuantizer)]

    def each(self) -> Iterator[tuple[Layer, WeightQuantizer, Tensor]]:
        """Layers with their learners and their float weights."""
        for layer in self.layers:
            yield layer, self.weights[layer.name], structure.float_weight(self.model.get_submodule(layer.name))


def require_known(net: fx.GraphModule, *, activations: bool) -> None:
    """Raises InputError for a module with weights that no learner knows, and for a layer that runs twice."""
    for name, module in net.named_modules():
        weight = getattr(module, "weight", None)
        learned = isinstance(module, (*operators.LAYERS, nn.Embedding))  # rows of a table stay float
        if isinstance(weight, Tensor) and weight.ndim > 1 and not learned:
            raise InputError(
                f"the layer '{name}' is a {type(module).__name__}, which has no quantizer: r2 qat trains networks of "
                "Conv1d, Conv2d and Linear"
            )
    targets = [
        str(node.target) for node in net.graph.nodes if isinstance(operators.module_of(net, node), operators.LAYERS)
    ]
    twice = next((target for target in targets if targets.count(target) > 1), None)
    if twice and activations:
        raise InputError(f"the layer '{twice}' runs twice, on values of two ranges: give --act-bits none")


def places(net: fx.GraphModule, shape: tuple[int, ...], bits: Mapping[str, int], *, inputs: bool) -> list[Place]:
    """What stands where in `net`, a graph without BatchNorms; `bits` are of what each layer reads, by its name."""
    nodes = {node.name: node for node in net.graph.nodes}
    found: dict[str, Place] = {}
    for value in placement.values(net, shape):
        node = nodes[value]
        readers = list(_readers(net, node))
        read_by = [(via, user) for via, user in readers if isinstance(operators.module_of(net, user), operators.LAYERS)]
        others = len(read_by) < len(readers)
        low = max((bits[str(user.target)] for _, user in read_by), default=None)
        if node.op == "placeholder" or (others and not inputs):
            found[value] = Place(value, wide=True)
            if node.op == "placeholder" or low is None or low >= WIDE:
                continue
        elif low is None:
            continue
        elif not others:
            found[value] = Place(value, low=low)
            continue
        for via in dict.fromkeys(via.name for via, _ in read_by):
            found[via] = Place(via, wide=via in found, low=low, shared=True)
    return list(found.values())


def _readers(net: fx.GraphModule, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """All that reads the value of `node`, behind what only passes it on, each with the node that it reads."""
    for user in node.users:
        if operators.is_a(net, user, operators.PASSING):
            yield from _readers(net, user)
        elif user.target not in operators.SHAPES:
            yield node, user


def read(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of a network that is to train. Raises InputError for one that cannot be read."""
    try:
        return trace(model, example)
    except Unreadable as error:
        raise InputError(f"{error.why}, and r2 qat needs its graph: r2 ptq and r2 palettize may do without") from error


def prepare(
    model: fx.GraphModule,
    shape: tuple[int, ...],
    weights: Callable[[str, Tensor], WeightQuantizer],
    edges: Callable[[int], ActivationQuantizer] | None,
    bits: Mapping[str, int],
    *,
    inputs: bool,
) -> Prepared:
    """The graph `model` with learners, made by `weights` of a layer's name and weight, and by `edges` of bits if any.

    They have started on the weights, and not yet on the edges: `start` does. Raises InputError for a network with a
    layer that cannot be quantized.
    """
    net = edit.over_same_modules(model)
    require_known(net, activations=edges is not None)
    batchnorm.make_factors_positive(net)
    layers = tuple(structure.layers(net))
    placed: list[Place] = []
    if edges is not None:
        folded = copy.deepcopy(net)
        batchnorm.remove_norms(folded)
        placed = places(folded, shape, bits, inputs=inputs)
    made = {}
    for layer in layers:
        module = structure.layer_module(model, layer.name)
        made[layer.name] = weights(layer.name, module.weight.detach())
        parametrize.register_parametrization(module, "weight", made[layer.name])
    on_edges = _put_on(net, placed, edges) if edges is not None else {}
    _tell_what_is_read(net, layers, made)
    return Prepared(model, net, layers, made, on_edges)


def _put_on(
    net: fx.GraphModule, placed: Iterable[Place], make: Callable[[int], ActivationQuantizer]
) -> dict[str, ActivationQuantizer | WideQuantizer]:
    """Put modules on the values of the graph with its BatchNorms; in place."""
    nodes = {node.name: node for node in net.graph.nodes}
    norms = {layer.node: layer.norm for layer in structure.layers(net) if layer.norm}
    behind = {name: next(n for n in nodes.values() if n.target == norm) for name, norm in norms.items()}
    edges: dict[str, ActivationQuantizer | WideQuantizer] = {}
    for place in placed:
        node = behind.get(place.value, nodes[place.value])
        users = list(node.users)
        layers = [user for user in users if isinstance(operators.module_of(net, user), operators.LAYERS)]
        wide, low = WideQuantizer() if place.wide else None, make(place.low) if place.low else None
        if wide is not None:
            edges[place.value] = wide
        if low is not None:
            edges[place.low_key] = low
        target = f"learners.{place.value}"
        if wide is not None and low is not None:
            net.add_submodule(target, TwoGrids(wide, low))
            with net.graph.inserting_after(node):
                call = net.graph.call_module(target, (node,))
            with net.graph.inserting_after(call):
                parts = [net.graph.call_function(_part, (call, index)) for index in (1, 0)]
            for user in users:
                user.replace_input_with(node, parts[user not in layers])
            continue
        only = wide or low
        assert only is not None
        net.add_submodule(target, only)
        with net.graph.inserting_after(node):
            call = net.graph.call_module(target, (node,))
        for user in layers if place.shared else users:
            user.replace_input_with(node, call)
    net.recompile()
    return edges


def _part(values: tuple[Tensor, Tensor], index: int) -> Tensor:
    return values[index]


def _tell_what_is_read(net: fx.GraphModule, layers: Iterable[Layer], weights: Mapping[str, WeightQuantizer]) -> None:
    """Let each weight's learner know the quantizer of what its layer reads."""
    for layer in layers:
        learner, read = weights[layer.name], structure.node_of(net, layer).args[0]
        while isinstance(read, fx.Node) and (operators.is_a(net, read, operators.PASSING) or read.target is _part):
            read = read.args[0]
        module = operators.module_of(net, read) if isinstance(read, fx.Node) else None
        low = module.low if isinstance(module, TwoGrids) else module
        if isinstance(low, ActivationQuantizer):
            learner.reads = (low,)


# --- starting ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def start(prepared: Prepared, images: Tensor) -> None:
    """Set what is trained on the edges from one batch of images, with BatchNorm's statistics of that batch."""
    net = prepared.net.eval()
    for module in net.modules():
        if isinstance(module, operators.NORMS):
            module.train()
    hooks = []
    for layer, learner, weight in prepared.each():
        module = net.get_submodule(layer.name)
        hooks.append(module.register_forward_pre_hook(_matching(learner, weight)))
    _switch(prepared, True)
    net(images)
    _switch(prepared, False)
    for hook in hooks:
        hook.remove()
    leave_relus(net)
    net.eval()


def _switch(prepared: Prepared, starting: bool) -> None:
    for edge in prepared.edges.values():
        if isinstance(edge, ActivationQuantizer):
            edge.starting, edge.seen = starting, None
        elif starting:
            edge.watching = True
        else:
            edge.settle()


def _matching(learner: WeightQuantizer, weight: Tensor) -> Callable[[nn.Module, tuple[Tensor]], None]:
    """A hook that tells a learner what its layer makes of its input, with floats and quantized, without the bias."""

    def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
        (rounded,) = inputs
        seen = learner.reads[0].seen if learner.reads else None
        exact = rounded if seen is None or seen.shape != rounded.shape else seen
        learner.match(_without_bias(module, exact, weight), _without_bias(module, rounded, learner(weight)))

    return hook


def _without_bias(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x, weight)
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    found: Tensor = module._conv_forward(x, weight, None)
    return found


def leave_relus(net: fx.GraphModule) -> None:
    """Take out every ReLU that a quantizer alone reads and whose lowest level is 0, which does the same; in place."""
    for node in list(net.graph.nodes):
        module = operators.module_of(net, node)
        first = module.wide if isinstance(module, TwoGrids) else module
        if not isinstance(first, ActivationQuantizer) and not isinstance(module, TwoGrids):
            continue
        assert isinstance(first, ActivationQuantizer | WideQuantizer)
        relu = node.args[0]
        if isinstance(relu, fx.Node) and _is_relu(net, relu) and len(relu.users) == 1 and first.zero == 0:
            first.rectifies = True
            node.replace_input_with(relu, relu.args[0])
            net.graph.erase_node(relu)
    net.recompile()


def _is_relu(net: fx.GraphModule, node: fx.Node) -> bool:
    plain = tuple(kind for kind in operators.ACTIVATIONS if kind is not nn.functional.relu6)
    return operators.is_a(net, node, plain)


@torch.no_grad()
def watch(prepared: Prepared, batches: Iterable[Tensor], *, norms: bool) -> None:
    """Set the wide grids to what they see over `batches` of images, and with `norms` BatchNorm's statistics too."""
    wides = [edge for edge in prepared.edges.values() if isinstance(edge, WideQuantizer)]
    for edge in wides:
        edge.watching = True
    if norms:
        batchnorm.reestimate_norms(prepared.net, batches)
    else:
        prepared.net.eval()
        for images in batches:
            prepared.net(images)
    for edge in wides:
        edge.settle()
