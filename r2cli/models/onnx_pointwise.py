"""Operators of ONNX that take one value, or one pair, at a time, and reductions; of tensors and of numbers."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2cli.models.onnx_values import (
    KINDS,
    Attributes,
    Operator,
    Uncomputable,
    Value,
    axis_of,
    each,
    is_numbers,
    listed,
    operand,
    tensor,
)


def _of_one(function: Callable[..., Any], plain: Callable[..., Any] | None = None) -> Operator:
    """An operator of one input: `function` of a tensor, `plain` of numbers."""

    def compute(a: Attributes, x: Value) -> Value:
        return each(plain, x) if plain is not None and is_numbers(x) else function(tensor(a, x))

    return Operator(compute)


def _of_two(function: Callable[..., Any], plain: Callable[..., Any]) -> Operator:
    """An operator of two inputs, which broadcasts; of one, that one, and of more one after the other."""

    def compute(a: Attributes, *values: Value) -> Value:
        found = values[0]
        for value in values[1:]:
            if is_numbers(found) and is_numbers(value):
                found = each(plain, found, value)
            else:
                found = _pair(a, function, plain, found, value)
        return found

    return Operator(compute)


def _pair(a: Attributes, function: Callable[..., Any], plain: Callable[..., Any], x: Value, y: Value) -> Tensor:
    """`function` of two values of which one is a tensor. Numbers stay numbers, and stand second where that is the same.

    torch wants a tensor first; `plain` is Python's operator, which takes them in any order.
    """
    x, y = operand(a, x), operand(a, y)
    if isinstance(x, Tensor):
        return function(x, y)  # type: ignore[no-any-return]
    if function in TURNED:
        return TURNED[function](y, x)
    return plain(x, y)  # type: ignore[no-any-return]


def _both(a: Attributes, x: Value, y: Value) -> tuple[Value, Value]:
    """Two values of which one is a tensor, the first always one."""
    x, y = operand(a, x), operand(a, y)
    return (x if isinstance(x, Tensor) else torch.full((), x, dtype=y.dtype, device=a["device"])), y


def _of_tensors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that takes no number in the place of a tensor."""
    return lambda x, y: function(x, y if isinstance(y, Tensor) else torch.full((), y, dtype=x.dtype, device=x.device))


def _divide(x: Tensor, y: Value) -> Tensor:
    whole = not x.is_floating_point() and not (isinstance(y, Tensor) and y.is_floating_point())
    return torch.div(x, y, rounding_mode="trunc") if whole else torch.div(x, y)


def _divided(x: Any, y: Any) -> Any:
    if isinstance(y, Tensor):
        return x / y if y.is_floating_point() else torch.div(torch.full_like(y, x), y, rounding_mode="trunc")
    if isinstance(x, float) or isinstance(y, float):
        return x / y
    if y == 0:
        raise Uncomputable("it divides by zero")
    return x // y if isinstance(x, torch.SymInt) or (x >= 0) == (y > 0) else -(-x // y)


def _remainder(a: Attributes, x: Value, y: Value) -> Value:
    if is_numbers(x) and is_numbers(y):
        return each(math.fmod if a.get("fmod") else operator.mod, x, y)
    return (torch.fmod if a.get("fmod") else torch.remainder)(*_both(a, x, y))


def _power(x: Tensor, y: Value) -> Tensor:
    return torch.square(x) if not isinstance(y, Tensor) and y == 2 else torch.pow(x, y)


def _larger(x: Tensor, y: Value) -> Tensor:
    return torch.maximum(x, y) if isinstance(y, Tensor) else torch.clamp(x, min=y)


def _smaller(x: Tensor, y: Value) -> Tensor:
    return torch.minimum(x, y) if isinstance(y, Tensor) else torch.clamp(x, max=y)


def _average(a: Attributes, *values: Value) -> Value:
    return POINTWISE["Sum"].compute(a, *values) / len(values)


def clip(a: Attributes, x: Value, least: Value = None, most: Value = None) -> Value:
    least, most = (a.get(name) if one is None else operand(a, one) for name, one in (("min", least), ("max", most)))
    if is_numbers(x):
        low, high = -math.inf if least is None else least, math.inf if most is None else most
        return each(lambda one: min(max(one, low), high), x)
    if least is None and most is None:
        return x
    return torch.clamp(x, least, most)


