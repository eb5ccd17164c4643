"""Writes a canonical graph: its nodes with their names, its modules and tensors with their paths.

A node is named by the module that it is computed in and its function; in a module of torch's own by the module alone.
torch.export numbers its nodes, but another release of torch may number them differently, and a checkpoint's activations
would then belong to other nodes.
"""

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from r2cli.graph import constants
from r2cli.graph.constants import Constant, operator_name
from r2cli.models.onnx_network import holder

METHODS = frozenset(dir(nn.Module()))  # names that a module has for itself: no part of it may have one

# Sizes that depend on the batch are made of these.
ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "PythonMod": operator.mod,
    "Mod": operator.mod,
}


class Unknown(Exception):
    """A graph that has no canonical form; the message is the reason."""


class Writer:
    """The canonical graph of `model` while it is written from `old`, torch.export's."""

    def __init__(self, old: fx.Graph, model: nn.Module) -> None:
        self.model, self.graph = model, fx.Graph()
        self.inputs = [node for node in old.nodes if node.op == "placeholder" and is_tensor(node)]
        self.written = dict[fx.Node, Any]()  # by the node of the old graph
        self.within = ""  # the path of the module that the node of the old graph is computed in
        self.modules = dict[str, nn.Module]()
        self.calls = dict[Any, str]()  # the path of a module by what it was made of
        self.tensors = dict[str, Tensor]()
        self.read_weights = dict[str, fx.Node]()  # of recurrent layers, by the path of the module that gives each
        self._names = dict[Constant, str]()
        self._parameters = dict[Constant, nn.Parameter]()
        self._count = Counter[str]()
        self._nodes = set[str]()  # names of nodes: a file has one space of names for values and tensors
        # torch's own modules that compute one thing: ReLU, MaxPool2d, Flatten.
        self._simple = {
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if name and type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None
        }
        self._alone = False
        # Paths that tensors of the network have: what is computed gets another.
        self._taken = {one.name for one in _constants(old) if one.own}

    def start(self, node: fx.Node) -> None:
        """All that is written now is what `node` of the old graph computes."""
        self.within = constants.path(node)
        self._alone = self.within in self._simple

    def create(self, op: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> fx.Node:
        name = name.replace(".", "_")
        name = f"{name}_" if name in METHODS else name
        count = self._count[name]
        self._count[name] += 1
        node = self.graph.create_node(op, target, tuple(args), dict(kwargs), f"{name}_{count}" if count else name)
        self._nodes.add(node.name)
        return node

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of `function` on values of the new graph, named by the module that is written and the function."""
        if not self._alone:
            return self.part(function, *args, **kwargs)
        return self.create("call_function", function, args, kwargs, self.within)

    def part(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of `function` as one of several that a module makes."""
        name = f"{self.within}.{operator_name(function)}".lstrip(".")
        return self.create("call_function", function, args, kwargs, name)

    def value(self, given: Any) -> Any:
        """What stands in the new graph for an argument, or arguments, of the old one."""
        return map_aggregate(given, self._value)

    def _value(self, given: Any) -> Any:
        if isinstance(given, torch.device):
            return self.create("call_function", getattr, (self.written[self.inputs[0]], "device"), {}, "device")
        if isinstance(given, torch.SymInt):
            return self.number(given)
        if not isinstance(given, fx.Node):
            return given
        if given in self.written or given.graph is self.graph:
            return self.written.get(given, given)
        if "constant" in given.meta:
            return self.attribute(given.meta["constant"])
        if not is_number(given):
            raise Unknown(f"'{given.name}' is no tensor")
        return self.number(given.meta["val"])

    def number(self, given: Any) -> Any:
        """A size, where it depends on the batch as the sums and products that it is of the batch's size."""
        return self._expression(given.node.expr) if isinstance(given, torch.SymInt) else given

    def _expression(self, expression: Any) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            for given in self.inputs:
                for dim, size in enumerate(given.meta["val"].shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == expression:
                        return self.create("call_function", Tensor.size, (self.written[given], dim), {}, "size")
        kind = ARITHMETIC.get(expression.func.__name__)
        if kind is None:
            raise Unknown(f"the size {expression} depends on the batch in a way that r2 does not know")
        total, *rest = (self._expression(part) for part in expression.args)
        for part in rest:
            total = self.create("call_function", kind, (total, part), {}, "size")
        return total

    # --- modules and tensors ---

    def attribute(self, constant: Constant) -> fx.Node:
        """A node that reads a constant as it is."""
        if constant not in self._names:
            name, count = constant.name, 1
            if not constant.own and name.rpartition(".")[2] in METHODS:
                name = f"{name}_"
            while name in self.tensors or (not constant.own and (name in self._taken or name in self._nodes)):
                name, count = f"{constant.name}_{count}", count + 1
            self._names[constant] = name
            self.tensors[name] = self.parameter(constant) if constant.trained else constant.value
        name = self._names[constant]
        return self.create("get_attr", name, (), {}, name)

    def parameter(self, constant: Constant) -> nn.Parameter:
        """The network's own parameter, or one of a tensor that was computed."""
        if isinstance(constant.value, nn.Parameter):
            return constant.value
        if constant not in self._parameters:
            trained = constant.trained and constant.value.is_floating_point()
            self._parameters[constant] = nn.Parameter(constant.value, requires_grad=trained)
        return self._parameters[constant]

    def layer(self, made_of: Any, of: Constant | None, make: Callable[[str], nn.Module], what: str) -> str:
        """The path of the module that `make` makes of its path, if none was made of the same before.

        `of` is the weight that names it; a module without, or of one that is computed, has the path of the module that
        computes it. `what` is the name of its function.
        """
        if of is None:
            made_of = (made_of, self.within)
        if made_of not in self.calls:
            self.calls[made_of] = path = self._free(of, what)
            self.modules[path] = make(path)
        return self.calls[made_of]

    def _free(self, of: Constant | None, what: str) -> str:
        """A path for a module that no other has."""
        wanted = [self.within, f"{self.within}.{what}".lstrip(".")]
        if of is not None and of.own and not of.name.endswith("bias"):  # which is another module's, and equal
            wanted = [_layer_path(of.name), *wanted]
        elif of is not None and of.name.endswith("weight"):  # of one weight: a part of it, masked, or transposed
            wanted = [_layer_path(of.name)]
        wanted = [name for name in wanted if name]
        wanted += [f"{wanted[-1]}_{count}" for count in range(1, len(self.modules) + len(self._taken) + 2)]
        taken = set() if of is not None and of.own else self._taken
        return next(name for name in wanted if name not in self.modules and f"{name}.weight" not in taken)

    def module(self) -> fx.GraphModule:
        """The graph as a module, with its modules and tensors."""
        root = nn.Module()
        for name in sorted({*self.modules, *self.tensors}):  # what holds others stands before them
            parent, _, last = name.rpartition(".")
            own = holder(root, parent)
            if name in self.modules:
                own.add_module(last, self.modules[name])
            else:
                tensor = self.tensors[name]
                if isinstance(tensor, nn.Parameter):
                    own.register_parameter(last, tensor)
                else:
                    own.register_buffer(last, tensor)
        net = fx.GraphModule(root, self.graph, type(self.model).__name__)
        net.graph.eliminate_dead_code()
        net.delete_all_unused_submodules()
        net.recompile()
        return net.eval()


def _layer_path(name: str) -> str:
    """The path of the layer whose weight is `name`: 'conv' of 'conv.weight', 'a.in_proj' of 'a.in_proj_weight'."""
    parent, _, last = name.rpartition(".")
    if last == "weight":
        return parent
    return f"{parent}.{last.removesuffix('_weight')}".lstrip(".")


def _constants(graph: fx.Graph) -> list[Constant]:
    return [node.meta["constant"] for node in graph.nodes if "constant" in node.meta]


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float)
