"""Products with a weight of any shape, as einsum, matmul, tensordot and nn.Bilinear have them: a layer, and axes moved.

A product sums over the axes that a value and its weight share and that the result lacks. Axes that all three have are
groups: with them the layer is a convolution of one place, without them a linear layer. Where nothing is summed there is
no layer: the product is one element by element.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx

from r2cli.graph.constants import Constant, operator_name
from r2cli.graph.plain_modules import (
    constant_of,
    convolution_of_one_place,
    linear_layer,
    product_and_bias,
    transpose,
    weight_name,
)
from r2cli.graph.rules import with_base
from r2cli.graph.writer import Unknown, Writer

Arguments = Mapping[str, Any]
Axes = Sequence[Hashable]  # the name of each axis


def einsum(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    tensors = a["tensors"]
    weights = [one for one in map(constant_of, tensors) if one is not None and one.trained]
    if len(tensors) != 2 and weights:
        raise Unknown(f"its einsum multiplies the weight '{weights[0].name}' with more than one tensor")
    if len(tensors) != 2:
        return None
    first, second, result = _named(a["equation"], [one.meta["val"].ndim for one in tensors])
    return _product(writer, node, (tensors[0], first), (tensors[1], second), result)


def _named(equation: str, ranks: Sequence[int]) -> list[list[Hashable]]:
    """The names of the axes of each tensor and of the result. An ellipsis stands for axes counted from the last."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    parts = given.split(",")
    letters = [part.replace("...", "") for part in parts]
    dots = [rank - len(part) for rank, part in zip(ranks, letters, strict=True)]
    if not arrow:
        together = "".join(letters)
        result = ("..." if "..." in given else "") + "".join(x for x in sorted(set(together)) if together.count(x) == 1)
    return [_spread(part, size) for part, size in zip([*parts, result], [*dots, max(dots)], strict=True)]


def _spread(part: str, size: int) -> list[Hashable]:
    before, dots, behind = part.partition("...")
    return [*before, *(range(-size, 0) if dots else ()), *behind]


