"""The one table of operations: what each is to quantization, and why one that computes in float does so.

A new operation of a canonical graph (`functions.py`) is one row here.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from r2cli.graph.channel_clip import Clip
from r2cli.graph.functions import INDEX, PAD_WITH, SLICE
from r2cli.graph.recurrent import RecurrentWeight, recurrent
from r2cli.graph.transposed import TransposedConv

LayerModule = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | TransposedConv | RecurrentWeight
NormModule = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class Kind(Enum):
    """What an operation is to quantization."""

    LAYER = "has a weight that becomes codes"
    NORM = "is folded into the layer before it"
    ACTIVATION = "is fused into the layer or the sum before it, by us and by every runtime"
    PASSING = "chooses, moves or copies values that are on a grid already, so its output needs none of its own"
    INTEGER = "has integer kernels, between grids"
    POINTWISE = "takes one value at a time: in float, but cheap between two grids"
    FLOAT = "computes in float"
    SHAPE = "reads a value's shape and not the value"


@dataclass(frozen=True)
class When:
    """A function where its arguments are such that `holds` is true of the node."""

    function: Callable[..., Any]
    holds: Callable[[fx.Node], bool]


@dataclass(frozen=True)
class Row:
    """Operations of one kind: module classes, functions or functions in some cases.

    `name` and `reason` are what is said of one that computes in float, `operators` the ONNX operators that it becomes.
    """

    kind: Kind
    name: str
    members: tuple[Any, ...]
    reason: str = ""
    operators: tuple[str, ...] = ()


def _tensors(node: fx.Node) -> bool:
    return all(isinstance(given, fx.Node) for given in node.args[:2])


def with_number(node: fx.Node) -> bool:
    """Whether the second argument of a sum or product is a number; 0 is no step of a grid."""
    return isinstance(node.args[1], int | float) and node.args[1] != 0


def _one(node: fx.Node) -> bool:
    return node.args[1] in ((1, 1), 1, (1,))


def _nearest(node: fx.Node) -> bool:
    return "nearest" in str(node.kwargs.get("mode"))


class LeftFloat(nn.Module):
    """A `layer` that is none to quantization: it computes what the layer does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *given: Tensor) -> Any:
        return self.layer(*given)


