"""Where grids go: which values are rounded so that the network runs on integers, and what stays float, and why.

A value gets a grid because a layer reads it, or because a convolution makes it: runtimes run a convolution on integers
only between two grids. A sum, product, concatenation, pooled mean or sigmoid whose value is wanted on a grid is run on
integers too, so its inputs get grids, where they can come from integers. What nobody wants on a grid (the residual
stream between a transformer's layer norms) stays float: rounding it would cost accuracy and win no time.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from r2cli.graph import attention
from r2cli.graph.edit import is_grid
from r2cli.graph.operators import ACTIVATIONS, LAYERS, NORMS, PASSING, is_a, module_of
from r2cli.graph.structure import only_user, propagate

# Runtimes have integer kernels for them.
SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
PRODUCTS: tuple[Any, ...] = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
CONCATENATIONS: tuple[Any, ...] = (torch.cat, torch.concat)
MEANS: tuple[Any, ...] = (
    *(nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean"),
)
SIGMOIDS: tuple[Any, ...] = (nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", nn.Hardsigmoid, F.hardsigmoid)
INTEGER = (*SUMS, *PRODUCTS, *CONCATENATIONS, *MEANS, *SIGMOIDS)
# Float functions of one value at a time: cheap between two grids.
POINTWISE: tuple[Any, ...] = (
    *(nn.GELU, F.gelu, nn.Tanh, torch.tanh, "tanh"),
    *(nn.LeakyReLU, F.leaky_relu, nn.ELU, F.elu, nn.PReLU, *NORMS, *ACTIVATIONS),
)
# Why what is left is float, and the ONNX operators that it is exported as.
REASONS: tuple[tuple[tuple[Any, ...], str, str, tuple[str, ...]], ...] = (
    (
        (nn.LayerNorm, F.layer_norm, torch.layer_norm),
        "layer norm",
        "it divides by a deviation that it finds anew for every token",
        ("LayerNormalization",),
    ),
    (
        (attention.attend, attention.attend_in_windows, F.scaled_dot_product_attention),
        "attention",
        "a softmax between two products of activations, which hold no weights",
        ("MatMul", "Softmax", "Mul", "Add", "Div", "Concat", "Where"),
    ),
    ((nn.Embedding, F.pad), "embedding", "rows of a table, which no layer has computed", ("Gather", "Pad")),
    ((nn.GELU, F.gelu), "GELU", "runtimes have no integer kernel for it", ("Gelu", "Erf", "Mul", "Add", "Div")),
    ((nn.Tanh, torch.tanh, "tanh"), "tanh", "runtimes have no integer kernel for it", ("Tanh",)),
    (NORMS, "BatchNorm", "it reads no layer's value alone, so no layer can take it", ("BatchNormalization",)),
    (SIGMOIDS, "sigmoid", "it reads floats", ("Sigmoid", "HardSigmoid")),
    (ACTIVATIONS, "ReLU", "it reads floats, and not all that reads it rounds it", ("Relu", "Clip")),
    (SUMS, "sum", "no layer reads it, or it adds floats: rounding it costs accuracy and wins no time", ("Add",)),
    (PRODUCTS, "product", "no layer reads it, or it multiplies floats", ("Mul",)),
    (
        (*CONCATENATIONS, attention.gather_patches),
        "concatenation",
        "no layer reads it, or it joins floats",
        ("Concat",),
    ),
    (
        MEANS,
        "mean",
        "it gives the network's result, or reads floats",
        ("GlobalAveragePool", "AveragePool", "ReduceMean"),
    ),
)


@dataclass(frozen=True)
class FloatOperation:
    """An operation that runs in float in a network on integers: its node, why, and its operators in ONNX."""

    node: str
    kind: str
    reason: str
    operators: tuple[str, ...]


def values(net: fx.GraphModule, shape: tuple[int, ...]) -> list[str]:
    """The nodes whose values get a grid, for inputs of `shape` (without batch). The network's result stays float."""
    propagate(net, shape)
    able: dict[fx.Node, bool] = {}
    wanted: set[fx.Node] = set()
    todo = [value for node in net.graph.nodes for value in _of_layer(net, node)]
    while todo:
        node = _origin(net, todo.pop())
        if node in wanted or not _is_float(node):
            continue
        wanted.add(node)
        computes = _before_activation(net, node)
        if is_a(net, computes, (*INTEGER, *POINTWISE)) and _able(net, computes, able):
            todo += _inputs(computes)
    return [node.name for node in net.graph.nodes if node in wanted and not _is_result(net, node)]


