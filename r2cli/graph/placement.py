"""Which values get a grid, so that the network runs on integers; and which operations stay float, and why.

A value gets a grid for one of three reasons:

1. A layer reads it.
2. A convolution computes it: runtimes run a convolution on integers only if its output has a grid too.
3. It is an input of a sum, product, concatenation, pooled mean or sigmoid whose output has a grid: then that operation
   can run on integers too, if all its inputs can come from integers.

All other values stay float, such as the residual stream between the layer norms of a transformer. Rounding them would
cost accuracy and save no time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from r2cli.graph.edit import is_grid
from r2cli.graph.operators import ACTIVATIONS, LAYERS, NORMS, PASSING, is_a, module_of
from r2cli.graph.structure import only_user, propagate

# Runtimes have integer kernels for these operations.
SUMS: tuple[Any, ...] = (torch.add,)
PRODUCTS: tuple[Any, ...] = (torch.mul,)
CONCATENATIONS: tuple[Any, ...] = (torch.cat,)
MEANS: tuple[Any, ...] = (F.avg_pool2d, F.adaptive_avg_pool2d)
SIGMOIDS: tuple[Any, ...] = (torch.sigmoid, F.hardsigmoid)
INTEGER = (*SUMS, *PRODUCTS, *CONCATENATIONS, *MEANS, *SIGMOIDS)
# Functions of one value at a time. They run in float, but between two grids they are cheap.
POINTWISE: tuple[Any, ...] = (F.gelu, torch.tanh, F.leaky_relu, F.elu, nn.PReLU, *NORMS, *ACTIVATIONS)
# Operations that may stay float: their kinds, name, reason, and the ONNX operators that they are exported as.
REASONS: tuple[tuple[tuple[Any, ...], str, str, tuple[str, ...]], ...] = (
    (
        (nn.LayerNorm, F.layer_norm),
        "layer norm",
        "it divides by a deviation that it finds anew for every token",
        ("LayerNormalization",),
    ),
    (
        (F.scaled_dot_product_attention, torch.matmul, torch.softmax),
        "attention",
        "a softmax between two products of activations, which hold no weights",
        ("MatMul", "Softmax", "Mul", "Add", "Div", "Concat", "Where"),
    ),
    ((nn.Embedding, F.pad), "embedding", "rows of a table, which no layer has computed", ("Gather", "Pad")),
    ((F.gelu,), "GELU", "runtimes have no integer kernel for it", ("Gelu", "Erf", "Mul", "Add", "Div")),
    ((torch.tanh,), "tanh", "runtimes have no integer kernel for it", ("Tanh",)),
    (NORMS, "BatchNorm", "it reads no layer's value alone, so no layer can take it", ("BatchNormalization",)),
    (SIGMOIDS, "sigmoid", "it reads floats", ("Sigmoid", "HardSigmoid")),
    (ACTIVATIONS, "ReLU", "it reads floats, and not all that reads it rounds it", ("Relu", "Clip")),
    (SUMS, "sum", "no layer reads it, or it adds floats: rounding it costs accuracy and wins no time", ("Add",)),
    (PRODUCTS, "product", "no layer reads it, or it multiplies floats", ("Mul",)),
    (CONCATENATIONS, "concatenation", "no layer reads it, or it joins floats", ("Concat",)),
    (
        (*MEANS, torch.mean),
        "mean",
        "it gives the network's result, or reads floats",
        ("GlobalAveragePool", "AveragePool", "ReduceMean"),
    ),
)


@dataclass(frozen=True)
class FloatOperation:
    """An operation that runs in float in an integer network: its node, its kind, why, and its ONNX operators."""

    node: str
    kind: str
    reason: str
    operators: tuple[str, ...]


def values(net: fx.GraphModule, shape: tuple[int, ...]) -> list[str]:
    """Return the nodes whose values get a grid, in order, for inputs of `shape` (without the batch).

    The network's result stays float: rounding it would only blur the logits.
    """
    propagate(net, shape)
    known: dict[fx.Node, bool] = {}
    with_grid: set[fx.Node] = set()
    todo = [value for node in net.graph.nodes for value in _around_layer(net, node)]
    while todo:  # from the layers back towards the input
        node = _origin(net, todo.pop())
        if node in with_grid or not _is_float(node):
            continue
        with_grid.add(node)
        operation = _before_activation(net, node)
        if is_a(net, operation, (*INTEGER, *POINTWISE)) and _can_be_integer(net, operation, known):
            todo += _inputs(operation)
    return [node.name for node in net.graph.nodes if node in with_grid and not _is_result(net, node)]


def float_operations(net: fx.GraphModule, shape: tuple[int, ...]) -> list[FloatOperation]:
    """Return the operations that a network with grids still computes in float, in the order in which they run."""
    propagate(net, shape)
    operations, constants = [], _constants(net)
    for node in net.graph.nodes:
        computes = node.op.startswith("call") and _is_float(node) and not is_a(net, node, PASSING)
        if not computes or isinstance(module_of(net, node), LAYERS) or is_grid(node) or node in constants:
            continue
        # Runtimes fuse a ReLU into the operation before it, so the grid after the ReLU counts.
        user = only_user(node)
        last = user if user is not None and is_a(net, user, ACTIVATIONS) else node
        between_grids = all(_on_grid(net, value) for value in _inputs(node)) and any(map(is_grid, last.users))
        if between_grids and is_a(net, node, (*INTEGER, *ACTIVATIONS)):
            continue
        if is_a(net, node, ACTIVATIONS) and not _is_result(net, node) and _is_fused(net, node):
            continue
        operations.append(_float_operation(net, node))
    return operations


def _is_fused(net: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether an activation runs as part of the layer before it, or of the grids after it."""
    return isinstance(module_of(net, node.all_input_nodes[0]), LAYERS) or all(map(is_grid, node.users))


