"""Which values get a grid, so that the network runs on integers; and which operations stay float, and why.

A value gets a grid for one of three reasons:

1. A layer reads it.
2. A convolution computes it: runtimes run a convolution on integers only if its output has a grid too.
3. It is an input of a sum, product, concatenation, pooled mean or sigmoid whose output has a grid: then that operation
   can run on integers too, if all its inputs can come from integers.

All other values stay float, such as the residual stream between the layer norms of a transformer. Rounding them would
cost accuracy and save no time.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from r2cli.graph import operators
from r2cli.graph.constants import operator_name
from r2cli.graph.edit import is_grid, source
from r2cli.graph.operators import ACTIVATIONS, LAYERS, PASSING, Kind, is_a, module_of
from r2cli.graph.structure import only_user, propagate
from r2cli.storage.input_spec import Shape

UNROUNDED = "what it gives is the network's result, or has no grid: its codes are decoded for it"
SECOND_USE = ("Gemm", "Conv", "layer Gemm", "layer Conv", "Clip")  # behind a Clip ONNX Runtime rounds no bias itself
FOREIGN_BIAS = "its int32 bias is on the scale of the first call's input: runtimes may run this call in float"
# What can run on integers or is cheap between two grids.
COMPUTES = (Kind.INTEGER, Kind.POINTWISE, Kind.NORM, Kind.ACTIVATION)
MEANS = (F.avg_pool2d, F.adaptive_avg_pool2d)  # of many numbers: they give more levels than they read


@dataclass(frozen=True)
class FloatOperation:
    """An operation that runs in float in an integer network: its node, its kind, why, and its ONNX operators."""

    node: str
    kind: str
    reason: str
    operators: tuple[str, ...]


def values(net: fx.GraphModule, shape: Shape, *, result: bool = False) -> list[str]:
    """Return the nodes whose values get a grid, in order, for inputs of `shape` (without the batch).

    The network's `result` stays float unless it is wanted as codes: rounding it only blurs it. A runtime that wants
    those has no layer that gives floats at all, so what linear layers give gets grids too.
    """
    propagate(net, shape)
    known: dict[fx.Node, bool] = {}
    with_grid: set[fx.Node] = set()
    todo = [value for node in net.graph.nodes for value in _around_layer(net, node, linear=result)]
    if result:
        todo += net.graph.output_node().all_input_nodes
    while todo:  # from the layers back towards the input
        node = _origin(net, todo.pop())
        if node in with_grid or not _is_float(node):
            continue
        with_grid.add(node)
        operation = _before_activation(net, node)
        if operators.kind(net, operation) in COMPUTES and _can_be_integer(net, operation, known):
            todo += _inputs(operation)
    return [node.name for node in net.graph.nodes if node in with_grid and (result or not _is_only_result(net, node))]


def bits_of(net: fx.GraphModule, names: Iterable[str], usual: int, own: Mapping[str, int]) -> dict[str, int]:
    """Return the bits of the grid of every named value, where layers want `own` bits of what they read.

    One value has one grid: no reader gets fewer than it wants, and all that is no layer wants the `usual` ones. A
    function of one value (an activation, a gate, a product by a number) wants as many as those that read it do: it
    cannot give more levels than it is given.
    """
    nodes = {node.name: node for node in net.graph.nodes}
    return {name: max(_wanted(net, nodes[name], usual, own), default=usual) for name in names}


def _wanted(net: fx.GraphModule, node: fx.Node, usual: int, own: Mapping[str, int]) -> Iterator[int]:
    for user in node.users:
        if is_a(net, user, PASSING) or is_grid(user):
            yield from _wanted(net, user, usual, own)
        elif isinstance(module_of(net, user), LAYERS):
            yield own.get(str(user.target), usual)
        elif operators.kind(net, user) is not Kind.SHAPE and user.op != "output":
            yield usual
            if _argument(net, user) is not user:
                yield from _wanted(net, user, usual, own)


def _argument(net: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The one value that `node` is a function of, number by number, or `node` itself: of a layer, a sum, a mean."""
    if is_a(net, node, PASSING) or is_grid(node):
        return _argument(net, node.all_input_nodes[0])
    if operators.kind(net, node) not in COMPUTES or is_a(net, node, MEANS):
        return node
    read = {_argument(net, value) for value in node.all_input_nodes if value.op != "get_attr"}
    return read.pop() if len(read) == 1 else node


def float_operations(net: fx.GraphModule, shape: Shape) -> list[FloatOperation]:
    """Return the operations that a network with grids still computes in float, in the order in which they run."""
    propagate(net, shape)
    operations, constants, again = [], _constants(net), _with_foreign_bias(net)
    for node in net.graph.nodes:
        kind = operators.kind(net, node)
        if node in again:
            operations.append(FloatOperation(node.name, "second use of a layer", FOREIGN_BIAS, SECOND_USE))
            continue
        if _is_convolution(net, node) and not _is_rounded(net, node):
            operations.append(FloatOperation(node.name, "convolution", UNROUNDED, ("Conv",)))
            continue
        in_float = kind is not Kind.LAYER or _written_as_operators(net, node)
        computes = node.op.startswith("call") and _is_float(node) and in_float
        if not computes or is_grid(node) or node in constants:
            continue
        if kind is Kind.PASSING and (not _written_as_operators(net, node) or _on_grid(net, node)):
            continue
        if kind in (Kind.INTEGER, Kind.ACTIVATION) and is_between_grids(net, node):
            continue
        if is_a(net, node, ACTIVATIONS) and not _is_result(net, node) and _is_fused(net, node):
            continue
        operations.append(_float_operation(net, node))
    return operations


