"""How each operation of a network is written in ONNX: the one table, by the function of torch that computes it.

A handler gets the `Sheet` that it writes on, and the operation's arguments; a tensor among them is a `Value`. It
returns the name of the result, or a list of names. Layers and norms are in `onnx_layers.py`. What has no row is refused
by name: a file never holds what was not written on purpose.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from r2cli.deploy import onnx_moving, onnx_pointwise, onnx_pooling, onnx_recurrent
from r2cli.graph.functions import INDEX, PAD_WITH, SLICE
from r2cli.graph.recurrent import recurrent

ATEN = torch.ops.aten
Handler = Callable[..., Any]


def _rows(handler: Handler, *kinds: Any) -> dict[Any, Handler]:
    return dict.fromkeys(kinds, handler)


# The one table: how each operation, by the function of torch, is written.
OPERATORS: Mapping[Any, Handler] = {
    **_rows(onnx_pointwise.relu, F.relu),
    **_rows(onnx_pointwise.unary("Sigmoid"), torch.sigmoid),
    **_rows(onnx_pointwise.unary("Tanh"), torch.tanh),
    **_rows(onnx_pointwise.unary("Sqrt"), torch.sqrt),
    **_rows(onnx_pointwise.unary("Exp"), torch.exp),
    **_rows(onnx_pointwise.unary("Log"), torch.log),
    **_rows(onnx_pointwise.unary("Abs"), torch.abs),
    **_rows(onnx_pointwise.unary("Neg"), torch.neg),
    **_rows(onnx_pointwise.unary("Erf"), torch.erf),
    **_rows(onnx_pointwise.unary("Reciprocal"), torch.reciprocal),
    **_rows(onnx_pointwise.softplus, F.softplus),
    **_rows(onnx_pointwise.log_sigmoid, F.logsigmoid),
    **_rows(onnx_pointwise.mish, F.mish),
    **_rows(onnx_pointwise.rsqrt, torch.rsqrt),
    **_rows(onnx_pointwise.square, torch.square),
    **_rows(onnx_pointwise.log1p, torch.log1p),
    **_rows(onnx_pointwise.expm1, torch.expm1),
    **_rows(onnx_pointwise.not_equal, torch.ne),
    **_rows(onnx_pointwise.logical("Not"), torch.logical_not, torch.bitwise_not),
    **_rows(onnx_pointwise.unary("Floor"), torch.floor),
    **_rows(onnx_pointwise.unary("Cos"), torch.cos),
    **_rows(onnx_pointwise.unary("Sin"), torch.sin),
    **_rows(onnx_pointwise.binary("Add"), torch.add),
    **_rows(onnx_pointwise.binary("Sub"), torch.sub),
    **_rows(onnx_pointwise.binary("Mul"), torch.mul),
    **_rows(onnx_pointwise.divide, torch.div),
    **_rows(onnx_pointwise.binary("Pow"), torch.pow),
    **_rows(onnx_pointwise.binary("Max"), torch.maximum),
    **_rows(onnx_pointwise.binary("Min"), torch.minimum),
    **_rows(onnx_pointwise.compared("Equal"), torch.eq),
    **_rows(onnx_pointwise.compared("Greater"), torch.gt),
    **_rows(onnx_pointwise.compared("Less"), torch.lt),
    **_rows(onnx_pointwise.compared("GreaterOrEqual"), torch.ge),
    **_rows(onnx_pointwise.compared("LessOrEqual"), torch.le),
    **_rows(onnx_pointwise.logical("And"), torch.logical_and, torch.bitwise_and, ATEN.__and__.Tensor),
    **_rows(onnx_pointwise.logical("Or"), torch.logical_or, torch.bitwise_or, ATEN.__or__.Tensor),
    **_rows(onnx_pointwise.clamp, torch.clamp),
    **_rows(onnx_pointwise.relu6, F.relu6),
    **_rows(onnx_pointwise.hardsigmoid, F.hardsigmoid),
    **_rows(onnx_pointwise.gelu, F.gelu),
    **_rows(onnx_pointwise.leaky_relu, F.leaky_relu),
    **_rows(onnx_pointwise.elu, F.elu),
    **_rows(onnx_pointwise.celu, F.celu),
    **_rows(onnx_pointwise.softmax, torch.softmax),
    **_rows(onnx_pointwise.log_softmax, torch.log_softmax),
    **_rows(onnx_pointwise.cast, torch.Tensor.to),
    **_rows(onnx_pointwise.where, torch.where),
    **_rows(onnx_pointwise.masked_fill, torch.masked_fill),
    **_rows(onnx_moving.reshape, torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze),
    **_rows(onnx_moving.permute, torch.permute),
    **_rows(onnx_moving.transpose, torch.transpose),
    **_rows(onnx_moving.expand, torch.Tensor.expand),
    **_rows(onnx_moving.slice_, SLICE),
    **_rows(onnx_moving.select, torch.select),
    **_rows(onnx_moving.getitem, operator.getitem),
    **_rows(onnx_moving.chunk, torch.chunk, torch.split),
    **_rows(onnx_moving.unbind, torch.unbind),
    **_rows(onnx_moving.cat, torch.cat),
    **_rows(onnx_moving.stack, torch.stack),
    **_rows(onnx_moving.roll, torch.roll),
    **_rows(onnx_moving.pad, F.pad),
    **_rows(onnx_moving.pad_with, PAD_WITH),
    **_rows(onnx_moving.pixel_shuffle, F.pixel_shuffle),
    **_rows(onnx_moving.pixel_unshuffle, F.pixel_unshuffle),
    **_rows(onnx_moving.channel_shuffle, F.channel_shuffle),
    **_rows(onnx_moving.interpolate, F.interpolate),
    **_rows(onnx_pooling.max_pool, F.max_pool1d, F.max_pool2d, F.max_pool3d),
    **_rows(onnx_pooling.avg_pool, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    **_rows(onnx_pooling.adaptive_avg_pool, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    **_rows(onnx_pooling.reduced("ReduceMean"), torch.mean),
    **_rows(onnx_pooling.reduced("ReduceSum"), torch.sum),
    **_rows(onnx_pooling.reduced("ReduceMax"), torch.amax),
    **_rows(onnx_pooling.reduced("ReduceMin"), torch.amin),
    **_rows(onnx_pointwise.matmul, torch.matmul),
    **_rows(onnx_pointwise.attention, F.scaled_dot_product_attention),
    **_rows(onnx_pointwise.layer_norm, F.layer_norm),
    **_rows(onnx_pointwise.group_norm, F.group_norm),
    **_rows(onnx_pointwise.instance_norm, F.instance_norm),
    **_rows(onnx_pointwise.batch_norm, F.batch_norm),
    **_rows(onnx_pointwise.embedding, F.embedding),
    **_rows(onnx_pointwise.unary("Ceil"), torch.ceil),
    **_rows(onnx_pointwise.unary("Round"), torch.round),
    **_rows(onnx_pointwise.unary("Sign"), torch.sign),
    **_rows(onnx_pointwise.is_nan, torch.isnan),
    **_rows(onnx_pointwise.unary("Selu"), F.selu),
    **_rows(onnx_pointwise.logical("Xor"), torch.logical_xor),
    **_rows(onnx_pointwise.functional_linear, F.linear),
    **_rows(onnx_pointwise.functional_convolution, F.conv1d, F.conv2d, F.conv3d),
    **_rows(onnx_pointwise.einsum, torch.einsum),
    **_rows(onnx_pointwise.rms_norm, F.rms_norm),
    **_rows(onnx_pointwise.variance, torch.var),
    **_rows(onnx_pointwise.deviation, torch.std),
    **_rows(onnx_pointwise.vector_norm, torch.linalg.vector_norm),
    **_rows(onnx_pooling.adaptive_max_pool, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    **_rows(onnx_pooling.largest("ReduceMax"), torch.max),
    **_rows(onnx_pooling.largest("ReduceMin"), torch.min),
    **_rows(onnx_pooling.place_of("ArgMax"), torch.argmax),
    **_rows(onnx_pooling.place_of("ArgMin"), torch.argmin),
    **_rows(onnx_pooling.cumsum, torch.cumsum),
    **_rows(onnx_pooling.topk, torch.topk),
    **_rows(onnx_moving.repeat, torch.Tensor.repeat),
    **_rows(onnx_moving.repeat_interleave, torch.repeat_interleave),
    **_rows(onnx_moving.flip, torch.flip),
    **_rows(onnx_moving.index_select, torch.index_select),
    **_rows(onnx_moving.gather, torch.gather),
    **_rows(onnx_moving.index, INDEX),
    **_rows(onnx_moving.full, torch.full),
    **_rows(onnx_moving.arange, torch.arange),
    **_rows(onnx_recurrent.recurrent, recurrent),
}