def where(a: Attributes, condition: Value, x: Value, y: Value) -> Value:
    if all(map(is_numbers, (condition, x, y))):
        return each(lambda one, first, second: first if one else second, condition, x, y)
    if is_numbers(x) and is_numbers(y):
        x = tensor(a, x)
    return torch.where(tensor(a, condition), operand(a, x), operand(a, y))


def cast(a: Attributes, x: Value) -> Value:
    kind = KINDS[a["to"]]
    if not is_numbers(x):
        return x.to(kind)
    if kind == torch.bool:
        return each(bool, x)
    if kind.is_floating_point:
        return each(lambda one: one * 1.0, x)
    return each(lambda one: int(one) if isinstance(one, float | bool) else one, x)


def cast_like(a: Attributes, x: Value, like: Value) -> Value:
    if isinstance(like, Tensor):
        return tensor(a, x).to(like.dtype)
    return cast({**a, "to": "float32" if isinstance(operand(a, like), float) else "int64"}, x)


def gelu(a: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=a.get("approximate", "none"))


def hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    alpha, beta = a.get("alpha", 0.2), a.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-4 and beta == 0.5:  # torch's own; files have 0.16666667 or 0.1667
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0, 1)


def selu(a: Attributes, x: Tensor) -> Tensor:
    alpha, gamma = a.get("alpha", 1.6732631921768188), a.get("gamma", 1.0507010221481323)
    if abs(alpha - 1.67326319) < 1e-6 and abs(gamma - 1.05070102) < 1e-6:
        return F.selu(x)
    return torch.mul(F.elu(x, alpha), gamma)


def thresholded(a: Attributes, x: Tensor) -> Tensor:
    return torch.where(x > a.get("alpha", 1.0), x, 0.0)


def infinite(a: Attributes, x: Tensor) -> Tensor:
    found = torch.isinf(x)
    found = found & (x < 0) if not a.get("detect_positive", 1) else found
    return found & (x > 0) if not a.get("detect_negative", 1) else found


# --- over an axis ----------------------------------------------------------------------------------------------------


def _over(function: Callable[..., Tensor], plain: Callable[[list[Any]], Any] | None = None) -> Operator:
    """A reduction: over the axes that are given as an attribute or as an input, else over all."""

    def compute(a: Attributes, x: Value, axes: Value = None) -> Value:
        axes = a.get("axes") if axes is None else axes
        if not axes and a.get("noop_with_empty_axes"):
            return x
        if is_numbers(x) and plain is not None:
            found = plain(listed(x))
            return [found] if a.get("keepdims", 1) and isinstance(x, list) else found
        x = tensor(a, x)
        dims = tuple(axis_of(x, axis) for axis in axes) if axes else tuple(range(x.ndim))
        return function(x, dims, bool(a.get("keepdims", 1)))

    return Operator(compute, (1,))


def _product(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keep)
    return x


def _norm(order: int) -> Callable[..., Tensor]:
    return lambda x, dims, keep: torch.linalg.vector_norm(x, order, dims, keep)


def softmax(function: Callable[..., Tensor]) -> Operator:
    def compute(a: Attributes, x: Tensor) -> Tensor:
        axis = axis_of(x, a.get("axis", -1))
        if not a.get("flat") or axis == x.ndim - 1:
            return function(x, axis)
        # Before opset 13: over all axes from this one on.
        return function(x.flatten(axis), axis).reshape(x.shape)

    return Operator(compute)


def _extreme(function: Callable[..., Tensor], name: str) -> Operator:
    def compute(a: Attributes, x: Tensor) -> Tensor:
        if a.get("select_last_index"):
            raise Uncomputable(f"{name} takes the last of equal values")
        return function(x, axis_of(x, a.get("axis", 0)), bool(a.get("keepdims", 1)))

    return Operator(compute)


def top(a: Attributes, x: Tensor, k: Value = None) -> tuple[Tensor, Tensor]:
    count = a["k"] if k is None else listed(k)[0]
    found = torch.topk(x, count, axis_of(x, a.get("axis", -1)), bool(a.get("largest", 1)), bool(a.get("sorted", 1)))
    return found.values, found.indices


def running_sum(a: Attributes, x: Tensor, axis: Value) -> Tensor:
    if a.get("exclusive") or a.get("reverse"):
        raise Uncomputable("it sums exclusively or in reverse")
    return torch.cumsum(x, axis_of(x, listed(axis)[0]))