def is_between_grids(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether all that `node` reads is on grids, and so is what it gives.

    Runtimes fuse a ReLU into the operation before it, so the grid after the ReLU counts.
    """
    return all(_on_grid(net, value) for value in _inputs(node)) and _is_rounded(net, node)


def _is_rounded(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether what `node` gives, behind its ReLU perhaps, gets a grid."""
    user = only_user(node)
    last = user if user is not None and is_a(net, user, ACTIVATIONS) else node
    return any(map(is_grid, last.users))


def _is_convolution(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` calls a convolution that runtimes run on integers between two grids."""
    return isinstance(module_of(net, node), nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _with_foreign_bias(net: fx.GraphModule) -> set[fx.Node]:
    """Return the calls of layers with a bias that read another grid than the layer's first call does."""
    first: dict[fx.node.Target, str] = {}
    found = set()
    for node in net.graph.nodes:
        module, grid = module_of(net, node), source(net, node)
        if isinstance(module, LAYERS) and module.bias is not None and grid is not None:
            if first.setdefault(node.target, grid) != grid:
                found.add(node)
    return found


def _written_as_operators(net: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether `operators.row` lists ONNX operators for `node`: those compute in float."""
    row = operators.row(net, node)
    return row is not None and bool(row.operators)


def _is_fused(net: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether an activation runs as part of the layer before it, or of the grids after it."""
    return isinstance(module_of(net, node.all_input_nodes[0]), LAYERS) or all(map(is_grid, node.users))


def _float_operation(net: fx.GraphModule, node: fx.Node) -> FloatOperation:
    row = operators.row(net, node)
    if row is not None:
        return FloatOperation(node.name, row.name, row.reason, row.operators)
    module = module_of(net, node)
    name = type(module).__name__ if module is not None else operator_name(node.target)
    return FloatOperation(node.name, name, "r2 knows no integer form of it", ())


def _on_grid(net: fx.GraphModule, node: fx.Node) -> bool:
    return is_grid(_origin(net, node))


def _constants(net: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that depend on no input: parameters, and what is computed from parameters alone."""
    constants: set[fx.Node] = set()
    for node in net.graph.nodes:
        if node.op != "placeholder" and constants.issuperset(node.all_input_nodes):
            constants.add(node)
    return constants


def _around_layer(net: fx.GraphModule, node: fx.Node, *, linear: bool) -> Iterator[fx.Node]:
    """Yield the input of a layer, and for a convolution also its output, after the activation that follows it; for a
    `linear` layer too if that is asked for."""
    # The module of a recurrent layer's weight has no input.
    if not isinstance(module_of(net, node), LAYERS) or not node.all_input_nodes:
        return
    yield node.all_input_nodes[0]
    if linear or not isinstance(module_of(net, node), nn.Linear):
        user = only_user(node)
        yield user if user is not None and is_a(net, user, ACTIVATIONS) else node


def _can_be_integer(net: fx.GraphModule, node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Say whether `node` can be computed from integers. `known` keeps the answers, since branches share nodes.

    A layer's output can be, and so can the output of an operation whose inputs all can be. A linear layer over tokens
    (three dimensions or more) gives floats: runtimes add its bias in float, after the product. A parameter is a float:
    OpenVINO loads no file in which one is rounded, and then added or multiplied.
    """
    if node not in known:
        if isinstance(module_of(net, node), LAYERS):
            known[node] = not isinstance(module_of(net, node), nn.Linear) or len(_shape(node)) == 2
        elif operators.kind(net, node) in COMPUTES:
            known[node] = all(_can_be_integer(net, value, known) for value in _inputs(node))
        elif is_a(net, node, PASSING):
            known[node] = _can_be_integer(net, node.all_input_nodes[0], known)
        else:
            known[node] = node.op == "placeholder"
    return known[node]


def _origin(net: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the node that computes the value of `node`: skip reshapes and other nodes that only pass it on.

    Of an operation that computes several values, such as a recurrent layer, it is the node that picks one of them.
    """
    while is_a(net, node, PASSING):
        before = node.all_input_nodes[0]
        if node.target is operator.getitem and not is_a(net, before, PASSING):
            return node
        node = before
    return node


def _before_activation(net: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the node that the ReLU `node` is fused into, or `node` itself if there is none."""
    if not is_a(net, node, ACTIVATIONS):
        return node
    before = node.all_input_nodes[0]
    return before if only_user(before) is node else node


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [value for value in node.all_input_nodes if _is_float(value)]


def _is_float(node: fx.Node) -> bool:
    """Say whether the node's value is a float tensor, or a tuple of them."""
    meta = node.meta.get("tensor_meta")
    first = meta[0] if isinstance(meta, tuple | list) and not hasattr(meta, "dtype") and meta else meta
    return getattr(first, "dtype", None) == torch.float32


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _is_only_result(net: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether the output of `node` is a result of the network, and nothing else reads it."""
    return bool(node.users) and all(
        user.op == "output" or (is_a(net, user, PASSING) and _is_only_result(net, user)) for user in node.users
    )


def _is_result(net: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether the output of `node` is the network's result, without any computation in between."""
    return any(user.op == "output" or (is_a(net, user, PASSING) and _is_result(net, user)) for user in node.users)
