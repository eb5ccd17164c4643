"""What an integer ONNX file computes in float, in float here too: softmax, norms, sums with parameters, and the like.

Codes are decoded before it by a Dequantize, and what it gives is rounded by the grid that reads it, if one does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from r2cli.deploy.onnx_sheet import Unwritable
from r2cli.deploy.tflite_sheet import NHWC, HeldValue, LiteSheet, attributes, plain

Handler = Callable[[LiteSheet, NodeProto], None]


def _apply(
    lite: LiteSheet, kind: str, parts: Sequence[HeldValue], shape: Sequence[int], options: str = "", **given: Any
) -> HeldValue:
    """Write one operator on values in one order of axes; return what it gives, of `shape`."""
    name = f"{lite.writer.name(parts[0].tensor)}.{kind.lower()}"
    found = lite.made(name, shape, None, parts[0].order)
    lite.writer.operator(kind, [each.tensor for each in parts], [found.tensor], options, **given)
    return found


def _number(lite: LiteSheet, value: float) -> HeldValue:
    return lite.constant(f"number.{value:g}", np.array(value, np.float32))


def _both(lite: LiteSheet, kind: str, one: HeldValue, other: HeldValue, options: str = "") -> HeldValue:
    """An operator of two values that are broadcast together."""
    one, other = lite.aligned([one, other])
    return _apply(lite, kind, [one, other], np.broadcast_shapes(one.shape, other.shape), options)


def _scaled(lite: LiteSheet, kind: str, x: HeldValue, number: float, options: str = "") -> HeldValue:
    return _both(lite, kind, x, _number(lite, number), options)


# --- each value alone ----------------------------------------------------------------------------------------------


def unary(kind: str, options: str = "", **given: str) -> Handler:
    """Write `kind`; `given` says by which of ONNX's attributes an option is called."""

    def write(lite: LiteSheet, node: NodeProto) -> None:
        x, told = lite.floats(node.input[0]), attributes(node)
        own = {option: told[key] for option, key in given.items() if key in told}
        lite.values[node.output[0]] = _apply(lite, kind, [x], x.shape, options, **own)

    return write


def binary(kind: str, options: str = "") -> Handler:
    def write(lite: LiteSheet, node: NodeProto) -> None:
        one, *others = (lite.floats(name) for name in node.input)
        for other in others:
            one = _both(lite, kind, one, other, options)
        lite.values[node.output[0]] = one

    return write


def clip(lite: LiteSheet, node: NodeProto) -> None:
    x = lite.floats(node.input[0])
    for kind, name in zip(("MAXIMUM", "MINIMUM"), node.input[1:], strict=False):
        if name:
            x = _scaled(lite, kind, x, float(lite.constants[name]), "MaximumMinimum")
    lite.values[node.output[0]] = x


def hard_sigmoid(lite: LiteSheet, node: NodeProto) -> None:
    given = attributes(node)
    x = _scaled(lite, "MUL", lite.floats(node.input[0]), given.get("alpha", 0.2), "Mul")
    x = _scaled(lite, "ADD", x, given.get("beta", 0.5), "Add")
    x = _scaled(lite, "MAXIMUM", x, 0.0, "MaximumMinimum")
    lite.values[node.output[0]] = _scaled(lite, "MINIMUM", x, 1.0, "MaximumMinimum")


def reciprocal(lite: LiteSheet, node: NodeProto) -> None:
    lite.values[node.output[0]] = _both(lite, "DIV", _number(lite, 1.0), lite.floats(node.input[0]), "Div")


def softmax(lite: LiteSheet, node: NodeProto) -> None:
    x = lite.floats(node.input[0])
    axis = attributes(node).get("axis", -1) % len(x.shape)
    if x.order[-1] != axis:
        x = lite.laid(x, (*(each for each in x.order if each != axis), axis))
    lite.values[node.output[0]] = _apply(lite, "SOFTMAX", [x], x.shape, "Softmax", beta=1.0)


# --- means and norms -----------------------------------------------------------------------------------------------


def _reduced(lite: LiteSheet, kind: str, x: HeldValue, axes: Sequence[int]) -> HeldValue:
    """`x` reduced over `axes`, which stay as axes of length 1."""
    shape = [1 if axis in axes else length for axis, length in enumerate(x.shape)]
    name = f"{lite.writer.name(x.tensor)}.{kind.lower()}"
    found, places = lite.made(name, shape, None, x.order), lite.writer.ints([x.order.index(axis) for axis in axes])
    lite.writer.operator(kind, [x.tensor, places], [found.tensor], "Reducer", keepDims=True)
    return found


