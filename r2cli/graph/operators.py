"""Operators: what each kind of node in a graph is to quantization."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import stochastic_depth

from r2cli.graph.attention import cut, pad_to_windows
from r2cli.graph.channel_clip import Clip

LayerModule = nn.Conv1d | nn.Conv2d | nn.Linear
NormModule = nn.BatchNorm1d | nn.BatchNorm2d
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Fused into the layer or the sum before them, by us and by every runtime.
ACTIVATIONS: tuple[Any, ...] = (nn.ReLU, nn.ReLU6, Clip, F.relu, F.relu6, torch.relu, torch.relu_, "relu", "relu_")
# They do nothing in evaluation.
NOTHING: tuple[Any, ...] = (nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout, stochastic_depth)
# They choose, move or copy values that are on a grid already, so their output needs no grid of its own.
PASSING: tuple[Any, ...] = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.Flatten),
    *(F.max_pool2d, torch.flatten, torch.reshape, torch.permute, torch.transpose),
    *(operator.getitem, "flatten", "view", "reshape", "permute", "transpose", "contiguous"),
    *(torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze", "expand", "roll", pad_to_windows, cut),
    *(torch.chunk, torch.split, "chunk", "split", torch.select, torch.ops.aten.slice.Tensor),
)
# Their values are tuples.
TUPLES: tuple[Any, ...] = (torch.chunk, torch.split, "chunk", "split")
# They read a value's shape and not the value.
SHAPES: tuple[Any, ...] = (getattr, "size", "dim", Tensor.size)


def module_of(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_a(net: fx.GraphModule, node: fx.Node, kinds: tuple[Any, ...]) -> bool:
    """Whether `node` calls one of `kinds`: module classes, functions, or method names."""
    module = module_of(net, node)
    if module is not None:
        return isinstance(module, tuple(kind for kind in kinds if isinstance(kind, type)))
    return node.op in ("call_function", "call_method") and node.target in kinds
