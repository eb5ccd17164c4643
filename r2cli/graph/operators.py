"""Operators: what each kind of node in a graph is to quantization."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from r2cli.graph.channel_clip import Clip
from r2cli.graph.functions import SLICE

LayerModule = nn.Conv1d | nn.Conv2d | nn.Linear
NormModule = nn.BatchNorm1d | nn.BatchNorm2d
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Fused into the layer or the sum before them, by us and by every runtime.
ACTIVATIONS: tuple[Any, ...] = (F.relu, F.relu6, Clip)
# They choose, move or copy values that are on a grid already, so their output needs no grid of its own.
PASSING: tuple[Any, ...] = (
    *(F.max_pool1d, F.max_pool2d, F.adaptive_max_pool2d, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze),
    *(torch.permute, torch.transpose, operator.getitem, torch.split, torch.chunk, torch.unbind, torch.select, SLICE),
    *(torch.roll, torch.flip, Tensor.expand, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle),
)
# Their values are tuples.
TUPLES: tuple[Any, ...] = (torch.chunk, torch.split, torch.unbind)
# They read a value's shape and not the value.
SHAPES: tuple[Any, ...] = (getattr, Tensor.size)


def module_of(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_a(net: fx.GraphModule, node: fx.Node, kinds: tuple[Any, ...]) -> bool:
    """Whether `node` calls one of `kinds`: module classes, functions, or method names."""
    module = module_of(net, node)
    if module is not None:
        return isinstance(module, tuple(kind for kind in kinds if isinstance(kind, type)))
    return node.op in ("call_function", "call_method") and node.target in kinds