def float_operations(net: fx.GraphModule, shape: tuple[int, ...]) -> list[FloatOperation]:
    """What a network with grids on its values computes in float all the same, in the order in which it runs."""
    propagate(net, shape)
    found, constants = [], _constants(net)
    for node in net.graph.nodes:
        computes = node.op.startswith("call") and _is_float(node) and not is_a(net, node, PASSING)
        if not computes or isinstance(module_of(net, node), LAYERS) or is_grid(node) or node in constants:
            continue
        user = only_user(node)
        behind = user if user is not None and is_a(net, user, ACTIVATIONS) else node
        rounded = all(_on_grid(net, each) for each in _inputs(node)) and any(map(is_grid, behind.users))
        if rounded and is_a(net, node, (*INTEGER, *ACTIVATIONS)):
            continue
        if is_a(net, node, ACTIVATIONS) and not _is_result(net, node) and _is_fused(net, node):
            continue
        found.append(_float_operation(net, node))
    return found


def _is_fused(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an activation is part of the layer before it, or of the grids behind it."""
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
    """What is computed from parameters alone, and parameters: constants of the file."""
    found: set[fx.Node] = set()
    for node in net.graph.nodes:
        if node.op != "placeholder" and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _of_layer(net: fx.GraphModule, node: fx.Node) -> Iterator[fx.Node]:
    """What a layer reads, and what a convolution makes, the activation included."""
    if not isinstance(module_of(net, node), LAYERS):
        return
    yield node.all_input_nodes[0]
    if not isinstance(module_of(net, node), nn.Linear):
        user = only_user(node)
        yield user if user is not None and is_a(net, user, ACTIVATIONS) else node


def _able(net: fx.GraphModule, node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether the value of `node` can come from integers: a layer's behind anything that runs on them, or beside them.

    A linear layer over tokens (three dimensions and more) gives floats: its bias is added after the product.
    """
    if node not in known:
        if isinstance(module_of(net, node), LAYERS):
            known[node] = not isinstance(module_of(net, node), nn.Linear) or len(_shape(node)) == 2
        elif is_a(net, node, (*INTEGER, *POINTWISE)):
            known[node] = all(_able(net, each, known) for each in _inputs(node))
        elif is_a(net, node, PASSING):
            known[node] = _able(net, node.all_input_nodes[0], known)
        else:
            known[node] = node.op in ("placeholder", "get_attr")
    return known[node]


def _origin(net: fx.GraphModule, node: fx.Node) -> fx.Node:
    """What computes the value of `node`, behind what only passes it on."""
    while is_a(net, node, PASSING):
        node = node.all_input_nodes[0]
    return node


def _before_activation(net: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node that a ReLU is fused into; `node` itself where it is none."""
    if not is_a(net, node, ACTIVATIONS):
        return node
    before = node.all_input_nodes[0]
    return before if only_user(before) is node else node


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [each for each in node.all_input_nodes if _is_float(each)]


def _is_float(node: fx.Node) -> bool:
    """Whether the node's value is a tensor of floats, or a tuple of them."""
    meta = node.meta.get("tensor_meta")
    first = meta[0] if isinstance(meta, tuple | list) and not hasattr(meta, "dtype") and meta else meta
    return getattr(first, "dtype", None) == torch.float32


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _is_result(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` reaches the output through nothing that computes."""
    return any(user.op == "output" or (is_a(net, user, PASSING) and _is_result(net, user)) for user in node.users)
