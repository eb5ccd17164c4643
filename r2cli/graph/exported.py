"""The graph of a network that torch.fx cannot trace, such as transformers' classifiers, read by torch.export.

torch.export gives a graph of operators and tensors, without modules. Here that graph is written again over the modules
of the network. An operator that takes the weights of a layer or a norm becomes a call of that module. All others become
functions of torch. So parameters keep their names, and the code that reads traced graphs can read this one.

A node is named by the module that it is computed in. torch.export numbers its nodes, but another release of torch may
number them differently, and a checkpoint's activations would then belong to other nodes.
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
# The function that stands for each operator, so that `operators.py` needs to know one name for each.
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
# Operators that do not change a value in evaluation, and are left out.
NOTHING = (ATEN.dropout.default, ATEN.dropout_.default, ATEN.clone.default, ATEN.contiguous.default, ATEN.alias.default)
RELU6 = (ATEN.hardtanh.default,)  # only with the bounds 0 and 6
# Checks that torch.export adds for itself.
UNREAD = (ATEN._assert_tensor_metadata.default,)


def read(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Return `model`, in evaluation mode, as a graph over the same modules.

    `example` is a batch (n, ...) with n > 1: torch.export takes a size of 1 for a constant. The graph accepts batches
    of any size. Raises what torch.export raises if it cannot read the network.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns about its own deprecated parts
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
    """Write the graph `old` of operators again, over the modules of `model`."""
    new, written, count = fx.Graph(), dict[fx.Node, Any](), Counter[str]()
    placeholder = new.placeholder(next(node.name for node in old.nodes if node.op == "placeholder"))
    placeholder.meta["dtype"] = example.dtype
    device = new.call_function(getattr, (placeholder, "device"))

    def translate(argument: Any) -> Any:
        # torch.export fixes the device of constants. The network must run on another, so they follow the input.
        if isinstance(argument, torch.device):
            return device
        return written[argument] if isinstance(argument, fx.Node) else argument

    def write(op: str, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        count[name] += 1
        return new.create_node(op, target, args, kwargs, name if count[name] == 1 else f"{name}_{count[name]}")

    for node in old.nodes:
        owner = _owner(model, node)
        if node.op == "placeholder":
            written[node] = placeholder
        elif node.op == "output":
            new.output(written[node.args[0][0]])
        elif node.target in NOTHING:
            written[node] = written[node.args[0]]
        elif owner is not None:
            operand = next(part for part in node.all_input_nodes if part.op != "get_attr")
            written[node] = write("call_module", owner, (written[operand],), {}, owner.replace(".", "_"))
        elif node.target in RELU6 and node.args[1:] == (0.0, 6.0):
            written[node] = write("call_function", F.relu6, (written[node.args[0]],), {}, _name(node))
        elif node.op == "get_attr" or (node.op == "call_function" and node.target not in UNREAD):
            args, kwargs = (map_aggregate(part, translate) for part in (node.args, node.kwargs))
            written[node] = write(node.op, FUNCTIONS.get(node.target, node.target), args, kwargs, _name(node))
    return new


def _owner(model: nn.Module, node: fx.Node) -> str | None:
    """Return the name of the module whose weights the operator of `node` takes, if it is one of `MODULES`."""
    parameters = [str(part.target) for part in node.all_input_nodes if part.op == "get_attr"]
    names = {name.rpartition(".")[0] for name in parameters}
    # The weights of one module and one other input: anything else is not a plain call of a layer.
    if node.op != "call_function" or len(names) != 1 or len(node.all_input_nodes) != len(parameters) + 1:
        return None
    name = names.pop()
    # Its forward must be the class's own: a derived class with another forward does more than this operator.
    return name if type(model.get_submodule(name)).forward in [kind.forward for kind in MODULES] else None


def _name(node: fx.Node) -> str:
    """Name `node` by the module that it is computed in, and by its operator."""
    if node.op == "get_attr":
        return str(node.target).replace(".", "_")
    # torch.export puts what belongs to no module into one of its own, whose path starts with an underscore.
    stack = (node.meta.get("nn_module_stack") or {}).values()
    within = [path for path, _ in stack if path and not path.startswith("_")]
    target = node.meta.get("in_place", node.target)
    what = getattr(target, "__name__", str(target)).partition(".")[0]
    return f"{within[-1]}.{what}".replace(".", "_") if within else what
