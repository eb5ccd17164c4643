"""The graph of a network that torch.fx cannot trace, such as transformers' classifiers, as torch.export reads it.

torch.export knows operators and tensors and no modules. Here its graph is written again over the network's own modules:
an operator on a layer's or a norm's weights becomes a call of that layer or norm, and the rest torch's functions, so
that parameters keep their names and all that reads graphs can read this one. A value is named by the module that it is
computed in, and not by a running number, which another release of torch would give otherwise.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from r2cli.graph import in_place

ATEN = torch.ops.aten
MODULES = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.Embedding)
FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    ATEN.add.Tensor: torch.add,
    ATEN.mul.Tensor: torch.mul,
    ATEN.matmul.default: torch.matmul,
    ATEN.mean.dim: torch.mean,
    ATEN.cat.default: torch.cat,
    ATEN.chunk.default: torch.chunk,
    ATEN.pad.default: F.pad,
    ATEN.relu.default: torch.relu,
    ATEN.leaky_relu.default: F.leaky_relu,
    ATEN.hardswish.default: F.hardswish,
    ATEN.hardsigmoid.default: F.hardsigmoid,
    ATEN.gelu.default: F.gelu,
    ATEN.layer_norm.default: torch.layer_norm,
    ATEN.silu.default: F.silu,
    ATEN.tanh.default: torch.tanh,
    ATEN.sigmoid.default: torch.sigmoid,
    ATEN.softmax.int: torch.softmax,
    ATEN.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    ATEN.max_pool2d.default: F.max_pool2d,
    ATEN.avg_pool2d.default: F.avg_pool2d,
    ATEN.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
    ATEN.view.default: torch.reshape,
    ATEN.reshape.default: torch.reshape,
    ATEN.flatten.using_ints: torch.flatten,
    ATEN.transpose.int: torch.transpose,
    ATEN.permute.default: torch.permute,
    ATEN.squeeze.dim: torch.squeeze,
    ATEN.unsqueeze.default: torch.unsqueeze,
    ATEN.select.int: torch.select,
    ATEN.sym_size.int: Tensor.size,
}
# They do nothing in evaluation, and nothing that anyone reads.
NOTHING = (ATEN.dropout.default, ATEN.dropout_.default, ATEN.clone.default, ATEN.contiguous.default, ATEN.alias.default)
RELU6 = (ATEN.hardtanh.default,)  # between 0 and 6
UNREAD = (ATEN._assert_tensor_metadata.default,)


def read(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """`model`, in evaluation, as a graph over the same modules, for any batch of inputs like `example` (n, ...), n > 1.

    Raises what torch.export raises where it cannot read the network.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export about its own parts
        batch = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(model.eval(), (example,), dynamic_shapes=batch).module()
    assert isinstance(program, fx.GraphModule)
    in_place.remove_operators(program.graph)
    net = fx.GraphModule(model, _over_modules(model, program.graph, example))
    net.graph.eliminate_dead_code()
    net.delete_all_unused_submodules()
    net.recompile()
    return net


def _over_modules(model: nn.Module, old: fx.Graph, example: Tensor) -> fx.Graph:
    """The graph `old` of operators, written over the modules of `model`."""
    new, now, seen = fx.Graph(), dict[fx.Node, Any](), Counter[str]()
    given = new.placeholder(next(node.name for node in old.nodes if node.op == "placeholder"))
    given.meta["dtype"] = example.dtype
    device = new.call_function(getattr, (given, "device"))

    def moved(one: Any) -> Any:
        # Where a constant is made is written into the graph: it is where the inputs are.
        return device if isinstance(one, torch.device) else now[one] if isinstance(one, fx.Node) else one

    def put(op: str, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        seen[name] += 1
        return new.create_node(op, target, args, kwargs, name if seen[name] == 1 else f"{name}_{seen[name]}")

    for node in old.nodes:
        owner = _owner(model, node)
        if node.op == "placeholder":
            now[node] = given
        elif node.op == "output":
            new.output(now[node.args[0][0]])
        elif node.target in NOTHING:
            now[node] = now[node.args[0]]
        elif owner is not None:
            read = next(part for part in node.all_input_nodes if part.op != "get_attr")
            now[node] = put("call_module", owner, (now[read],), {}, owner.replace(".", "_"))
        elif node.target in RELU6 and node.args[1:] == (0.0, 6.0):
            now[node] = put("call_function", F.relu6, (now[node.args[0]],), {}, _name(node))
        elif node.op == "get_attr" or (node.op == "call_function" and node.target not in UNREAD):
            args, kwargs = (map_aggregate(part, moved) for part in (node.args, node.kwargs))
            now[node] = put(node.op, FUNCTIONS.get(node.target, node.target), args, kwargs, _name(node))
    return new


def _owner(model: nn.Module, node: fx.Node) -> str | None:
    """The module of `MODULES` whose weights the operator of `node` takes."""
    held = [str(part.target) for part in node.all_input_nodes if part.op == "get_attr"]
    names = {name.rpartition(".")[0] for name in held}
    if node.op != "call_function" or len(names) != 1 or len(node.all_input_nodes) != len(held) + 1:
        return None
    name = names.pop()
    # One of them by what it does: a class derived from it may do more than its one operator.
    return name if type(model.get_submodule(name)).forward in [kind.forward for kind in MODULES] else None


def _name(node: fx.Node) -> str:
    """`node` by the module that it is computed in and by what it does."""
    if node.op == "get_attr":
        return str(node.target).replace(".", "_")
    # What belongs to no module is within one of torch.export's own, with an underscore.
    stack = (node.meta.get("nn_module_stack") or {}).values()
    within = [path for path, _ in stack if path and not path.startswith("_")]
    target = node.meta.get("in_place", node.target)
    what = getattr(target, "__name__", str(target)).partition(".")[0]
    return f"{within[-1]}.{what}".replace(".", "_") if within else what
