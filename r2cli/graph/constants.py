"""What a graph of torch.export's operators computes from parameters and constants alone: computed once.

Weight normalisation, masks, casts, relative positions: whatever does not depend on the network's input becomes a tensor
of its own. The operators run here as they run in the network, in their order, so what they write in place is seen by
those after them alone.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.node import map_arg

# They read the type of their first argument and not its values.
SHAPED = ("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like")


@dataclass(eq=False)
class Constant:
    """A tensor that depends on no input. `name` is its path in the network, or its module and operator."""

    value: Tensor
    name: str
    own: bool  # the network's own tensor, and not computed
    trained: bool  # whether it is a parameter or computed from one
    transposed: "Constant | None" = None  # the network's own tensor (2-D) that this is the transpose of
    arranged: "dict[Any, Constant]" = field(default_factory=dict)  # with axes in another order, and another shape


@dataclass
class _Folding:
    """The state of one pass: the values of constant nodes and the nodes that read them in the graph."""

    graph: fx.Graph
    constant: set[fx.Node]
    cloned: set[fx.Node]
    owned: Mapping[fx.Node, Constant]
    device: torch.device
    values: dict[fx.Node, Any] = field(default_factory=dict)
    sources: dict[fx.Node, frozenset[Constant]] = field(default_factory=dict)
    snapshots: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)
    shared: list[Constant] = field(default_factory=list)  # equal constants, such as the masks of attention, are one


def fold(program: fx.GraphModule, model: nn.Module) -> None:
    """Compute in `program`, torch.export's graph of `model`, what is constant; in place.

    What reads a constant reads a `get_attr` node, with the `Constant` in `meta["constant"]`, or a number.
    """
    graph, owned = program.graph, _owned(program, model)
    constant, written = _constant(graph, owned)
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    state = _Folding(graph, constant, written, owned, device)
    with torch.no_grad():
        for node in list(graph.nodes):
            if node in constant:
                _compute(state, node)
            elif node.op != "get_attr":
                read = functools.partial(_read, state, reader=node)
                node.args, node.kwargs = map_arg(node.args, read), map_arg(node.kwargs, read)
    for node in reversed(list(graph.nodes)):
        if node in constant:
            graph.erase_node(node)
        elif node.op == "get_attr" and node in owned:
            node.meta["constant"] = owned[node]


def path(node: fx.Node) -> str:
    """The path of the module that `node` of torch.export's graph is computed in; '' where that is the network."""
    # torch.export puts what belongs to no module into one of its own, whose path starts with an underscore.
    stack = (node.meta.get("nn_module_stack") or {}).values()
    within = [str(path).partition("@")[0] for path, _ in stack if path and not str(path).startswith("_")]
    return within[-1] if within else ""


def operator_name(target: Any) -> str:
    """'relu' of the operator aten.relu.default or the function F.relu."""
    if isinstance(target, OpOverload):
        return target._schema.name.partition("::")[2].rstrip("_")
    return str(getattr(target, "__name__", target)).partition(".")[0]


def _owned(program: fx.GraphModule, model: nn.Module) -> dict[fx.Node, Constant]:
    """The network's tensors by the nodes that read them; what has two names is one, under its first."""
    names = itertools.chain(model.named_parameters(), model.named_buffers())
    by_identity = {id(tensor): name for name, tensor in names}
    known, found = dict[int, Constant](), dict[fx.Node, Constant]()
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = _attribute(model, str(node.target))
        if not isinstance(tensor, Tensor):
            tensor = _attribute(program, str(node.target))
        if isinstance(tensor, Tensor):
            name = by_identity.get(id(tensor), str(node.target))
            new = Constant(tensor, name, True, isinstance(tensor, nn.Parameter))
            found[node] = known.setdefault(id(tensor), new)
    return found


