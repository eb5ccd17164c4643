"""How layers with weights, norms, and grids are written in ONNX."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from r2cli.config.targets import WIDE_OPSET, Target
from r2cli.deploy.onnx_pointwise import normed_groups
from r2cli.deploy.onnx_sheet import Sheet, Value
from r2cli.deploy.onnx_tensors import Weights
from r2cli.graph.channel_clip import Clip
from r2cli.graph.transposed import TransposedConv
from r2cli.quantized.grid import Grid

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _let_alone(sheet: Sheet, weights: Weights, name: str, x: Value, bias: Tensor | None) -> Value:
    """Write what keeps a layer in float that is to run so: ONNX Runtime quantizes weights and biases itself that stand
    between a DequantizeLinear and a QuantizeLinear. A Clip without bounds changes nothing, and it does not see through
    it."""
    weight = f"{name}.weight"
    if x.name not in weights.scales or (weight in weights.coded and not weights.loses_bias(weight, bias, x)):
        return x
    sheet.writer.enter(f"{name}.float")
    return Value(sheet.writer.node("Clip", [x.name]), x.shape, x.dtype)


def convolution(sheet: Sheet, weights: Weights, name: str, module: Any, x: Value) -> str:
    """Write a convolution of one, two or three axes."""
    x = _let_alone(sheet, weights, name, x, module.bias)
    weight = weights.tensor(f"{name}.weight", module.weight)
    bias = weights.bias(f"{name}.bias", f"{name}.weight", module.bias, x)
    sheet.writer.enter(name)
    return sheet.writer.node("Conv", _present(x.name, weight, bias), **_window(module))


def transposed(sheet: Sheet, weights: Weights, name: str, module: TransposedConv, x: Value) -> str:
    x = _let_alone(sheet, weights, name, x, module.bias)
    weight = weights.tensor(f"{name}.weight", module.weight, module.groups)
    bias = weights.bias(f"{name}.bias", f"{name}.weight", module.bias, x)
    sheet.writer.enter(name)
    more = list(module.output_padding)
    return sheet.writer.node(
        "ConvTranspose",
        _present(x.name, weight, bias),
        **_window(module),
        output_padding=_any(more),
    )


def _window(module: Any) -> dict[str, Any]:
    """The attributes that convolutions share; what is at its default is left out."""
    ones = [1] * len(module.kernel_size)
    return {
        "kernel_shape": list(module.kernel_size),
        "strides": list(module.stride) if list(module.stride) != ones else None,
        "pads": _any(2 * list(module.padding)),
        "dilations": list(module.dilation) if list(module.dilation) != ones else None,
        "group": module.groups if module.groups != 1 else None,
    }


def linear(sheet: Sheet, weights: Weights, name: str, module: nn.Linear, x: Value) -> str:
    """Write a Gemm on (n, features); on tensors of more axes, or of a weight in blocks, a product and a sum, which
    runtimes add in float."""
    plain = len(x.shape) > 2  # then the bias is a float that is added behind the product
    x = _let_alone(sheet, weights, name, x, None if plain else module.bias)
    blocks = weights.blocks(f"{name}.weight")
    if not plain and blocks is None:
        weight = weights.tensor(f"{name}.weight", module.weight)
        bias = weights.bias(f"{name}.bias", f"{name}.weight", module.bias, x)
        sheet.writer.enter(name)
        return sheet.writer.node("Gemm", _present(x.name, weight, bias), transB=1)
    weight = blocks or weights.turned(f"{name}.weight", module.weight)
    bias = None if module.bias is None else weights.float_bias(f"{name}.bias", module.bias)
    sheet.writer.enter(name)
    product = sheet.writer.node("MatMul", [x.name, weight])
    return product if bias is None else sheet.writer.node("Add", [product, bias])


def batch_norm(sheet: Sheet, weights: Weights, name: str, module: Any, x: Value) -> str:
    count = len(module.running_mean)
    given = {
        "weight": torch.ones(count) if module.weight is None else module.weight,
        "bias": torch.zeros(count) if module.bias is None else module.bias,
        "running_mean": module.running_mean,
        "running_var": module.running_var,
    }
    parts = [weights.tensor(f"{name}.{key}", tensor) for key, tensor in given.items()]
    sheet.writer.enter(name)
    return sheet.writer.node("BatchNormalization", [x.name, *parts], epsilon=float(module.eps))


def layer_norm(sheet: Sheet, weights: Weights, name: str, module: nn.LayerNorm, x: Value) -> str:
    shape = list(module.normalized_shape)
    given = {"weight": torch.ones(shape) if module.weight is None else module.weight, "bias": module.bias}
    parts = [weights.tensor(f"{name}.{key}", tensor) for key, tensor in given.items() if tensor is not None]
    sheet.writer.enter(name)
    return sheet.writer.node("LayerNormalization", [x.name, *parts], axis=-len(shape), epsilon=float(module.eps))


def group_norm(sheet: Sheet, weights: Weights, name: str, module: nn.GroupNorm, x: Value) -> str:
    sheet.writer.enter(name)
    value = normed_groups(sheet, x, module.num_groups, module.eps)
    if not module.affine:
        return value
    shape = sheet.writer.ints([-1, *(1 for _ in x.shape[2:])])
    for key, operation in (("weight", "Mul"), ("bias", "Add")):
        own = weights.tensor(f"{name}.{key}", getattr(module, key))
        value = sheet.writer.node(operation, [value, sheet.writer.node("Reshape", [own, shape])])
    return value


def embedding(sheet: Sheet, weights: Weights, name: str, module: nn.Embedding, x: Value) -> str:
    weight = weights.tensor(f"{name}.weight", module.weight)
    sheet.writer.enter(name)
    return sheet.writer.node("Gather", [weight, x.name], axis=0)


def prelu(sheet: Sheet, weights: Weights, name: str, module: nn.PReLU, x: Value) -> str:
    own = weights.tensor(f"{name}.weight", module.weight)
    sheet.writer.enter(name)
    if module.num_parameters > 1:
        own = sheet.writer.node("Reshape", [own, sheet.writer.ints([-1, *(1 for _ in x.shape[2:])])])
    return sheet.writer.node("PRelu", [x.name, own])


# --- grids ---------------------------------------------------------------------------------------------------------


def quantize(sheet: Sheet, weights: Weights, name: str, grid: Grid, x: str, most: Tensor | None = None) -> str:
    """Write a QuantizeLinear, below 8 bits a Clip of the codes, and a DequantizeLinear, with the grid called `name`.

    16 bits need opset 21.

    `most` (channels,) are the bounds of a `Clip` before it. Rounding keeps the order of values, so clipping the codes
    gives the same result as clipping the values, and runtimes stay in integers.
    """
    writer = sheet.writer
    offset, kind = codes_of(weights.target, grid.bits)
    if grid.bits > 8:
        writer.require(WIDE_OPSET, "QuantizeLinear of 16 bits")
    scale, zero = _parameters(weights, name, grid)
    codes = writer.node("QuantizeLinear", [x, scale, zero])
    if grid.bits < 8:
        lowest, highest = (writer.constant(each - offset, kind, "code") for each in (grid.lowest, grid.highest))
        codes = writer.node("Clip", [codes, lowest, highest])
    bounds = None if most is None else grid.encode(most)
    if bounds is not None and bool((bounds < grid.highest).any()):
        shape = (-1, *(1 for _ in sheet.shape[2:]))
        column = (bounds.to(torch.int32) - offset).numpy().astype(kind).reshape(shape if bounds.ndim else ())
        codes = writer.node("Min", [codes, writer.initializer(f"{name}.most", column)])
    value = writer.node("DequantizeLinear", [codes, scale, zero])
    weights.scales[value] = grid.scale.numpy()
    return value


def hard_sigmoid_on_grid(sheet: Sheet, weights: Weights, name: str, grid: Grid, x: Value) -> str:
    """Write min(max(x / 6 + 1 / 2, 0), 1) on an 8-bit grid: no runtime has an integer kernel for it, but it is a sum.

    Quantizing x + 3 with six times the scale gives the codes of (x + 3) / 6, and clips them where the grid ends at 0
    and 1.
    """
    writer = sheet.writer
    scale, zero = _parameters(weights, name, grid)
    total = writer.node("Add", [x.name, number_on_grid(sheet, weights, 3.0)])
    lowest, highest = grid.decode(torch.tensor([grid.lowest, grid.highest])).tolist()
    if lowest < 0 or highest > 1 + 1e-6:  # a grid that reaches further does not clip there; 255 * (1 / 255) is no 1
        total = writer.node("Clip", [total, writer.constant(0.0, np.float32), writer.constant(6.0, np.float32)])
    sixfold = writer.initializer(f"{name}.sixfold", (6 * grid.scale).numpy())
    codes = writer.node("QuantizeLinear", [total, sixfold, zero])
    value = writer.node("DequantizeLinear", [codes, scale, zero])
    weights.scales[value] = grid.scale.numpy()
    return value


def number_on_grid(sheet: Sheet, weights: Weights, number: float) -> str:
    """Write a number that is not 0 as one step of a grid: runtimes then add it, or multiply by it, on integers."""
    writer, kind = sheet.writer, codes_of(weights.target)[1]
    below = (-1, 0) if kind is np.int8 else (0, 1)
    code, zero = (writer.constant(each, kind, "code") for each in ((1, 0) if number > 0 else below))
    return writer.node("DequantizeLinear", [code, writer.constant(abs(number), np.float32), zero])


def codes_of(target: Target, bits: int = 8) -> tuple[int, Any]:
    """What is taken off the unsigned codes of activations, and the type that they then have."""
    if bits > 8:
        return (1 << 15, np.int16) if target.signed else (0, np.uint16)
    return (128, np.int8) if target.signed else (0, np.uint8)


def _parameters(weights: Weights, name: str, grid: Grid) -> tuple[str, str]:
    """Write a grid's scale and zero point, once."""
    names = f"{name}.scale", f"{name}.zero_point"
    if names[0] not in weights.writer.initializers:
        offset, kind = codes_of(weights.target, grid.bits)
        weights.writer.initializer(names[0], grid.scale.numpy())
        weights.writer.initializer(names[1], (grid.zero_point - offset).numpy().astype(kind))
    return names


def channel_clip(sheet: Sheet, name: str, module: Clip, x: Value) -> str:
    """Write min(relu(x), high) with the bound of each channel."""
    own = sheet.writer.initializer(f"{name}.high", module.high.reshape(-1, *(1 for _ in x.shape[2:])).numpy())
    return sheet.node("Min", sheet.node("Relu", x), own)


# --- modules -------------------------------------------------------------------------------------------------------

LAYERS: tuple[tuple[tuple[type[nn.Module], ...], Any], ...] = (
    (CONVOLUTIONS, convolution),
    ((TransposedConv,), transposed),
    ((nn.Linear,), linear),
    (BATCH_NORMS, batch_norm),
    ((nn.LayerNorm,), layer_norm),
    ((nn.GroupNorm,), group_norm),
    ((nn.Embedding,), embedding),
    ((nn.PReLU,), prelu),
)


def _present(*names: str | None) -> list[str]:
    return [name for name in names if name is not None]


def _any(values: list[int]) -> list[int] | None:
    return values if any(values) else None