def reduction(kind: str) -> Handler:
    def write(lite: LiteSheet, node: NodeProto) -> None:
        x, given = lite.floats(node.input[0]), attributes(node)
        told = lite.ints(node.input[1]) if len(node.input) > 1 else given.get("axes", range(len(x.shape)))
        axes, name = [axis % len(x.shape) for axis in told], node.output[0]
        found = _reduced(lite, kind or "SUM", x if kind else _both(lite, "MUL", x, x, "Mul"), axes)
        found = found if kind else _apply(lite, "SQRT", [found], found.shape)  # of squares: a norm
        if not given.get("keepdims", 1):
            order = [axis for axis in found.order if axis not in axes]
            order = [axis - sum(each < axis for each in axes) for axis in order]
            found = lite.reshaped(found, lite.shapes[name], order, name)
        lite.values[name] = found

    return write


def _normed(lite: LiteSheet, x: HeldValue, axes: Sequence[int], epsilon: float) -> HeldValue:
    away = _both(lite, "SUB", x, _reduced(lite, "MEAN", x, axes), "Sub")
    variance = _reduced(lite, "MEAN", _both(lite, "MUL", away, away, "Mul"), axes)
    raised = _scaled(lite, "ADD", variance, epsilon, "Add")
    return _both(lite, "MUL", away, _apply(lite, "RSQRT", [raised], raised.shape), "Mul")


def layer_norm(lite: LiteSheet, node: NodeProto) -> None:
    x, given = lite.floats(node.input[0]), attributes(node)
    axes = range(given.get("axis", -1) % len(x.shape), len(x.shape))
    y = _both(lite, "MUL", _normed(lite, x, axes, given.get("epsilon", 1e-5)), lite.floats(node.input[1]), "Mul")
    if len(node.input) > 2 and node.input[2]:
        y = _both(lite, "ADD", y, lite.floats(node.input[2]), "Add")
    lite.values[node.output[0]] = y


def _by_channel(lite: LiteSheet, y: HeldValue, scale: Any, shift: Any, name: str) -> HeldValue:
    shape = (-1, *(1 for _ in y.shape[2:]))
    for kind, content in (("Mul", scale), ("Add", shift)):
        own = lite.constant(f"{name}.{kind.lower()}", np.asarray(content, np.float32).reshape(shape))
        y = _both(lite, kind.upper(), y, own, kind)
    return y


def batch_norm(lite: LiteSheet, node: NodeProto) -> None:
    scale, shift, mean, variance = (lite.constants[name].astype(np.float64) for name in node.input[1:5])
    factor = scale / np.sqrt(variance + attributes(node).get("epsilon", 1e-5))
    x, name = lite.floats(node.input[0]), node.output[0]
    lite.values[name] = _by_channel(lite, x, factor, shift - mean * factor, name)


def instance_norm(lite: LiteSheet, node: NodeProto) -> None:
    x, name = lite.floats(node.input[0]), node.output[0]
    y = _normed(lite, x, range(2, len(x.shape)), attributes(node).get("epsilon", 1e-5))
    scale, shift = (lite.constants[each] for each in node.input[1:3])
    lite.values[name] = _by_channel(lite, y, scale, shift, name)


def global_pool(kind: str) -> Handler:
    def write(lite: LiteSheet, node: NodeProto) -> None:
        x = lite.floats(node.input[0])
        lite.values[node.output[0]] = _reduced(lite, kind, x, range(2, len(x.shape)))

    return write


def resize(lite: LiteSheet, node: NodeProto) -> None:
    x, given, name = lite.floats(node.input[0]), attributes(node), node.output[0]
    if given.get("mode") != b"linear" or len(x.shape) != 4:
        raise Unwritable("its mode is neither nearest nor linear, or it has not two axes")
    told = given.get("coordinate_transformation_mode", b"half_pixel")
    x = lite.laid(x, NHWC)
    found = lite.passed(name, x, NHWC)
    inputs, options = [x.tensor, lite.writer.ints(found.shape[2:])], {"alignCorners": told == b"align_corners"}
    options["halfPixelCenters"] = told == b"half_pixel"
    lite.writer.operator("RESIZE_BILINEAR", inputs, [found.tensor], "ResizeBilinear", **options)


# --- products ------------------------------------------------------------------------------------------------------


