"""In-place operations written out of place, with what they mean: who reads the same memory later reads the new value.

A graph that is edited (a grid on a value, a norm folded, a swish written as a product) gives tensors of their own to
what shared one before. So after `remove` nothing in a graph writes into a tensor, and each node reads the value that it
had read in the network itself: the value of an in-place operation, and views of it made anew.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from r2cli.errors import R2Error


class Memory(Enum):
    """What a node does with the memory of its first argument."""

    OWN = "its value has memory of its own"
    SAME = "it gives the tensor itself"
    WRITES = "it writes into the tensor, and gives it"
    VIEW = "its value is a part or another shape of the tensor, in the same memory"
    PERHAPS = "a view where strides allow, else a copy"


SAME = ("requires_grad_", "detach_", "detach", "alias")
PERHAPS = ("reshape", "reshape_as", "flatten", "ravel", "contiguous", "to", "type_as")


class AliasLost(R2Error):
    """A graph that reads memory after an in-place operation has changed it in a way that cannot be followed."""


def remove_operators(graph: fx.Graph) -> None:
    """Write every in-place operator of torch.export's graph out of place; in place. Raises AliasLost."""
    _remove(graph, _operator, _operate_out_of_place)


@dataclass
class _Tensor:
    """One tensor of the network as it runs: the node that made it, and of which other it is a view."""

    made: fx.Node
    base: "_Tensor | None" = None
    kind: Memory = Memory.OWN
    written: bool = False
    outdated: bool = False  # a view whose base was written: made anew where it is read
    lost: str = ""  # the operation after which its value cannot be told

    def __post_init__(self) -> None:
        self.holder = self.made  # the node that has its value now
        self.views: list[_Tensor] = []
        if self.base is not None:
            self.base.views.append(self)

    def below(self) -> Iterator["_Tensor"]:
        for view in self.views:
            yield view
            yield from view.below()


def _remove(graph: fx.Graph, memory: Callable[[fx.Node], Memory], out_of_place: Callable[[fx.Node], None]) -> None:
    tensors: dict[fx.Node, _Tensor] = {}

    def current(tensor: _Tensor, reader: fx.Node) -> fx.Node:
        if tensor.lost:
            raise AliasLost(
                f"the in-place operation '{tensor.lost}' changes memory that '{reader.name}' reads through another view"
            )
        if tensor.outdated:
            assert tensor.base is not None
            base = current(tensor.base, reader)
            with graph.inserting_before(reader):
                again = graph.node_copy(tensor.made)
            again.args = (base, *tensor.made.args[1:])
            tensor.holder, tensor.outdated, tensor.written = again, False, True
        return tensor.holder

    for node in list(graph.nodes):
        kind, first = memory(node), node.args[0] if node.args else None
        own = tensors[first] if isinstance(first, fx.Node) else None

        def read(one: fx.Node, reader: fx.Node = node) -> fx.Node:
            tensor = tensors[one]
            return current(tensor, reader) if tensor.written or tensor.outdated or tensor.lost else one

        node.args, node.kwargs = map_arg(node.args, read), map_arg(node.kwargs, read)
        if own is None or kind is Memory.OWN:
            tensors[node] = _Tensor(node)
        elif kind in (Memory.VIEW, Memory.PERHAPS):
            tensors[node] = _Tensor(node, own, kind)
        else:
            tensors[node] = own
        if own is not None and kind is Memory.WRITES:
            out_of_place(node)
            _write(own, node)


def _write(tensor: _Tensor, node: fx.Node) -> None:
    """Note that `node` has written into `tensor`: whose value it holds, and what becomes of its views and its base."""
    tensor.holder, tensor.written = node, True
    for view in tensor.below():
        view.outdated = view.kind is Memory.VIEW
        view.lost = "" if view.outdated else node.name
    part = tensor
    while part.base is not None:
        part.base.lost = node.name
        for other in part.base.views:
            if other is not part and not _apart(other.made, part.made):
                for each in (other, *other.below()):
                    each.lost = node.name
        part = part.base


def _apart(one: fx.Node, other: fx.Node) -> bool:
    """Whether two views of one value are different parts of a tuple."""
    both = one.target is operator.getitem and other.target is operator.getitem
    return both and isinstance(one.args[1], int) and isinstance(other.args[1], int) and one.args[1] != other.args[1]


def _operator(node: fx.Node) -> Memory:
    if node.target is operator.getitem:
        return Memory.VIEW
    if not isinstance(node.target, OpOverload) or not node.target._schema.arguments:
        return Memory.OWN
    name = node.target._schema.name.partition("::")[2]
    alias = node.target._schema.arguments[0].alias_info
    if name.rstrip("_") == "dropout" or name in SAME:
        return Memory.SAME
    if alias is None:
        return Memory.OWN
    if alias.is_write:
        return Memory.WRITES
    return Memory.PERHAPS if name in PERHAPS else Memory.VIEW


def _operate_out_of_place(node: fx.Node) -> None:
    assert isinstance(node.target, OpOverload)
    name = node.target._schema.name.partition("::")[2]
    known = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    if known is not None and node.target._overloadname in known.overloads():
        node.target = getattr(known, node.target._overloadname)