ASKED = "--keep leaves it float"
NO_KERNEL = "runtimes have no integer kernel for it"
NO_CODES = "r2 has no codes for such weights"
BY_NUMBER = "it reads floats, or no layer reads it"
# The first row that fits counts.
TABLE: tuple[Row, ...] = (
    Row(Kind.LAYER, "layer", (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, RecurrentWeight)),
    Row(
        Kind.FLOAT,
        "layer",
        (LeftFloat,),
        ASKED,
        ("layer Conv", "layer Gemm", "layer MatMul", "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Clip"),
    ),
    Row(
        Kind.LAYER,
        "transposed convolution",
        (TransposedConv,),
        "ONNX Runtime has no integer kernel for it: it decodes the weight's codes",
        ("ConvTranspose",),
    ),
    Row(
        Kind.NORM,
        "BatchNorm",
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        "it reads no layer's value alone, so no layer can take it",
        ("BatchNormalization",),
    ),
    Row(
        Kind.ACTIVATION,
        "ReLU",
        (F.relu, F.relu6, Clip),
        "it reads floats, and not all that reads it rounds it",
        ("Relu", "Clip"),
    ),
    Row(
        Kind.PASSING,
        "shape",
        (
            *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose),
            *(operator.getitem, torch.split, torch.chunk, torch.unbind, torch.select, SLICE, Tensor.expand),
            *(F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, torch.flip, torch.index_select),
            *(F.max_pool1d, F.max_pool2d, F.adaptive_max_pool2d, F.pad, When(F.interpolate, _nearest), Tensor.repeat),
            *(torch.repeat_interleave, torch.roll),
        ),
    ),
    Row(
        Kind.INTEGER,
        "sum",
        (When(torch.add, _tensors),),
        "no layer reads it, or it adds floats: rounding it costs accuracy and wins no time",
        ("Add",),
    ),
    Row(Kind.INTEGER, "product", (When(torch.mul, _tensors),), "no layer reads it, or it multiplies floats", ("Mul",)),
    Row(Kind.INTEGER, "concatenation", (torch.cat,), "no layer reads it, or it joins floats", ("Concat",)),
    Row(
        Kind.INTEGER,
        "mean",
        (F.avg_pool2d, When(F.adaptive_avg_pool2d, _one)),
        "it gives the network's result, or reads floats",
        ("GlobalAveragePool", "AveragePool", "Pad"),
    ),
    Row(Kind.INTEGER, "sigmoid", (torch.sigmoid, F.hardsigmoid), "it reads floats", ("Sigmoid", "HardSigmoid")),
    Row(Kind.INTEGER, "leaky ReLU", (F.leaky_relu,), "it reads floats, or no layer reads it", ("LeakyRelu",)),
    Row(Kind.INTEGER, "sum with a number", (When(torch.add, with_number),), BY_NUMBER, ("Add",)),
    Row(Kind.INTEGER, "product with a number", (When(torch.mul, with_number),), BY_NUMBER, ("Mul",)),
    Row(Kind.POINTWISE, "GELU", (F.gelu,), NO_KERNEL, ("Gelu", "Erf", "Tanh", "Pow", "Mul", "Add", "Div")),
    Row(Kind.POINTWISE, "tanh", (torch.tanh,), NO_KERNEL, ("Tanh",)),
    Row(Kind.POINTWISE, "PReLU", (nn.PReLU,), NO_KERNEL, ("PRelu", "Where", "Mul")),
    Row(Kind.POINTWISE, "ELU", (F.elu, F.selu, F.celu), NO_KERNEL, ("Elu", "Selu", "Celu", "Mul", "Exp", "Sub")),
    Row(
        Kind.POINTWISE,
        "softplus",
        (F.softplus, F.mish, F.logsigmoid),
        NO_KERNEL,
        ("Softplus", "Mish", "Tanh", "Mul", "Log", "Sigmoid", "Div", "Exp", "Add", "Neg"),
    ),
    Row(Kind.POINTWISE, "sum with 0", (torch.add,), NO_KERNEL, ("Add",)),
    Row(Kind.POINTWISE, "product with 0", (torch.mul,), NO_KERNEL, ("Mul",)),
    Row(Kind.POINTWISE, "clip", (torch.clamp,), NO_KERNEL, ("Clip", "Max", "Min")),
    Row(Kind.POINTWISE, "sign", (torch.neg, torch.abs), NO_KERNEL, ("Neg", "Abs")),
    Row(Kind.FLOAT, "difference", (torch.sub,), NO_KERNEL, ("Sub",)),
    Row(Kind.FLOAT, "quotient", (torch.div, torch.reciprocal), NO_KERNEL, ("Div", "Reciprocal", "Floor")),
    Row(
        Kind.FLOAT,
        "layer norm",
        (nn.LayerNorm, F.layer_norm, F.rms_norm),
        "it divides by a deviation that it finds anew for every token",
        (
            "LayerNormalization",
            "RMSNormalization",
            "SimplifiedLayerNormalization",
            "ReduceMean",
            "Pow",
            "Add",
            "Sqrt",
            "Reciprocal",
            "Mul",
            "Div",
        ),
    ),
    Row(
        Kind.FLOAT,
        "group norm",
        (nn.GroupNorm, F.group_norm, F.instance_norm, F.batch_norm),
        "it divides by a deviation that it finds anew for every image",
        (
            "GroupNormalization",
            "InstanceNormalization",
            "ReduceMean",
            "Sub",
            "Mul",
            "Add",
            "Sqrt",
            "Reciprocal",
            "Div",
            "BatchNormalization",
        ),
    ),
    Row(
        Kind.FLOAT,
        "recurrent layer",
        (recurrent,),
        "its state goes on from step to step in float, and runtimes decode its weights' codes for it",
        ("LSTM", "GRU", "RNN", "Concat"),
    ),
    Row(
        Kind.FLOAT,
        "attention",
        (F.scaled_dot_product_attention,),
        "a softmax between two products of activations, which hold no weights",
        ("MatMul", "Softmax", "Mul", "Add", "Div", "Concat", "Where", "ReduceMax"),
    ),
    Row(Kind.FLOAT, "softmax", (torch.softmax, torch.log_softmax), NO_KERNEL, ("Softmax", "LogSoftmax")),
    Row(
        Kind.FLOAT,
        "product of values",
        (torch.matmul, torch.einsum, F.bilinear, F.linear),
        "both of its inputs are activations, which hold no weights",
        ("MatMul", "Einsum", "Add", "Gemm"),
    ),
    Row(
        Kind.FLOAT,
        "embedding",
        (nn.Embedding, F.embedding),
        "rows of a table, which no layer has computed",
        ("Gather",),
    ),
    Row(Kind.FLOAT, "convolution", (F.conv1d, F.conv2d, F.conv3d), NO_CODES, ("Conv",)),
    Row(
        Kind.FLOAT,
        "transposed convolution",
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        NO_CODES,
        ("ConvTranspose",),
    ),
    Row(
        Kind.FLOAT,
        "mean",
        (torch.mean, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.avg_pool1d, F.avg_pool3d),
        "runtimes have no integer kernel for a mean of such a shape",
        ("ReduceMean", "AveragePool", "GlobalAveragePool", "MatMul", "Mul", "GatherND", "Concat"),
    ),
    Row(
        Kind.FLOAT,
        "maximum",
        (
            torch.amax,
            torch.amin,
            torch.max,
            torch.min,
            torch.maximum,
            torch.minimum,
            F.max_pool3d,
            F.adaptive_max_pool1d,
            F.adaptive_max_pool3d,
            torch.topk,
            torch.argmax,
            torch.argmin,
        ),
        NO_KERNEL,
        ("ReduceMax", "ReduceMin", "Max", "Min", "MaxPool", "TopK", "ArgMax", "ArgMin"),
    ),
    Row(
        Kind.FLOAT,
        "total",
        (torch.sum, torch.cumsum, torch.var, torch.std, torch.linalg.vector_norm),
        NO_KERNEL,
        ("ReduceSum", "CumSum", "ReduceMean", "ReduceL2", "ReduceL1", "Sub", "Mul", "Sqrt", "Div", "Pow", "Abs"),
    ),
    Row(Kind.FLOAT, "pad with a number", (PAD_WITH,), NO_KERNEL, ("Pad",)),
    Row(Kind.FLOAT, "interpolation", (F.interpolate,), NO_KERNEL, ("Resize",)),
    Row(Kind.FLOAT, "stack", (torch.stack,), "it joins floats", ("Concat",)),
    Row(
        Kind.FLOAT,
        "choice",
        (torch.where, torch.masked_fill, torch.gather, INDEX),
        NO_KERNEL,
        ("Where", "Gather", "GatherND", "GatherElements", "Add"),
    ),
    Row(
        Kind.FLOAT,
        "comparison",
        (
            *(torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge, torch.logical_and, torch.logical_or),
            *(
                torch.logical_xor,
                torch.logical_not,
                torch.bitwise_not,
                torch.bitwise_and,
                torch.bitwise_or,
                torch.isnan,
            ),
        ),
        "it gives no numbers",
        ("Equal", "Not", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor"),
    ),
    Row(
        Kind.FLOAT,
        "function",
        (
            *(
                torch.pow,
                torch.exp,
                torch.expm1,
                torch.log,
                torch.log1p,
                torch.sqrt,
                torch.rsqrt,
                torch.square,
                torch.erf,
            ),
            *(torch.sin, torch.cos, torch.floor, torch.ceil, torch.round, torch.sign),
        ),
        NO_KERNEL,
        (
            "Pow",
            "Exp",
            "Log",
            "Sqrt",
            "Reciprocal",
            "Erf",
            "Sin",
            "Cos",
            "Floor",
            "Ceil",
            "Round",
            "Sign",
            "Mul",
            "Sub",
            "Add",
        ),
    ),
    Row(
        Kind.FLOAT,
        "constant",
        (torch.full, torch.arange),
        "it depends on the batch alone",
        ("ConstantOfShape", "Expand", "Range"),
    ),
    Row(Kind.FLOAT, "cast", (Tensor.to,), "it changes the type of values", ("Cast",)),
    Row(
        Kind.SHAPE,
        "shape",
        (getattr, Tensor.size, operator.mul, operator.floordiv, operator.add, operator.sub, operator.mod),
    ),
)


