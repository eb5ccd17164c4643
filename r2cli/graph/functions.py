"""The functions of a canonical graph: the one Python object that stands for each operation, and its arguments.

A node of a canonical graph is one of these:

placeholder, output   the inputs; one tensor, or a tuple of those that the network gives, in order
get_attr              a parameter or buffer of the graph
call_module           Conv1d/2d/3d, ConvTranspose1d/2d/3d, Linear, BatchNorm1d/2d/3d, LayerNorm, GroupNorm, Embedding,
                      PReLU: torch's own classes, `padding` of a convolution in numbers; RecurrentWeight
call_function         a function of `FUNCTIONS` with those arguments, or one of `OTHERS`
                      with the arguments given there; an operator of torch.ops.aten where neither has a row for it

Arguments are given by position in the order of the row, those behind `|` by keyword and only where they are not the
default of the operator. Numbers are plain: dimensions count from 0, sizes of pools are a tuple with one for each
dimension, the shape of a reshape has -1 for the batch. Only the batch may be of any size.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2cli.graph.recurrent import recurrent

SLICE, INDEX = torch.ops.aten.slice.Tensor, torch.ops.aten.index.Tensor
PAD_WITH = torch.ops.aten.constant_pad_nd.default
# By the operator of torch.ops.aten: the function, and the operator's arguments that it takes.
FUNCTIONS: Mapping[str, tuple[Callable[..., Any], str]] = {
    # one value at a time
    "relu": (F.relu, "self"),
    "relu6": (F.relu6, "self"),
    "leaky_relu": (F.leaky_relu, "self negative_slope"),
    "elu": (F.elu, "self alpha"),
    "selu": (F.selu, "self"),
    "celu": (F.celu, "self alpha"),
    "gelu": (F.gelu, "self | approximate"),
    "hardsigmoid": (F.hardsigmoid, "self"),
    "sigmoid": (torch.sigmoid, "self"),
    "special_expit": (torch.sigmoid, "self"),
    "tanh": (torch.tanh, "self"),
    "softplus": (F.softplus, "self beta threshold"),
    "log_sigmoid": (F.logsigmoid, "self"),
    "mish": (F.mish, "self"),
    **{
        name: (getattr(torch, name), "self")
        for name in (
            *("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "square", "erf", "sin"),
            *("cos", "floor", "ceil", "round", "sign", "logical_not", "bitwise_not", "isnan"),
        )
    },
    # of two values, or of a value and a number
    **{
        name: (getattr(torch, name), "self other")
        for name in (
            *("mul", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge"),
            *("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or"),
        )
    },
    "div": (torch.div, "self other | rounding_mode"),
    "pow": (torch.pow, "self exponent"),
    "where": (torch.where, "condition self other"),
    "masked_fill": (torch.masked_fill, "self mask value"),
    "matmul": (torch.matmul, "self other"),
    "bmm": (torch.matmul, "self mat2"),
    "mm": (torch.matmul, "self mat2"),
    "bilinear": (F.bilinear, "input1 input2 weight bias"),
    "einsum": (torch.einsum, "equation tensors"),
    # over a dimension
    "softmax": (torch.softmax, "self dim"),
    "log_softmax": (torch.log_softmax, "self dim"),
    "sum": (torch.sum, "self dim keepdim"),
    "amax": (torch.amax, "self dim keepdim"),
    "amin": (torch.amin, "self dim keepdim"),
    "max": (torch.max, "self dim keepdim"),
    "min": (torch.min, "self dim keepdim"),
    "argmax": (torch.argmax, "self dim keepdim"),
    "argmin": (torch.argmin, "self dim keepdim"),
    "var": (torch.var, "self dim | correction keepdim"),
    "std": (torch.std, "self dim | correction keepdim"),
    "cumsum": (torch.cumsum, "self dim"),
    "topk": (torch.topk, "self k dim"),
    "linalg_vector_norm": (torch.linalg.vector_norm, "self ord dim keepdim"),
    # norms that are no module
    "instance_norm": (F.instance_norm, "input running_mean running_var weight bias use_input_stats momentum eps"),
    "rms_norm": (F.rms_norm, "input normalized_shape weight eps"),
    # moves values
    "cat": (torch.cat, "tensors dim"),
    "stack": (torch.stack, "tensors dim"),
    "unbind": (torch.unbind, "self dim"),
    "select": (torch.select, "self dim index"),
    "index_select": (torch.index_select, "self dim index"),
    "gather": (torch.gather, "self dim index"),
    "index": (INDEX, "self indices"),
    "flip": (torch.flip, "self dims"),
    "roll": (torch.roll, "self shifts dims"),
    "permute": (torch.permute, "self dims"),
    "transpose": (torch.transpose, "self dim0 dim1"),
    "swapaxes": (torch.transpose, "self axis0 axis1"),
    "unsqueeze": (torch.unsqueeze, "self dim"),
    "repeat_interleave": (torch.repeat_interleave, "self repeats dim"),
    "pixel_shuffle": (F.pixel_shuffle, "self upscale_factor"),
    "pixel_unshuffle": (F.pixel_unshuffle, "self downscale_factor"),
    "channel_shuffle": (F.channel_shuffle, "self groups"),
    # pools
    "max_pool1d": (F.max_pool1d, "self kernel_size stride padding dilation ceil_mode"),
    "max_pool2d": (F.max_pool2d, "self kernel_size stride padding dilation ceil_mode"),
    "max_pool3d": (F.max_pool3d, "self kernel_size stride padding dilation ceil_mode"),
    "avg_pool1d": (F.avg_pool1d, "self kernel_size stride padding ceil_mode count_include_pad"),
    "avg_pool2d": (F.avg_pool2d, "self kernel_size stride padding ceil_mode count_include_pad divisor_override"),
    "avg_pool3d": (F.avg_pool3d, "self kernel_size stride padding ceil_mode count_include_pad divisor_override"),
    "adaptive_avg_pool1d": (F.adaptive_avg_pool1d, "self output_size"),
    "adaptive_avg_pool2d": (F.adaptive_avg_pool2d, "self output_size"),
    "adaptive_avg_pool3d": (F.adaptive_avg_pool3d, "self output_size"),
    "adaptive_max_pool1d": (F.adaptive_max_pool1d, "self output_size"),
    "adaptive_max_pool2d": (F.adaptive_max_pool2d, "self output_size"),
    "adaptive_max_pool3d": (F.adaptive_max_pool3d, "self output_size"),
    # a layer whose weight depends on the input
    "conv1d": (F.conv1d, "input weight bias stride padding dilation groups"),
    "conv2d": (F.conv2d, "input weight bias stride padding dilation groups"),
    "conv3d": (F.conv3d, "input weight bias stride padding dilation groups"),
    "linear": (F.linear, "input weight bias"),
    "embedding": (F.embedding, "indices weight"),
    "layer_norm": (F.layer_norm, "input normalized_shape weight bias eps"),
    "group_norm": (F.group_norm, "input num_groups weight bias eps"),
    "batch_norm": (F.batch_norm, "input running_mean running_var weight bias training momentum eps"),
}
# Functions that `canonical.py` writes with arguments of its own.
OTHERS: Mapping[Callable[..., Any], str] = {
    torch.add: "x, y: y a tensor or a number",
    torch.sub: "x, y: either may be a number",
    torch.clamp: "x, least, greatest: a number or None each",
    torch.mean: "x, dims (tuple), keepdim; of an image's height and width it is adaptive_avg_pool2d, and flatten",
    torch.flatten: "x, first dimension, last dimension",
    torch.reshape: "x, shape (tuple)",
    torch.squeeze: "x, dims (tuple)",
    torch.split: "x, sizes (list), dim; of torch.chunk too",
    torch.chunk: "x, parts, dim; only of the batch",
    SLICE: "x, dim, start, end, step: start and end within the size",
    F.pad: "x, pad (tuple, the last dimension first), mode, 0.0 or None: zeros, or values that are there",
    PAD_WITH: "x, pad, another number",
    Tensor.expand: "x, sizes (tuple): -1 where it stays, a number, or a size of the batch",
    Tensor.repeat: "x, repeats (tuple): 1 for an axis of one, which is expanded",
    Tensor.to: "x, type",
    Tensor.size: "x, dim: the batch's size, of an input",
    torch.full: "sizes (tuple), value, dtype=, device=",
    torch.arange: "start, end, step, dtype=, device=",
    getattr: "an input, 'device'",
    operator.getitem: "a tuple, index",
    operator.mul: "sizes that depend on the batch; with floordiv, add, sub and mod",
    F.scaled_dot_product_attention: "query, key, value, attn_mask=, is_causal=, scale=",
    recurrent: "kind, x, states or None, weights, layers, bidirectional, batch_first",
    F.interpolate: "x, size= or scale_factor= (tuples), mode=, align_corners=, antialias=",
}