_AND, _OR, _XOR = (_of_tensors(one) for one in (torch.logical_and, torch.logical_or, torch.logical_xor))
# Of a number and a tensor: the same of the tensor and the number.
TURNED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **{one: one for one in (torch.add, torch.mul, torch.eq, _larger, _smaller, _AND, _OR, _XOR)},
    torch.gt: torch.lt,
    torch.ge: torch.le,
    torch.lt: torch.gt,
    torch.le: torch.ge,
}
POINTWISE: dict[str, Operator] = {
    "Relu": _of_one(F.relu),
    "LeakyRelu": Operator(lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01))),
    "Elu": Operator(lambda a, x: F.elu(x, a.get("alpha", 1.0))),
    "Celu": Operator(lambda a, x: F.celu(x, a.get("alpha", 1.0))),
    "Selu": Operator(selu),
    "Gelu": Operator(gelu),
    "Sigmoid": _of_one(torch.sigmoid),
    "HardSigmoid": Operator(hard_sigmoid),
    "HardSwish": _of_one(F.hardswish),
    "Mish": _of_one(F.mish),
    "Tanh": _of_one(torch.tanh),
    "Softplus": _of_one(F.softplus),
    "Softsign": _of_one(lambda x: x / (torch.abs(x) + 1)),
    "ThresholdedRelu": Operator(thresholded),
    "Clip": Operator(clip),
    "Erf": _of_one(torch.erf),
    "Exp": _of_one(torch.exp, math.exp),
    "Log": _of_one(torch.log, math.log),
    "Sqrt": _of_one(torch.sqrt, math.sqrt),
    "Reciprocal": _of_one(torch.reciprocal, lambda x: 1 / x),
    "Neg": _of_one(torch.neg, operator.neg),
    "Abs": _of_one(torch.abs, abs),
    "Sign": _of_one(torch.sign, lambda x: (x > 0) - (x < 0)),
    "Floor": _of_one(torch.floor, lambda x: float(math.floor(x)) if isinstance(x, float) else x),
    "Ceil": _of_one(torch.ceil, lambda x: float(math.ceil(x)) if isinstance(x, float) else x),
    "Round": _of_one(torch.round, round),
    "Sin": _of_one(torch.sin),
    "Cos": _of_one(torch.cos),
    "Not": _of_one(torch.logical_not, operator.not_),
    "IsNaN": _of_one(torch.isnan),
    "IsInf": Operator(infinite),
    "Add": _of_two(torch.add, operator.add),
    "Sub": _of_two(torch.sub, operator.sub),
    "Mul": _of_two(torch.mul, operator.mul),
    "Div": _of_two(_divide, _divided),
    "Pow": _of_two(_power, operator.pow),
    "Mod": Operator(_remainder),
    "Max": _of_two(_larger, max),
    "Min": _of_two(_smaller, min),
    "Sum": _of_two(torch.add, operator.add),
    "Mean": Operator(_average),
    "And": _of_two(_AND, lambda x, y: x and y),
    "Or": _of_two(_OR, lambda x, y: x or y),
    "Xor": _of_two(_XOR, operator.xor),
    "Equal": _of_two(torch.eq, operator.eq),
    "Greater": _of_two(torch.gt, operator.gt),
    "GreaterOrEqual": _of_two(torch.ge, operator.ge),
    "Less": _of_two(torch.lt, operator.lt),
    "LessOrEqual": _of_two(torch.le, operator.le),
    "Where": Operator(where),
    "Cast": Operator(cast),
    "CastLike": Operator(cast_like),
    "ReduceMean": _over(torch.mean),
    "ReduceSum": _over(torch.sum, sum),
    "ReduceMax": _over(torch.amax, max),
    "ReduceMin": _over(torch.amin, min),
    "ReduceProd": _over(_product, math.prod),
    "ReduceL1": _over(_norm(1)),
    "ReduceL2": _over(_norm(2)),
    "ReduceSumSquare": _over(lambda x, dims, keep: torch.sum(x * x, dims, keep)),
    "ReduceLogSumExp": _over(torch.logsumexp),
    "Softmax": softmax(torch.softmax),
    "LogSoftmax": softmax(torch.log_softmax),
    "ArgMax": _extreme(torch.argmax, "ArgMax"),
    "ArgMin": _extreme(torch.argmin, "ArgMin"),
    "TopK": Operator(top, (1,)),
    "CumSum": Operator(running_sum, (1,)),
}
