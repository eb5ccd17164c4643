"""Operations on each value alone, and products of two tensors, in ONNX. Parameters are those of torch's functions."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper

from r2cli.deploy.onnx_sheet import Sheet, Unwritable, Value, as_tuple, spread

# What a sum or product of booleans is.
OF_BOOLEANS = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}


def unary(operation: str) -> Callable[..., Any]:
    def write(sheet: Sheet, x: Value, *_: Any, **__: Any) -> str:
        return sheet.node(operation, sheet.cast(x, sheet.dtype))

    return write


def binary(operation: str) -> Callable[..., Any]:
    """Write what computes in the type of its result."""

    def write(sheet: Sheet, x: Any, other: Any, *, alpha: float = 1, **__: Any) -> str:
        x, other = _of_type(sheet, sheet.dtype, x, other)
        own = OF_BOOLEANS.get(operation, operation) if sheet.dtype == torch.bool else operation
        return sheet.node(own, x, other if alpha == 1 else sheet.node("Mul", other, alpha))

    return write


def logical(operation: str) -> Callable[..., Any]:
    """Write what is computed of truths: a number is true where it is not 0."""

    def write(sheet: Sheet, *values: Any) -> str:
        if sheet.dtype != torch.bool:
            raise Unwritable("it is of the bits of numbers")
        return sheet.node(operation, *_of_type(sheet, torch.bool, *values))

    return write


def compared(operation: str) -> Callable[..., Any]:
    """Write a comparison, in the type that torch promotes both to; ONNX orders no booleans."""

    def write(sheet: Sheet, x: Any, other: Any) -> str:
        wanted = torch.result_type(*(_example(each) for each in (x, other)))
        kind = torch.int32 if wanted == torch.bool and operation != "Equal" else wanted
        return sheet.node(operation, *_of_type(sheet, kind, x, other))

    return write


def _example(given: Any) -> Any:
    return torch.empty((1,) * len(given.shape), dtype=given.dtype) if isinstance(given, Value) else given


def _of_type(sheet: Sheet, wanted: torch.dtype, *values: Any) -> list[Any]:
    if None in values:
        raise Unwritable("it counts the batch")
    return [sheet.cast(each, wanted) for each in values]


def is_nan(sheet: Sheet, x: Value) -> str:
    return sheet.node("IsNaN", x)


def relu(sheet: Sheet, x: Value, *_: Any, **__: Any) -> str:
    """Write a Relu of floats; runtimes have none of integers."""
    return sheet.node("Relu", x) if x.dtype.is_floating_point else sheet.node("Max", x, 0)


def clamp(sheet: Sheet, x: Value, min: Any = None, max: Any = None) -> str:
    if min == 0 and max is None:
        return relu(sheet, x)
    return sheet.node("Clip", *(sheet.cast(each, sheet.dtype) for each in (x, min, max)))


def relu6(sheet: Sheet, x: Value) -> str:
    return sheet.node("Clip", x, 0.0, 6.0)


def hardsigmoid(sheet: Sheet, x: Value) -> str:
    return sheet.node("HardSigmoid", x, alpha=1 / 6)


def gelu(sheet: Sheet, x: Value, approximate: str = "none") -> str:
    """Write x / 2 * (1 + erf(x / sqrt 2)), which runtimes fuse: the operator Gelu came only with opset 20."""
    if approximate == "none":
        inner = sheet.node("Erf", sheet.node("Div", x, 2**0.5))
    else:
        cube = sheet.node("Mul", x, sheet.node("Mul", x, x))
        sum_ = sheet.node("Add", x, sheet.node("Mul", cube, sheet.writer.constant(0.044715, np.float32)))
        inner = sheet.node("Tanh", sheet.node("Mul", sum_, sheet.writer.constant((2 / np.pi) ** 0.5, np.float32)))
    whole = sheet.node("Mul", x, sheet.node("Add", inner, sheet.writer.constant(1.0, np.float32)))
    return sheet.node("Mul", whole, sheet.writer.constant(0.5, np.float32))


def leaky_relu(sheet: Sheet, x: Value, negative_slope: float) -> str:
    return sheet.node("LeakyRelu", x, alpha=float(negative_slope))


def elu(sheet: Sheet, x: Value, alpha: float) -> str:
    return sheet.node("Elu", x, alpha=float(alpha))


def celu(sheet: Sheet, x: Value, alpha: float) -> str:
    return sheet.node("Celu", x, alpha=float(alpha))


def softmax(sheet: Sheet, x: Value, dim: int = -1, *_: Any, **__: Any) -> str:
    return sheet.node("Softmax", x, axis=dim)


def log_softmax(sheet: Sheet, x: Value, dim: int = -1, *_: Any, **__: Any) -> str:
    return sheet.node("LogSoftmax", x, axis=dim)


def cast(sheet: Sheet, x: Value, wanted: torch.dtype) -> Value:
    given: Value = sheet.cast(x, wanted)
    return given


def where(sheet: Sheet, condition: Value, x: Any, other: Any) -> str:
    return sheet.node("Where", condition, *_of_type(sheet, sheet.dtype, x, other))


def masked_fill(sheet: Sheet, x: Value, mask: Value, value: Any) -> str:
    return where(sheet, mask, value, x)


# --- products ------------------------------------------------------------------------------------------------------


def matmul(sheet: Sheet, x: Value, other: Value) -> str:
    return sheet.node("MatMul", x, other)


def attention(
    sheet: Sheet,
    query: Value,
    key: Value,
    value: Value,
    *,
    attn_mask: Value | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    **more: Any,
) -> str:
    """Write softmax(q k^T / sqrt(width) + mask) v, and zeros for a query that the mask keeps from every key."""
    if more.get("enable_gqa"):
        raise Unwritable("queries share keys")
    width = query.shape[-1] or 1
    factor = width**-0.5 if scale is None else scale
    axes = len(key.shape)
    turned = sheet.node("Transpose", key, perm=[*range(axes - 2), axes - 1, axes - 2])
    scores = sheet.node("MatMul", sheet.node("Mul", query, float(factor)), turned)
    if is_causal:
        tokens = [int(each.shape[-2] or 1) for each in (query, key)]
        mask = np.where(np.tri(tokens[0], tokens[1]) > 0, 0, -np.inf).astype(np.float32)
        scores = sheet.node("Add", scores, sheet.writer.constant(mask, kind="causal"))
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = sheet.writer.node("Where", [attn_mask.name, scores, sheet.writer.constant(-np.inf, np.float32)])
    elif attn_mask is not None:
        scores = sheet.node("Add", scores, attn_mask)
    shares = sheet.node("Softmax", scores, axis=-1)
    if attn_mask is not None and not is_causal and not _keeps_some(sheet, attn_mask):
        shares = sheet.node("Where", _reaching(sheet, attn_mask), shares, _one(sheet, 0.0))
    return sheet.node("MatMul", shares, value)


def _least(mask: Value) -> float:
    """What a mask has for a key that is not seen: False, or what is added to its score."""
    return 0.0 if mask.dtype == torch.bool else -np.inf


def _keeps_some(sheet: Sheet, mask: Value) -> bool:
    """Whether a mask is a constant that lets every query see a key."""
    held = sheet.writer.initializers.get(mask.name)
    return held is not None and bool((numpy_helper.to_array(held).max(-1) > _least(mask)).all())


def _reaching(sheet: Sheet, mask: Value) -> str:
    """Write which queries see a key: (..., queries, 1) BOOL."""
    most = sheet.node("ReduceMax", sheet.cast(mask, torch.float32), axes=[-1], keepdims=1)
    return sheet.node("Greater", most, _one(sheet, _least(mask)))


def layer_norm(
    sheet: Sheet,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> str:
    shape = list(normalized_shape)
    scale = weight if weight is not None else sheet.writer.constant(np.ones(shape, np.float32), kind="ones")
    return sheet.node("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=float(eps))


def batch_norm(sheet: Sheet, x: Value, *given: Any) -> str:
    """Write a norm by statistics that are given, with parameters that are computed as the network runs."""
    mean, variance, weight, bias, _, _, eps = given
    parts = _scale_and_shift(sheet, x, weight, bias)
    return sheet.node("BatchNormalization", x, *parts, mean, variance, epsilon=float(eps))


def instance_norm(sheet: Sheet, x: Value, *given: Any) -> str:
    _, _, weight, bias, of_input, _, eps = given
    if not of_input:
        return batch_norm(sheet, x, *given)
    return sheet.node("InstanceNormalization", x, *_scale_and_shift(sheet, x, weight, bias), epsilon=float(eps))


def _scale_and_shift(sheet: Sheet, x: Value, weight: Value | None, bias: Value | None) -> list[Any]:
    """The parameters of a norm of channels; constants in the place of those that it has not."""
    constants = (np.full(x.shape[1] or 1, fill, np.float32) for fill in (1, 0))
    pairs = zip((weight, bias), constants, strict=True)
    return [sheet.writer.constant(usual, kind="full") if own is None else own for own, usual in pairs]


def group_norm(sheet: Sheet, x: Value, groups: int, weight: Value | None, bias: Value | None, eps: float) -> str:
    value = normed_groups(sheet, x, groups, eps)
    shape = sheet.writer.ints([-1, *(1 for _ in x.shape[2:])])
    for own, operation in ((weight, "Mul"), (bias, "Add")):
        if own is not None:
            value = sheet.node(operation, value, sheet.node("Reshape", own, shape))
    return value


def normed_groups(sheet: Sheet, x: Value, groups: int, eps: float) -> str:
    """Write a group norm without parameters by InstanceNormalization of (n, groups, rest): GroupNormalization came only
    with opset 18."""
    apart = sheet.node("Reshape", x, sheet.writer.ints([0, groups, -1]))
    ones, zeros = (sheet.writer.constant(np.full(groups, fill, np.float32), kind="full") for fill in (1, 0))
    normed = sheet.node("InstanceNormalization", apart, ones, zeros, epsilon=float(eps))
    return sheet.node("Reshape", normed, sheet.sizes(x.shape))


def embedding(sheet: Sheet, given: Value, weight: Value, *_: Any, **__: Any) -> str:
    return sheet.node("Gather", weight, given, axis=0)


def functional_linear(sheet: Sheet, x: Value, weight: Value, bias: Value | None = None) -> str:
    """Write x w^T + b for a weight that is computed as the network runs."""
    axes = len(weight.shape)
    turned = sheet.node("Transpose", weight, perm=[*range(axes - 2), axes - 1, axes - 2])
    product = sheet.node("MatMul", x, turned)
    return product if bias is None else sheet.node("Add", product, bias)


def functional_convolution(
    sheet: Sheet,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> str:
    """Write a convolution whose weight is computed as the network runs."""
    axes = len(x.shape) - 2
    if isinstance(padding, str):
        raise Unwritable("its padding is a word")
    given = [x, weight] if bias is None else [x, weight, bias]
    return sheet.node(
        "Conv",
        *given,
        strides=spread(stride, axes),
        pads=2 * spread(padding, axes),
        dilations=spread(dilation, axes),
        group=groups,
    )


def einsum(sheet: Sheet, equation: str, tensors: Sequence[Value]) -> str:
    return sheet.node("Einsum", *tensors, equation=equation)


# --- composed of others --------------------------------------------------------------------------------------------


def _one(sheet: Sheet, value: float = 1.0) -> str:
    return sheet.writer.constant(value, np.float32)


def rsqrt(sheet: Sheet, x: Value) -> str:
    return sheet.node("Reciprocal", sheet.node("Sqrt", x))


def square(sheet: Sheet, x: Value) -> str:
    return sheet.node("Mul", x, x)


def log1p(sheet: Sheet, x: Value) -> str:
    return sheet.node("Log", sheet.node("Add", x, _one(sheet)))


def expm1(sheet: Sheet, x: Value) -> str:
    return sheet.node("Sub", sheet.node("Exp", x), _one(sheet))


def softplus(sheet: Sheet, x: Value, beta: float = 1, threshold: float = 20) -> str:
    if beta != 1:
        raise Unwritable("its beta is not 1")
    return sheet.node("Softplus", x)


def log_sigmoid(sheet: Sheet, x: Value) -> str:
    return sheet.node("Neg", sheet.node("Softplus", sheet.node("Neg", x)))


def mish(sheet: Sheet, x: Value) -> str:
    return sheet.node("Mul", x, sheet.node("Tanh", sheet.node("Softplus", x)))


def not_equal(sheet: Sheet, x: Any, other: Any) -> str:
    return sheet.node("Not", compared("Equal")(sheet, x, other))


def divide(sheet: Sheet, x: Any, other: Any, rounding_mode: str | None = None) -> str:
    """Write a quotient. ONNX rounds that of integers towards zero."""
    x, other = _of_type(sheet, sheet.dtype, x, other)
    whole = not sheet.dtype.is_floating_point
    if whole and rounding_mode == "floor":
        x = sheet.node("Sub", x, sheet.node("Mod", x, other))
    quotient = sheet.node("Div", x, other)
    if whole or rounding_mode is None:
        return quotient
    if rounding_mode == "floor":
        return sheet.node("Floor", quotient)
    return sheet.node("Mul", sheet.node("Sign", quotient), sheet.node("Floor", sheet.node("Abs", quotient)))


def rms_norm(
    sheet: Sheet, x: Value, normalized_shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> str:
    axes = list(range(len(x.shape) - len(normalized_shape), len(x.shape)))
    power = sheet.node("ReduceMean", sheet.node("Mul", x, x), axes=axes, keepdims=1)
    least = _one(sheet, float(torch.finfo(torch.float32).eps if eps is None else eps))
    normed = sheet.node("Div", x, sheet.node("Sqrt", sheet.node("Add", power, least)))
    return normed if weight is None else sheet.node("Mul", normed, weight)


def variance(sheet: Sheet, x: Value, dim: Any = None, correction: float | None = None, keepdim: bool = False) -> str:
    """Write the variance over axes: the mean of squares about the mean, with torch's correction of its divisor."""
    axes = [axis % len(x.shape) for axis in (range(len(x.shape)) if dim is None else as_tuple(dim))]
    count = prod(int(x.shape[axis] or 0) for axis in axes)
    if not count:
        raise Unwritable("it counts the batch")
    away = sheet.node("Sub", x, sheet.node("ReduceMean", x, axes=axes, keepdims=1))
    mean = sheet.node("ReduceMean", sheet.node("Mul", away, away), axes=axes, keepdims=int(keepdim))
    by = count / (count - (1 if correction is None else correction))
    return mean if by == 1 else sheet.node("Mul", mean, _one(sheet, by))


def deviation(sheet: Sheet, x: Value, dim: Any = None, correction: float | None = None, keepdim: bool = False) -> str:
    return sheet.node("Sqrt", variance(sheet, x, dim, correction, keepdim))


def vector_norm(sheet: Sheet, x: Value, ord: float = 2, dim: Any = None, keepdim: bool = False) -> str:
    axes = list(range(len(x.shape)) if dim is None else as_tuple(dim))
    if ord not in (1, 2):
        raise Unwritable(f"its order is {ord}")
    return sheet.node("ReduceL2" if ord == 2 else "ReduceL1", x, axes=axes, keepdims=int(keepdim))
