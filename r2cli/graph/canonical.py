"""torch.export's graph of operators, written again over plain modules and the functions of `functions.py`."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.fx.node import map_arg

from r2cli.graph import constants, in_place
from r2cli.graph.constants import operator_name
from r2cli.graph.contractions import CONTRACTIONS
from r2cli.graph.plain_modules import CONVOLUTIONS, LAYER_RULES
from r2cli.graph.rules import RULES, bind, plain
from r2cli.graph.writer import Unknown, Writer, is_number, is_tensor

LAYERS = {**LAYER_RULES, **CONTRACTIONS}
# Operators that run a part of the graph in another way, and where in their arguments the part is.
WRAPPED = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}
UNREAD = ("_assert", "sym_constrain", "_guards")  # checks that torch.export adds for itself


def rewrite(program: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """The canonical graph of `model`, in evaluation, from torch.export's `program` of it, which is changed.

    Raises in_place.AliasLost, and Unknown for what has no canonical form.
    """
    _inline(program)
    constants.fold(program, model)
    in_place.remove_operators(program.graph)
    _pad_in_convolutions(program.graph)
    _keep_rows_apart(program.graph)
    _join_rows_before_norms(program.graph)
    writer = Writer(program.graph, model)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            new = writer.create("placeholder", node.target, (), {}, node.name)
            if is_tensor(node):
                new.meta["dtype"] = node.meta["val"].dtype
            writer.written[node] = new
        elif node.op == "output":
            given = [writer.value(one) for one in node.args[0] if one is not None]
            writer.graph.output(given[0] if len(given) == 1 else tuple(given))
        elif node.op == "call_function" and not is_number(node):
            _write(writer, node)
    return writer.module()


def _write(writer: Writer, node: fx.Node) -> None:
    name = operator_name(node.target)
    if name.startswith(UNREAD):
        return
    writer.start(node)
    if node.target is operator.getitem:
        parts, index = writer.value(node.args[0]), node.args[1]
        alone = isinstance(parts, tuple)
        writer.written[node] = parts[index] if alone else writer.call(operator.getitem, parts, index)
        return
    if not isinstance(node.target, OpOverload):
        raise Unknown(f"'{name}' is no operator of torch")
    arguments = bind(node)
    made = LAYERS[name](writer, node, arguments) if name in LAYERS else None
    writer.written[node] = made if made is not None else RULES.get(name, plain)(writer, node, arguments)


def _inline(program: fx.GraphModule) -> None:
    """Write what runs without autocast, or without gradients, into the graph itself; in place."""
    for node in list(program.graph.nodes):
        name = operator_name(node.target)
        if name not in WRAPPED:
            continue
        first = WRAPPED[name]
        if name == "wrap_with_autocast" and node.args[2]:
            raise Unknown("it computes in another type by autocast")
        part = node.args[first]
        inner = program.get_submodule(part.target)
        assert isinstance(inner, fx.GraphModule)
        _inline(inner)
        known = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), node.args[first + 1 :], strict=True))
        with program.graph.inserting_before(node):
            for one in inner.graph.nodes:
                if one.op == "output":
                    results = map_arg(one.args[0], known.get)
                elif one.op != "placeholder":
                    known[one] = program.graph.node_copy(one, known.__getitem__)
                    if one.op == "get_attr":
                        known[one].target = f"{part.target}.{one.target}"
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            program.graph.erase_node(user)
        program.graph.erase_node(node)


def _pad_in_convolutions(graph: fx.Graph) -> None:
    """Write zeros that are padded on both sides alike, for one convolution alone, as its padding; in place."""
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload) or operator_name(node.target) not in CONVOLUTIONS:
            continue
        a = bind(node)
        pad = a.get("input")
        if "transpose" in operator_name(node.target) or isinstance(a["padding"], str) or any(a["padding"]):
            continue
        if not isinstance(pad, fx.Node) or not isinstance(pad.target, OpOverload) or len(pad.users) != 1:
            continue
        sizes = _zeros(pad)
        if sizes and len(sizes) == 2 * (pad.meta["val"].ndim - 2) and sizes[::2] == sizes[1::2] and min(sizes) >= 0:
            a |= {"input": pad.args[0], "padding": list(reversed(sizes[::2]))}
            node.args, node.kwargs = tuple(a[each.name] for each in node.target._schema.arguments), {}
            graph.erase_node(pad)


def _keep_rows_apart(graph: fx.Graph) -> None:
    """Let a linear layer read (n, tokens, ...) where it is given (n * tokens, ...) for it alone; in place.

    nn.MultiheadAttention does so. Of two dimensions a layer's outputs would seem to be a row of the batch.
    """
    for node in list(graph.nodes):
        if operator_name(node.target) != "linear" or len(node.users) != 1:
            continue
        before, after = node.args[0], next(iter(node.users))
        if not _reshapes(before) or not _reshapes(after) or len(before.users) != 1 or before.meta["val"].ndim != 2:
            continue
        rows, width = after.meta["val"].shape[:-1], before.meta["val"].shape[-1]
        if after.meta["val"].ndim > 2 and after.meta["val"].shape[-1] == node.meta["val"].shape[-1]:
            before.meta["val"] = before.meta["val"].new_empty((*rows, width))
            node.meta["val"] = after.meta["val"]
            after.replace_all_uses_with(node)
            graph.erase_node(after)


def _join_rows_before_norms(graph: fx.Graph) -> None:
    """Let a linear layer read (n * tokens, features) where a BatchNorm reads its outputs so; in place.

    LeViT does so. The norm then follows the layer, and is folded into it.
    """
    for node in list(graph.nodes):
        rows: Any = node.args[0] if operator_name(node.target) == "batch_norm" else None
        if not _reshapes(rows) and operator_name(getattr(rows, "target", "")) != "flatten":
            continue
        linear, flat = rows.args[0], rows.meta["val"]
        shape = linear.meta["val"].shape
        if operator_name(linear.target) != "linear" or len(shape) == 2 or flat.ndim != 2 or flat.shape[1] != shape[-1]:
            continue
        if any(user is not rows and operator_name(user.target) != "reshape_as" for user in linear.users):
            continue
        given = linear.args[0]
        before = given.meta["val"]
        with graph.inserting_before(linear):
            joined = graph.call_function(torch.ops.aten.flatten.using_ints, (given, 0, before.ndim - 2))
        joined.meta = rows.meta | {"val": before.new_empty((flat.shape[0], before.shape[-1]))}
        linear.args, linear.meta["val"] = (joined, *linear.args[1:]), flat
        rows.replace_all_uses_with(linear)
        graph.erase_node(rows)


def _reshapes(node: object) -> bool:
    return isinstance(node, fx.Node) and operator_name(node.target) in ("view", "reshape", "_unsafe_view")


def _zeros(node: fx.Node) -> Sequence[int]:
    """The sizes, as F.pad has them, of zeros around the last dimensions; empty for another operator."""
    if operator_name(node.target) not in ("pad", "constant_pad_nd"):
        return ()
    a = bind(node)
    given: Sequence[int] = a["pad"] if a.get("mode", "constant") == "constant" and not a.get("value") else ()
    return given
