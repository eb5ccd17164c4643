"""A BatchNorm that follows no layer gets one: a depthwise convolution of ones, into which it folds as into any other.

DenseNet and pre-activation networks have a BatchNorm and a ReLU in front of a convolution, and the factor of the
BatchNorm cannot go through the ReLU. Behind filters of ones nothing changes; folded, each channel has one weight, which
a scale of its own holds exactly at any number of bits, and runtimes compute it on integers.

One of vectors that a linear layer alone reads, as in the heads of transformers, goes into that layer.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import fx, nn

from r2cli.graph import structure
from r2cli.graph.batchnorm import affine
from r2cli.graph.edit import bypass
from r2cli.graph.operators import module_of

ENDING = "_alone"  # of the convolution's name, after that of the BatchNorm
NOTE = "a BatchNorm alone"


def are_in(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of a graph whose BatchNorms got layers."""
    return any(name.endswith(f"{ENDING}.weight") for name in names)


def into_layers(net: fx.GraphModule, *, on_grids: bool) -> list[str]:
    """Fold the BatchNorms that `into_linears` does and, for activations `on_grids`, give the others layers; in place.

    Returns the names of those layers.
    """
    into_linears(net)
    return give_layers(net) if on_grids else []


@torch.no_grad()
def into_linears(net: fx.GraphModule) -> None:
    """Fold every BatchNorm of vectors that a linear layer alone reads into that layer; in place."""
    followed = {layer.norm for layer in structure.layers(net)}
    calls = Counter(str(node.target) for node in net.graph.nodes if node.op == "call_module")
    for node in list(net.graph.nodes):
        norm, name, reader = module_of(net, node), str(node.target), structure.only_user(node)
        layer = None if reader is None else module_of(net, reader)
        if not isinstance(norm, nn.BatchNorm1d) or norm.running_var is None or not isinstance(layer, nn.Linear):
            continue
        if name in followed or calls[name] > 1 or calls[str(reader.target)] > 1:  # type: ignore[union-attr]
            continue
        factor, shift = affine(norm)
        exact = layer.weight.double()
        bias = exact @ shift if layer.bias is None else exact @ shift + layer.bias.double()
        layer.bias = nn.Parameter(bias.float())
        layer.weight.copy_(exact * factor)
        bypass(net, node)
    net.delete_all_unused_submodules()


def give_layers(net: fx.GraphModule) -> list[str]:
    """Put a convolution of ones in front of every such BatchNorm of images; in place. Returns the names of those.

    A BatchNorm without running statistics, or one that runs twice, stays as it is.
    """
    followed = {layer.norm for layer in structure.layers(net)}
    calls = Counter(str(node.target) for node in net.graph.nodes if node.op == "call_module")
    found = []
    for node in list(net.graph.nodes):
        norm, name = module_of(net, node), str(node.target)
        if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d) or norm.running_var is None:
            continue
        if name in followed or calls[name] > 1:
            continue
        kind = nn.Conv2d if isinstance(norm, nn.BatchNorm2d) else nn.Conv3d
        count = norm.num_features
        ones = kind(count, count, 1, groups=count, bias=False, device=norm.running_var.device)
        nn.init.ones_(ones.weight)
        path = f"{name}{ENDING}"
        net.add_submodule(path, ones.train(norm.training))
        with net.graph.inserting_before(node):
            node.args = (net.graph.call_module(path, node.args[:1]), *node.args[1:])
        found.append(path)
    net.recompile()
    return found
