"""Edits of a graph: put modules on values, take nodes out."""

from collections.abc import Mapping

from torch import fx, nn

from r2cli.errors import InputError
from r2cli.graph.operators import LAYERS, PASSING, TUPLES, is_a, module_of

GRIDS = "grids."  # the modules on edges, by the name of the node whose value they round
# The end of a name of a second grid on a value, behind the first, which the layers that read the value read alone.
FOR_LAYERS, LAYER_GRIDS = "/layers", "layer_grids."


def over_same_modules(net: fx.GraphModule) -> fx.GraphModule:
    """A graph like `net` that can be edited by itself; its modules and parameters are those of `net`."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(net.graph, {}))
    return fx.GraphModule(net, graph, type(net).__name__)


def insert(net: fx.GraphModule, modules: Mapping[str, nn.Module]) -> None:
    """Put a module on the value of each named node, in the place of one that is there: all then read the module. The
    network's results do so only where all of them have one.

    With `FOR_LAYERS` at the end of its name the layers alone read it, and it reads what they read before.
    Raises InputError for a name that no node has.
    """
    nodes = {node.name: node for node in net.graph.nodes}
    there = {str(node.target): node for node in net.graph.nodes if node.op == "call_module"}
    gives = all(_origin(net, node).name in modules for node in net.graph.output_node().all_input_nodes)
    for name in sorted(modules, key=lambda name: name.endswith(FOR_LAYERS)):
        value = name.removesuffix(FOR_LAYERS)
        target = f"{GRIDS if value == name else LAYER_GRIDS}{value}"
        if target in there:
            net.set_submodule(target, modules[name])
            continue
        if value not in nodes:
            raise InputError(
                f"the network has no value '{value}' to put a grid on: the checkpoint is of another network"
            )
        net.add_submodule(target, modules[name])
        read = nodes[value] if value == name else there.get(f"{GRIDS}{value}", nodes[value])
        readers = [user for user in read.users if gives or user.op != "output"]
        users = [user for user in readers if value == name or isinstance(module_of(net, user), LAYERS)]
        with net.graph.inserting_after(read):
            there[target] = net.graph.call_module(target, (read,))
        for user in users:
            user.replace_input_with(read, there[target])
    net.recompile()


def source(net: fx.GraphModule, node: fx.Node) -> str | None:
    """The name of the node whose value `node` reads, behind what only passes it on; None if it has no grid."""
    read = node.args[0] if node.args else None
    while isinstance(read, fx.Node) and is_a(net, read, PASSING):
        read = read.args[0] if read.args else None
    if not isinstance(read, fx.Node) or not is_grid(read):
        return None
    target = str(read.target)
    if target.startswith(LAYER_GRIDS):
        return f"{target.removeprefix(LAYER_GRIDS)}{FOR_LAYERS}"
    return target.removeprefix(GRIDS)


def _origin(net: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node that computes the value of `node`, behind what only passes it on, and behind modules on it."""
    while (is_a(net, node, PASSING) or is_grid(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def is_grid(node: fx.Node) -> bool:
    """Whether `node` rounds a value to its grid."""
    return node.op == "call_module" and str(node.target).startswith((GRIDS, LAYER_GRIDS))


def repeat_grids(net: fx.GraphModule) -> None:
    """Put a value's grid behind everything that passes the value on as well; in place.

    It changes no value: a maximum or a flatten of what is on a grid is on it. Runtimes run such a node on integers only
    where they find the grid on both of its sides.
    """
    for node in list(net.graph.nodes):
        where = source(net, node) if is_a(net, node, PASSING) and not is_a(net, node, TUPLES) else None
        if where is not None:
            with net.graph.inserting_after(node):
                call = net.graph.call_module(f"{GRIDS}{where}", (node,))
            node.replace_all_uses_with(call, delete_user_cb=lambda user, own=call: user is not own)
    net.recompile()


def bypass(net: fx.GraphModule, node: fx.Node) -> None:
    before = node.args[0]
    assert isinstance(before, fx.Node)
    node.replace_all_uses_with(before)
    net.graph.erase_node(node)