def matmul(lite: LiteSheet, node: NodeProto) -> None:
    one, other = (lite.floats(name) for name in node.input)
    rank = max(len(one.shape), len(other.shape))
    if min(len(one.shape), len(other.shape)) < 2:
        raise Unwritable("it is a product with a vector")
    one, other = (_of_rank(lite, x, rank) for x in (one, other))
    lite.values[node.output[0]] = _product(lite, one, other)


def _of_rank(lite: LiteSheet, x: HeldValue, rank: int) -> HeldValue:
    more = rank - len(x.shape)
    order = (*range(more), *(axis + more for axis in x.order))
    return lite.reshaped(x, (1,) * more + x.shape, order, f"{lite.writer.name(x.tensor)}.axes") if more else x


def _product(lite: LiteSheet, one: HeldValue, other: HeldValue) -> HeldValue:
    """x y for the last two axes of both. A tensor that has those two exchanged is read so."""
    usual = plain(len(one.shape))
    exchanged = (*usual[:-2], usual[-1], usual[-2])
    flags, parts = {}, []
    for flag, x in (("adjX", one), ("adjY", other)):
        flags[flag] = x.order == exchanged and x.content is None
        parts.append(x if flags[flag] else lite.laid(x, usual))
    shape = (*np.broadcast_shapes(one.shape[:-2], other.shape[:-2]), one.shape[-2], other.shape[-1])
    found = lite.made(f"{lite.writer.name(parts[0].tensor)}.product", shape, None)
    inputs = [each.tensor for each in parts]
    lite.writer.operator("BATCH_MATMUL", inputs, [found.tensor], "BatchMatMul", **flags)
    return found


def einsum(lite: LiteSheet, node: NodeProto) -> None:
    """A product of two values over one shared axis: `bhid,bhjd->bhij` and the like."""
    equation = attributes(node)["equation"].decode().replace(" ", "")
    given, _, out = equation.partition("->")
    names = given.split(",")
    if len(names) != 2 or not out or "." in equation:
        raise Unwritable(f"r2 knows no form of '{equation}'")
    left, right = names
    batch = [each for each in left if each in right and each in out]
    summed = [each for each in left if each in right and each not in out]
    rows, columns = ([each for each in own if each not in batch + summed] for own in names)
    if not len(summed) == len(rows) == len(columns) == 1 or len({*batch, *rows, *columns}) != len(out):
        raise Unwritable(f"r2 knows no form of '{equation}'")
    one = _permuted(lite.floats(node.input[0]), [left.index(each) for each in batch + rows + summed])
    other = _permuted(lite.floats(node.input[1]), [right.index(each) for each in batch + summed + columns])
    product, axes = _product(lite, one, other), batch + rows + columns
    lite.values[node.output[0]] = _permuted(product, [axes.index(each) for each in out])


def _permuted(x: HeldValue, order: Sequence[int]) -> HeldValue:
    """`x` with its axes in another order, as a Transpose has it: its tensor stays."""
    shape = tuple(x.shape[axis] for axis in order)
    return HeldValue(x.tensor, shape, x.grid, tuple(order.index(axis) for axis in x.order), x.content)


FLOATS: dict[str, Handler] = {
    "Relu": unary("RELU"),
    "Sigmoid": unary("LOGISTIC"),
    "Tanh": unary("TANH"),
    "LeakyRelu": unary("LEAKY_RELU", "LeakyRelu", alpha="alpha"),
    **{kind: unary(kind.upper()) for kind in ("Sqrt", "Exp", "Log", "Abs", "Neg", "Floor", "Cos", "Sin")},
    **{kind: binary(kind.upper(), kind) for kind in ("Add", "Sub", "Mul", "Div")},
    "Pow": binary("POW"),
    "Max": binary("MAXIMUM", "MaximumMinimum"),
    "Min": binary("MINIMUM", "MaximumMinimum"),
    "PRelu": binary("PRELU"),
    "Clip": clip,
    "HardSigmoid": hard_sigmoid,
    "Reciprocal": reciprocal,
    "Softmax": softmax,
    "ReduceMean": reduction("MEAN"),
    "ReduceSum": reduction("SUM"),
    "ReduceMax": reduction("REDUCE_MAX"),
    "ReduceMin": reduction("REDUCE_MIN"),
    "ReduceL2": reduction(""),
    "LayerNormalization": layer_norm,
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "GlobalAveragePool": global_pool("MEAN"),
    "GlobalMaxPool": global_pool("REDUCE_MAX"),
    "Resize": resize,
    "MatMul": matmul,
    "Einsum": einsum,
}
