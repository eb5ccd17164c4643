"""Where quantizers stand: on every layer's weight, and on the edges of the graph.

By default every value that is computed with is rounded where it appears, so that the whole exported graph runs on
integers:

- A value that only layers read is rounded to their low bits.
- A value that a sum or any other operation reads too is rounded to 8 bits, and after that, for the layers, to theirs.

The papers round the inputs of layers only. In both placements the network's own input has a wide grid, which reaches
below zero: normalised images have negative values, which an unsigned grid at zero would cut off.
"""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from r2cli.errors import InputError
from r2cli.graph import batchnorm, edit, left_float, operators, placement, structure
from r2cli.graph.edit import FOR_LAYERS
from r2cli.graph.read import Unreadable, trace
from r2cli.graph.recurrent import RecurrentWeight
from r2cli.graph.structure import Layer
from r2cli.graph.transposed import TransposedConv
from r2cli.qat.quantizers import ActivationQuantizer, TwoGrids, WeightQuantizer, WideQuantizer
from r2cli.storage.input_spec import Given, Shape
from r2cli.storage.input_spec import places as by_place

WIDE = 8  # bits


@dataclass(frozen=True)
class Place:
    """What stands on one value: a wide grid of `bits`, a grid of `low` bits, or both.

    `value` is the name of its node in the graph without BatchNorms. `shared` says that something other than a layer
    reads the value too, so that the low grid is for the layers only.
    """

    value: str
    wide: bool = False
    low: int | None = None
    shared: bool = False
    bits: int = WIDE

    @property
    def low_key(self) -> str:
        """The name of the low grid's value, as a checkpoint has it."""
        return self.value + (FOR_LAYERS if self.shared else "")


@dataclass(frozen=True)
class Prepared:
    """A network with its quantizers. `net` is the graph that is trained, over the modules of the graph `model`.

    `weights` has the quantizers of weights by the name of the layer; `edges` has those of activations by the name of
    the value, as a checkpoint has it.
    """

    model: fx.GraphModule
    net: fx.GraphModule
    layers: tuple[Layer, ...]
    weights: Mapping[str, WeightQuantizer]
    edges: Mapping[str, ActivationQuantizer | WideQuantizer]

    @property
    def activations(self) -> list[ActivationQuantizer]:
        """The quantizers of activations that are trained, without the wide grids."""
        return [edge for edge in self.edges.values() if isinstance(edge, ActivationQuantizer)]

    def each(self) -> Iterator[tuple[Layer, WeightQuantizer, Tensor]]:
        """Yield every layer with its quantizer and its float weight (channels, ...)."""
        for layer in self.layers:
            yield layer, self.weights[layer.name], structure.float_weight(self.model.get_submodule(layer.name))


def places(
    net: fx.GraphModule, shape: Shape, bits: Mapping[str, int], *, inputs: bool, result: bool = False
) -> list[Place]:
    """Return what stands on each value of `net`, a graph without BatchNorms, for inputs of `shape`.

    `bits` are the bits of what each layer reads, by the layer's name; more than 8 make the wide grid finer, which is
    not trained. Layers that stay float are hidden in `net`, and take what there is. With `inputs` only the inputs of
    layers count. With `result` the network's result gets a grid too.
    """
    nodes = {node.name: node for node in net.graph.nodes}
    found: dict[str, Place] = {}
    for value in placement.values(net, shape, result=result):
        node = nodes[value]
        every = _readers(net, node, result=result)
        readers = [each for each in every if not isinstance(operators.module_of(net, each[1]), operators.LeftFloat)]
        read_by = [(via, user) for via, user in readers if isinstance(operators.module_of(net, user), operators.LAYERS)]
        others = len(read_by) < len(readers)
        # One value has one low grid. Its layers may want different bits: no layer gets fewer than --keep says.
        low = max((bits[str(user.target)] for _, user in read_by), default=None)
        if node.op == "placeholder" or (others and not inputs):
            found[value] = Place(value, wide=True, bits=max(WIDE, low or 0))
            if node.op == "placeholder" or low is None or low >= WIDE:
                continue
        elif low is None:
            continue
        elif low > WIDE:
            found[value] = Place(value, wide=True, bits=low)
            continue
        elif not others:
            found[value] = Place(value, low=low)
            continue
        # On the node that the layers read themselves: between it and `node` there may be a pooling or a flatten.
        for via in dict.fromkeys(via.name for via, _ in read_by):
            found[via] = Place(via, wide=via in found, low=low, shared=True)
    return list(found.values())


