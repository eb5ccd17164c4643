"""Operations on each value alone, and products of two tensors, in ONNX. Parameters are those of torch's functions."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from r2cli.deploy.onnx_sheet import TYPES, Sheet, Unwritable, Value


def unary(operation: str) -> Callable[..., Any]:
    def write(sheet: Sheet, x: Value, *_: Any, **__: Any) -> str:
        return sheet.node(operation, x)

    return write


def binary(operation: str) -> Callable[..., Any]:
    def write(sheet: Sheet, x: Any, other: Any, *, alpha: float = 1, **__: Any) -> str:
        return sheet.node(operation, x, other if alpha == 1 else sheet.node("Mul", other, alpha))

    return write


def reversed_(operation: str) -> Callable[..., Any]:
    def write(sheet: Sheet, x: Value, other: Any, **__: Any) -> str:
        return sheet.node(operation, sheet.node("Identity", x) if isinstance(other, Value) else other, x)

    return write


def clamp(sheet: Sheet, x: Value, min: Any = None, max: Any = None) -> str:
    if min == 0 and max is None:
        return sheet.node("Relu", x)
    return sheet.node("Clip", x, min, max)


def hardtanh(sheet: Sheet, x: Value, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> str:
    return clamp(sheet, x, min_val, max_val)


def relu6(sheet: Sheet, x: Value, inplace: bool = False) -> str:
    return sheet.node("Clip", x, 0.0, 6.0)


def hardsigmoid(sheet: Sheet, x: Value, inplace: bool = False) -> str:
    return sheet.node("HardSigmoid", x, alpha=1 / 6)


def hardswish(sheet: Sheet, x: Value, inplace: bool = False) -> str:
    return sheet.node("Mul", x, hardsigmoid(sheet, x))


def silu(sheet: Sheet, x: Value, inplace: bool = False) -> str:
    return sheet.node("Mul", x, sheet.node("Sigmoid", x))


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


def leaky_relu(sheet: Sheet, x: Value, negative_slope: float = 0.01, inplace: bool = False) -> str:
    return sheet.node("LeakyRelu", x, alpha=float(negative_slope))


def elu(sheet: Sheet, x: Value, alpha: float = 1.0, *scales: Any, inplace: bool = False) -> str:
    if any(scale != 1 for scale in scales if not isinstance(scale, bool)):
        raise Unwritable("its scales are not 1")
    return sheet.node("Elu", x, alpha=float(alpha))


def prelu(sheet: Sheet, x: Value, weight: Value) -> str:
    shape = (*weight.shape, *(1 for _ in x.shape[2:])) if prod(weight.shape) > 1 else (1,)  # type: ignore[arg-type]
    return sheet.node("PRelu", x, sheet.node("Reshape", weight, sheet.sizes(shape)))


def softmax(sheet: Sheet, x: Value, dim: int = -1, *_: Any, **__: Any) -> str:
    return sheet.node("Softmax", x, axis=dim)


def log_softmax(sheet: Sheet, x: Value, dim: int = -1, *_: Any, **__: Any) -> str:
    return sheet.node("LogSoftmax", x, axis=dim)


def cast(sheet: Sheet, x: Value, *given: Any, dtype: torch.dtype | None = None, **_: Any) -> str:
    wanted = next((each for each in given if isinstance(each, torch.dtype)), dtype)
    if wanted is None or wanted == x.dtype:
        return x.name
    if wanted not in TYPES:
        raise Unwritable(f"it makes values of {wanted}")
    return sheet.node("Cast", x, to=TYPES[wanted])


def where(sheet: Sheet, condition: Value, x: Any, other: Any) -> str:
    return sheet.writer.node("Where", [condition.name, *sheet.named([x, other])])


def masked_fill(sheet: Sheet, x: Value, mask: Value, value: Any) -> str:
    filled, given = sheet.named([value, x])
    return sheet.writer.node("Where", [mask.name, filled, given])


# --- products ------------------------------------------------------------------------------------------------------


def matmul(sheet: Sheet, x: Value, other: Value) -> str:
    return sheet.node("MatMul", x, other)


def baddbmm(sheet: Sheet, x: Value, first: Value, second: Value, *, beta: float = 1, alpha: float = 1) -> str:
    product = sheet.node("MatMul", first, second)
    scaled = product if alpha == 1 else sheet.node("Mul", product, sheet.writer.constant(alpha, np.float32))
    return scaled if beta == 0 else sheet.node("Add", x if beta == 1 else sheet.node("Mul", x, beta), scaled)


def attention(
    sheet: Sheet,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """Write softmax(q k^T / sqrt(width) + mask) v."""
    if enable_gqa:
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
    return sheet.node("MatMul", sheet.node("Softmax", scores, axis=-1), value)


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


def embedding(sheet: Sheet, given: Value, weight: Value, *_: Any, **__: Any) -> str:
    return sheet.node("Gather", weight, given, axis=0)