def matmul(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    """Also mm, bmm and mv: rows by columns, and all axes before them are pairs, where one may be of size 1."""
    return _matmul(writer, node, a["self"], a.get("other", a.get("mat2", a.get("vec"))))


def added_product(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node:
    """addmm and baddbmm: beta * input + alpha * (one @ other)."""
    layer = product_and_bias(writer, node, a) if "mat1" in a else None
    if layer is not None:
        return layer
    base, *both = list(a.values())[:3]
    product = _matmul(writer, node, *both) or writer.call(torch.matmul, *writer.value(both))
    found: fx.Node = with_base(writer, product, writer.value(base), a)
    return found


def _matmul(writer: Writer, node: fx.Node, *given: fx.Node) -> fx.Node | None:
    ranks = [one.meta["val"].ndim for one in given]
    left: list[Hashable] = ["row", "sum"]
    right: list[Hashable] = ["sum", "column"]
    rows = (left[-min(ranks[0], 2) :], right[: min(ranks[1], 2)])
    both = zip(ranks, rows, strict=True)
    first, second = ([*range(len(own) - rank, 0), *own] for rank, own in both)
    longer = range(2 - max(2, *ranks), 0)
    result = [*longer, *(name for name in ("row", "column") if name in first or name in second)]
    return _product(writer, node, (given[0], first), (given[1], second), result)


def tensordot(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    names = count()
    first, second = ([next(names) for _ in range(a[key].meta["val"].ndim)] for key in ("self", "other"))
    for one, two in zip(a["dims_self"], a["dims_other"], strict=True):
        second[two] = first[one]
    result = [name for name in (*first, *second) if not (name in first and name in second)]
    return _product(writer, node, (a["self"], first), (a["other"], second), result)


def bilinear(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    """A linear layer of the first input, and the product of what it gives with the second."""
    weight, second = constant_of(a["weight"]), writer.value(a["input2"])
    if weight is None:
        return None
    rows = [*range(a["input1"].meta["val"].ndim - 1)]
    found = _layer(writer, node, (a["input1"], [*rows, "one"]), (weight, ["out", "one", "two"]), [*rows, "out", "two"])
    rank = len(rows)
    both = writer.call(torch.matmul, found, writer.call(torch.unsqueeze, second, rank + 1))
    result = writer.call(torch.squeeze, both, (rank + 1,))
    return result if a["bias"] is None else writer.call(torch.add, result, writer.value(a["bias"]))


def _product(
    writer: Writer, node: fx.Node, first: tuple[fx.Node, Axes], second: tuple[fx.Node, Axes], result: Axes
) -> fx.Node | None:
    """The product of two tensors if one is a constant; None where both are values. Raises Unknown for a parameter
    where no layer computes it."""
    if constant_of(first[0]) is not None:
        first, second = second, first
    weight = constant_of(second[0])
    if weight is None or constant_of(first[0]) is not None or not weight.value.is_floating_point():
        return None
    found = _layer(writer, node, first, (weight, second[1]), result)
    if found is None and weight.trained:
        raise Unknown(f"its {operator_name(node.target)} with the weight '{weight.name}' is no layer")
    return found


@dataclass(frozen=True)
class Contraction:
    """What each axis of a value and of a weight does, and how long it is (a number, or what follows the batch)."""

    named: Axes  # the value's, in its order
    own: Axes  # the weight's, in its order
    result: Axes
    size: Mapping[Hashable, Any]
    groups: list[Hashable]  # both have it, and the result
    summed: list[Hashable]  # both have it, and the result does not
    made: list[Hashable]  # of the weight and the result
    kept: list[Hashable]  # of the value and the result

    def total(self, axes: Axes) -> Any:
        return math.prod(self.size[axis] for axis in axes)

    def sizes(self, axes: Axes) -> list[Any]:
        return [self.size[axis] for axis in axes]


def _contraction(
    named: Axes, before: Sequence[Any], own: Axes, held: Sequence[int], result: Axes
) -> Contraction | None:
    """None where an axis is twice in one tensor, or the weight is summed alone. `before` and `held` are sizes."""
    named, own = _repeated_apart(named, before, own, held)
    size = dict(zip(own, held, strict=True)) | dict(zip(named, before, strict=True))
    shared = [axis for axis in own if axis in named]
    groups, summed = [axis for axis in shared if axis in result], [axis for axis in shared if axis not in result]
    made, kept = ([x for x in axes if x in result and x not in shared] for axes in (own, named))
    idle = {*named, *own} - {*shared, *made, *kept}
    if any(size[axis] != 1 for axis in idle) or len(set(named)) < len(named) or len(set(own)) < len(own):
        return None
    return Contraction(named, own, result, size, groups, summed, made, kept)


def _layer(
    writer: Writer, node: fx.Node, value: tuple[fx.Node, Axes], weight: tuple[Constant, Axes], result: Axes
) -> fx.Node | None:
    """A value times a weight, with the result's axes in the order of `result`; None where it has another form.

    It is a layer, or a product element by element where nothing is summed.
    """
    given, constant = writer.value(value[0]), weight[0]
    given, named, sizes = _without_lone_axes(writer, given, value[1], value[0].meta["val"].shape, weight[1], result)
    c = _contraction(named, sizes, weight[1], constant.value.shape, result)
    if c is None or (c.groups and not c.kept):
        return None
    if not c.summed:
        return _scaled(writer, given, constant, c)
    outputs, inputs = c.total(c.groups) * c.total(c.made), c.total(c.groups) * c.total(c.summed)
    if not c.groups:
        matrix = _arranged(constant, c.own, [*c.made, *c.summed], (outputs, inputs))
        x = _arrange(writer, given, c, c.named, [*c.kept, *c.summed], [*c.sizes(c.kept), inputs])
        made = linear_layer(writer, node, x, matrix, None)
        return _restore(writer, made, c, [*c.sizes(c.kept), outputs], [*c.kept, *c.made])
    # The rows of the batch, whose number is not known, come first.
    rows = next((axis for axis in c.kept if not isinstance(c.size[axis], int)), c.kept[0])
    rest = [axis for axis in c.kept if axis != rows]
    kernel = _arranged(constant, c.own, [*c.groups, *c.made, *c.summed], (outputs, c.total(c.summed), 1))
    first, last = c.size[rows], c.total(rest)
    x = _arrange(writer, given, c, c.named, [rows, *c.groups, *c.summed, *rest], [first, inputs, last])
    made = convolution_of_one_place(writer, node, x, kernel, c.total(c.groups))
    return _restore(writer, made, c, [first, outputs, last], [rows, *c.groups, *c.made, *rest])


def _without_lone_axes(
    writer: Writer, x: fx.Node, axes: Axes, sizes: Sequence[Any], own: Axes, result: Axes
) -> tuple[fx.Node, list[Hashable], list[Any]]:
    """`x`, its axes and their sizes, after a sum over the axes that neither the weight nor the result has."""
    lone = tuple(place for place, axis in enumerate(axes) if axis not in own and axis not in result)
    if lone:
        x = writer.part(torch.sum, x, lone, False)
    left = [place for place in range(len(axes)) if place not in lone]
    return x, [axes[place] for place in left], [sizes[place] for place in left]


def _scaled(writer: Writer, x: fx.Node, constant: Constant, c: Contraction) -> fx.Node:
    """A product element by element: each tensor has axes of size 1 where the other has its own."""
    shape = [c.size[axis] if axis in c.named else 1 for axis in c.result]
    factor = [c.size[axis] if axis in c.own else 1 for axis in c.result]
    while factor and factor[0] == 1:  # the first axes are added by broadcasting
        factor.pop(0)
    scale = writer.attribute(_arranged(constant, c.own, _in(c.result, c.own), tuple(factor)))
    return writer.call(torch.mul, _arrange(writer, x, c, c.named, _in(c.result, c.named), shape), scale)


def _in(result: Axes, axes: Axes) -> list[Hashable]:
    return [axis for axis in result if axis in axes]


def _repeated_apart(
    named: Axes, before: Sequence[Any], own: Axes, held: Sequence[int]
) -> tuple[list[Hashable], list[Hashable]]:
    """The names of both tensors' axes, where one of size 1 that the other tensor has longer gets a name of its own."""
    both = {axis: (before[list(named).index(axis)], held[list(own).index(axis)]) for axis in named if axis in own}
    first = [(axis, "once") if axis in both and both[axis][0] == 1 < both[axis][1] else axis for axis in named]
    second = [(axis, "once") if axis in both and both[axis][1] == 1 != both[axis][0] else axis for axis in own]
    return first, second


def _arranged(constant: Constant, axes: Axes, order: Axes, shape: tuple[int, ...]) -> Constant:
    """`constant` with its axes in another order and of another shape: one for each order and shape."""
    places = _places(axes, order)
    if places == (*range(len(axes)),) and shape == constant.value.shape:
        return constant
    if places == (1, 0) and shape == constant.value.t().shape:
        return transpose(constant)
    if (places, shape) not in constant.arranged:
        value = constant.value.detach().permute(places).reshape(shape).contiguous()
        constant.arranged[places, shape] = Constant(value, weight_name(constant), False, constant.trained)
    return constant.arranged[places, shape]


def _arrange(writer: Writer, x: fx.Node, c: Contraction, axes: Axes, order: Axes, shape: Sequence[Any]) -> fx.Node:
    """`x` with its `axes` in another order, then of another shape."""
    places = _places(axes, order)
    if places != (*range(len(places)),):
        x = writer.part(torch.permute, x, places)
    return _shaped(writer, x, [c.size[axes[place]] for place in places], shape)


def _restore(writer: Writer, x: fx.Node, c: Contraction, shape: Sequence[Any], axes: Axes) -> fx.Node:
    """A layer's result of `shape` with the `axes` that it is made of, in the order of the result."""
    return _arrange(writer, _shaped(writer, x, shape, c.sizes(axes)), c, axes, c.result, c.sizes(c.result))


def _places(axes: Axes, order: Axes) -> tuple[int, ...]:
    """Where each axis of `order` stands in `axes`; those of one value that it leaves out come last."""
    left = [axis for axis in axes if axis not in order]
    return tuple(list(axes).index(axis) for axis in (*order, *left))


def _shaped(writer: Writer, x: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> fx.Node:
    if [*before] == [*after]:
        return x
    if sum(not isinstance(size, int) for size in after) == 1:
        return writer.part(torch.reshape, x, tuple(size if isinstance(size, int) else -1 for size in after))
    return writer.part(torch.reshape, x, tuple(writer.number(size) for size in after))


CONTRACTIONS: Mapping[str, Callable[[Writer, fx.Node, Arguments], fx.Node | None]] = {
    **dict.fromkeys(("matmul", "mm", "bmm", "mv"), matmul),
    "einsum": einsum,
    **dict.fromkeys(("addmm", "baddbmm"), added_product),
    "tensordot": tensordot,
    "bilinear": bilinear,
}