def _float_operation(net: fx.GraphModule, node: fx.Node) -> FloatOperation:
    for kinds, kind, reason, operators in REASONS:
        if is_a(net, node, kinds):
            return FloatOperation(node.name, kind, reason, operators)
    module = module_of(net, node)
    kind = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
    return FloatOperation(node.name, kind, "r2 knows no integer form of it", ())


def _on_grid(net: fx.GraphModule, node: fx.Node) -> bool:
    return is_grid(_origin(net, node))


def _constants(net: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that depend on no input: parameters, and what is computed from parameters alone."""
    constants: set[fx.Node] = set()
    for node in net.graph.nodes:
        if node.op != "placeholder" and constants.issuperset(node.all_input_nodes):
            constants.add(node)
    return constants


def _around_layer(net: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """Yield the input of a layer, and for a convolution also its output, after the activation that follows it."""
    if not isinstance(module_of(net, node), LAYERS):
        return
    yield node.all_input_nodes[0]
    if not isinstance(module_of(net, node), nn.Linear):
        user = only_user(node)
        yield user if user is not None and is_a(net, user, ACTIVATIONS) else node


def _can_be_integer(net: fx.GraphModule, node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Say whether `node` can be computed from integers. `known` keeps the answers, since branches share nodes.

    A layer's output can be, and so can the output of an operation whose inputs all can be. A linear layer over tokens
    (three dimensions or more) gives floats: runtimes add its bias in float, after the product.
    """
    if node not in known:
        if isinstance(module_of(net, node), LAYERS):
            known[node] = not isinstance(module_of(net, node), nn.Linear) or len(_shape(node)) == 2
        elif is_a(net, node, (*INTEGER, *POINTWISE)):
            known[node] = all(_can_be_integer(net, value, known) for value in _inputs(node))
        elif is_a(net, node, PASSING):
            known[node] = _can_be_integer(net, node.all_input_nodes[0], known)
        else:
            known[node] = node.op in ("placeholder", "get_attr")
    return known[node]


def _origin(net: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the node that computes the value of `node`: skip reshapes and other nodes that only pass it on."""
    while is_a(net, node, PASSING):
        node = node.all_input_nodes[0]
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


def _is_result(net: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether the output of `node` is the network's result, without any computation in between."""
    return any(user.op == "output" or (is_a(net, user, PASSING) and _is_result(net, user)) for user in node.users)