def _attribute(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _constant(graph: fx.Graph, owned: Iterable[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that depend on no input, and those of the network's tensors that are written into.

    A tensor that anything of the input is written into is no constant, nor is what is made of it.
    """
    barred = set[fx.Node]()
    while True:
        constant, written, more = set[fx.Node](), set[fx.Node](), set[fx.Node]()
        for node in graph.nodes:
            if node in barred:
                continue
            if node.op == "get_attr" and node in owned:
                constant.add(node)
            elif node.op == "call_function" and _computable(node) and constant.issuperset(_read_by(node)):
                constant.add(node)
        for node in graph.nodes:
            for argument in _writes(node):
                root = _root(argument)
                if node in constant:
                    written.add(root)
                elif argument in constant:
                    more.add(root)
        if not more:
            return constant, written
        barred |= more


def _read_by(node: fx.Node) -> list[fx.Node]:
    if operator_name(node.target) in SHAPED:
        return [one for one in node.all_input_nodes if one is not node.args[0]]
    return node.all_input_nodes


def _computable(node: fx.Node) -> bool:
    """Whether the operator of `node` gives the same for the same arguments, and a size that is known."""
    if isinstance(node.target, OpOverload):
        name = operator_name(node.target)
        draws = torch.Tag.nondeterministic_seeded in node.target.tags and (name != "dropout" or node.args[2])
        if draws or name.startswith("_assert"):
            return False
        # A table is a layer with a weight of its own, also where its rows are the same for every input.
        if name == "embedding" and node.args[0].op == "get_attr":  # type: ignore[union-attr]
            return False
    values = node.meta.get("val")
    each = values if isinstance(values, tuple | list) else [values]
    return all(isinstance(size, int) for one in each if isinstance(one, Tensor) for size in one.shape)


def _writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that `node` writes into."""
    if not isinstance(node.target, OpOverload):
        return []
    named = {known.name: known for known in node.target._schema.arguments}
    given = [
        *zip(node.target._schema.arguments, node.args, strict=False),
        *((named[k], v) for k, v in node.kwargs.items()),
    ]
    writes = [value for known, value in given if known.alias_info is not None and known.alias_info.is_write]
    return [value for value in writes if isinstance(value, fx.Node)]


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory `node` is, or is a view of."""
    while isinstance(node.target, OpOverload) and node.args and isinstance(node.args[0], fx.Node):
        arguments = node.target._schema.arguments
        shares = arguments[0].alias_info is not None or operator_name(node.target) in ("reshape", "contiguous", "to")
        if not shares:
            break
        node = node.args[0]
    return node


def _compute(state: _Folding, node: fx.Node) -> None:
    if node.op == "get_attr":
        own = state.owned[node]
        value = own.value.detach()
        state.values[node] = value.clone() if node in state.cloned else value
        state.sources[node] = frozenset([own])
        return
    args, kwargs = map_arg(node.args, state.values.get), map_arg(node.kwargs, state.values.get)
    if operator_name(node.target) in SHAPED:
        like, given = node.meta["val"], node.args[0]
        whole = operator_name(node.target).endswith("_like")
        kind = given.meta["val"].dtype if isinstance(given, fx.Node) else like.dtype
        args = (torch.empty(like.shape if whole else (), dtype=kind, device=state.device), *args[1:])
    assert callable(node.target)
    state.values[node] = node.target(*args, **kwargs)
    state.sources[node] = frozenset[Constant]().union(*(state.sources[one] for one in _read_by(node)))
    for argument in _writes(node):
        state.sources[_root(argument)] |= state.sources[node]


def _read(state: _Folding, node: fx.Node, reader: fx.Node) -> Any:
    """What a node that is not constant reads in the place of `node`: a tensor as it is now, or a number."""
    if node not in state.constant:
        return node
    value = state.values[node]
    if not isinstance(value, Tensor):
        return value
    version = value._version
    key = (node, version)
    if key not in state.snapshots:
        made = state.owned[node] if node.op == "get_attr" and node not in state.cloned else _computed(state, node)
        with state.graph.inserting_before(reader):
            new = state.graph.create_node("get_attr", made.name, (), {}, node.name)
        new.meta = {"constant": made, "val": value}
        state.snapshots[key] = new
    return state.snapshots[key]


def _computed(state: _Folding, node: fx.Node) -> Constant:
    sources = state.sources[node] | state.sources.get(_root(node), frozenset())
    trained = [one for one in sources if one.trained]
    within = path(node)
    # The name of the one parameter that it is made of says more than that of an operator.
    name = trained[0].name if len(trained) == 1 else f"{within}.{operator_name(node.target)}".lstrip(".")
    floats = state.values[node].is_floating_point()
    own = state.owned.get(node.args[0]) if _transposes(node) else None  # type: ignore[arg-type]
    if own is not None and node.args[0] in state.cloned:
        own = None
    value = state.values[node].clone()
    if floats:  # a checkpoint holds finite numbers only
        value.clamp_(min=torch.finfo(value.dtype).min)
    new = Constant(value, name, False, bool(trained) and floats, own)
    if not trained:
        for known in state.shared:
            if known.value.dtype == value.dtype and torch.equal(known.value, value):
                return known
        state.shared.append(new)
    return new


def _transposes(node: fx.Node) -> bool:
    """Whether `node` is the transpose of a matrix."""
    name, rest = operator_name(node.target), node.args[1:]
    if not node.args or not isinstance(node.args[0], fx.Node) or node.meta["val"].ndim != 2:
        return False
    return name in ("t", "numpy_T") or (name in ("transpose", "permute") and sorted(_flat(rest)) in ([0, 1], [-2, -1]))


def _flat(given: Any) -> list[int]:
    return [one for each in given for one in (_flat(each) if isinstance(each, list | tuple) else [each])]