def _of(*kinds: Kind) -> tuple[Any, ...]:
    return tuple(member for row in TABLE if row.kind in kinds for member in row.members)


LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, TransposedConv, RecurrentWeight)
MATRICES = (nn.Linear, RecurrentWeight)  # layers whose weight has two axes, and that no image passes
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS, PASSING, SHAPES = _of(Kind.ACTIVATION), _of(Kind.PASSING), _of(Kind.SHAPE)
# Their values are tuples.
TUPLES: tuple[Any, ...] = (torch.chunk, torch.split, torch.unbind)


def row(net: fx.GraphModule, node: fx.Node) -> Row | None:
    """The row of what `node` calls; None where the table has none."""
    return next((each for each in TABLE if is_a(net, node, each.members)), None)


def kind(net: fx.GraphModule, node: fx.Node) -> Kind | None:
    """What `node` is to quantization; None where the table has no row for it."""
    found = row(net, node)
    return None if found is None else found.kind


def module_of(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_a(net: fx.GraphModule, node: fx.Node, kinds: tuple[Any, ...]) -> bool:
    """Whether `node` calls one of `kinds`: module classes, or functions, in some cases or always."""
    module = module_of(net, node)
    if module is not None:
        return isinstance(module, tuple(known for known in kinds if isinstance(known, type)))
    if node.op != "call_function":
        return False
    return any(
        node.target is known.function and known.holds(node) if isinstance(known, When) else node.target is known
        for known in kinds
    )