def _readers(net: fx.GraphModule, node: fx.Node, *, result: bool) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield every node that reads the value of `node`, with the node that it reads it from.

    Operations that only pass values on are looked through. Those that read only the shape do not count,
    and the network's result only where `result` says so.
    """
    for user in node.users:
        if operators.is_a(net, user, operators.PASSING):
            yield from _readers(net, user, result=result)
        elif user.target not in operators.SHAPES and (result or user.op != "output"):
            yield node, user


def read(model: nn.Module, example: Given, architecture: Hashable | None = None) -> fx.GraphModule:
    """Return the graph of a network that is to be trained. Raises InputError for one that cannot be read."""
    try:
        return trace(model, example, architecture)
    except Unreadable as error:
        raise InputError(f"{error.why}, and r2 qat needs its graph: r2 ptq and r2 palettize may do without") from error


def prepare(
    model: fx.GraphModule,
    shape: Shape,
    weights: Callable[[str, Tensor], WeightQuantizer],
    edges: Callable[[int], ActivationQuantizer] | None,
    bits: Mapping[str, int],
    *,
    inputs: bool,
    result: bool = False,
) -> Prepared:
    """Put quantizers on the weights and activations of `model`, in place. Returns the network with them.

    Layers that `bits` does not have stay float. `weights` makes the quantizer of a weight from the layer's name and
    weight; `edges` makes that of an activation from
    its bits, and None leaves activations in float. The quantizers of weights have started; `start` starts those of
    activations. Raises InputError for a network that cannot be read, or has a layer that cannot be quantized.
    """
    net = edit.over_same_modules(model)
    # BatchNorm goes into scales at the end, and a scale must be positive.
    batchnorm.make_factors_positive(net)
    every = structure.layers(net)
    layers = tuple(layer for layer in every if layer.name in bits)
    placed: list[Place] = []
    if edges is not None:
        # Deployed, the BatchNorms are folded away, so it is that graph that says which values exist.
        folded = copy.deepcopy(net)
        batchnorm.remove_norms(folded)
        left_float.hide(folded, [layer.name for layer in every if layer.name not in bits])
        placed = places(folded, shape, bits, inputs=inputs, result=result)
    made = {}
    for layer in layers:
        module = structure.layer_module(model, layer.name)
        made[layer.name] = weights(layer.name, module.weight.detach())
        parametrize.register_parametrization(module, "weight", made[layer.name])
    on_edges = _put_on(net, placed, edges, result=result) if edges is not None else {}
    _tell_what_is_read(net, layers, made)
    return Prepared(model, net, layers, made, on_edges)


def _put_on(
    net: fx.GraphModule, placed: Iterable[Place], make: Callable[[int], ActivationQuantizer], *, result: bool
) -> dict[str, ActivationQuantizer | WideQuantizer]:
    """Put quantizers on the values of `net`, which still has its BatchNorms; in place. Returns them by their keys."""
    nodes = {node.name: node for node in net.graph.nodes}
    # The value of a layer in the graph without BatchNorms is here the value of the BatchNorm after the layer.
    norms = {layer.name: layer.norm for layer in structure.layers(net) if layer.norm}
    behind = {name: next(iter(node.users)) for name, node in nodes.items() if node.target in norms}
    edges: dict[str, ActivationQuantizer | WideQuantizer] = {}
    for place in placed:
        node = behind.get(place.value, nodes[place.value])
        # As they are before the quantizer becomes one.
        users = [user for user in node.users if result or user.op != "output"]
        layers = [user for user in users if isinstance(operators.module_of(net, user), operators.LAYERS)]
        wide, low = WideQuantizer(place.bits) if place.wide else None, make(place.low) if place.low else None
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
            # parts[0] is the low value, for layers; parts[1] is the wide one, for all others.
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
    """Return one of the two values of `TwoGrids`. `_tell_what_is_read` knows a node that takes one by this function."""
    return values[index]


def _tell_what_is_read(net: fx.GraphModule, layers: Iterable[Layer], weights: Mapping[str, WeightQuantizer]) -> None:
    """Tell each weight's quantizer which quantizer its layer reads from: EWGS's scale depends on it.

    A layer that runs twice reads from two, and its quantizer is told of none.
    """
    for layer in layers:
        if isinstance(structure.layer_module(net, layer.name), RecurrentWeight):
            continue
        if sum(node.target == layer.name for node in net.graph.nodes) > 1:
            continue
        learner, read = weights[layer.name], structure.node_of(net, layer).args[0]
        while isinstance(read, fx.Node) and (operators.is_a(net, read, operators.PASSING) or read.target is _part):
            read = read.args[0]
        module = operators.module_of(net, read) if isinstance(read, fx.Node) else None
        low = module.low if isinstance(module, TwoGrids) else module
        if isinstance(low, ActivationQuantizer):
            learner.reads = (low,)


# --- starting ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def start(prepared: Prepared, images: Given) -> None:
    """Start the quantizers of activations on one batch of images, in the order in which the network runs."""
    net = prepared.net.eval()
    # BatchNorms use the statistics of this batch: the weights before them are rounded now, and DoReFa's have another
    # scale altogether, so the running statistics are those of other values.
    for module in net.modules():
        if isinstance(module, operators.NORMS):
            module.train()
    hooks = []
    for layer, learner, weight in prepared.each():
        module = net.get_submodule(layer.name)
        hooks.append(module.register_forward_pre_hook(_matching(learner, weight)))
    _switch(prepared, True)
    net(*by_place(images))
    _switch(prepared, False)
    for hook in hooks:
        hook.remove()
    absorb_relus(net)
    net.eval()


def _switch(prepared: Prepared, starting: bool) -> None:
    """Let every quantizer of an activation start on the values that come next, or end that."""
    for edge in prepared.edges.values():
        if isinstance(edge, ActivationQuantizer):
            edge.starting, edge.seen = starting, None
        elif starting:
            edge.watching = True
        else:
            edge.settle()


def _matching(learner: WeightQuantizer, weight: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a hook that gives a quantizer the output of its layer, in float and quantized, both without the bias."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not inputs:  # a recurrent layer's weight
            learner.match(weight, learner(weight))
            return
        (rounded,) = inputs
        seen = learner.reads[0].seen if learner.reads else None
        # The values before rounding, unless an operation between the quantizer and the layer has changed their shape.
        exact = rounded if seen is None or seen.shape != rounded.shape else seen
        learner.match(_without_bias(module, exact, weight), _without_bias(module, rounded, learner(weight)))

    return hook


def _without_bias(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return what the layer `module` gives for x with another weight and without its bias."""
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x, weight)
    if isinstance(module, TransposedConv):
        return module.convolve(x, weight, None)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    found: Tensor = module._conv_forward(x, weight, None)
    return found


def absorb_relus(net: fx.GraphModule) -> None:
    """Take out every ReLU whose only reader is a quantizer with the lowest level 0; in place.

    Such a quantizer clips at 0 itself, so the ReLU would only be one more pass over the values.
    """
    for node in list(net.graph.nodes):
        module = operators.module_of(net, node)
        # Of two grids the wide one comes first, and so it is the one that reads the ReLU.
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
    """Return whether `node` is a ReLU. A ReLU6 is not: a quantizer may reach above 6."""
    plain = tuple(kind for kind in operators.ACTIVATIONS if kind is not nn.functional.relu6)
    return operators.is_a(net, node, plain)


@torch.no_grad()
def watch(prepared: Prepared, batches: Iterable[Given], *, norms: bool) -> None:
    """Set the wide grids to the ranges that they see on `batches` of images, each (n, ...).

    With `norms`, BatchNorm's statistics are set too. The network is in evaluation mode afterwards.
    """
    wides = [edge for edge in prepared.edges.values() if isinstance(edge, WideQuantizer)]
    for edge in wides:
        edge.watching = True
    if norms:
        batchnorm.reestimate_norms(prepared.net, batches)
    else:
        prepared.net.eval()
        for images in batches:
            prepared.net(*by_place(images))
    for edge in wides:
        edge.settle()
