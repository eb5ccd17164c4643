"""A BatchNorm that follows no layer gets one: a depthwise convolution of ones, into which it folds as into any other.

DenseNet and pre-activation networks have a BatchNorm and a ReLU in front of a convolution, and the factor of the
BatchNorm cannot go through the ReLU. Behind filters of ones nothing changes; folded, each channel has one weight, which
a scale of its own holds exactly at any number of bits, and runtimes compute it on integers.
"""

from torch import fx, nn

from r2cli.graph import structure
from r2cli.graph.operators import module_of

CONVOLUTIONS: dict[type[nn.Module], type[nn.Conv2d | nn.Conv3d]] = {
    nn.BatchNorm2d: nn.Conv2d,
    nn.BatchNorm3d: nn.Conv3d,
}
ENDING = "_alone"  # of the convolution's name, after that of the BatchNorm
NOTE = "a BatchNorm alone"


def give_layers(net: fx.GraphModule) -> list[str]:
    """Put a convolution of ones in front of every such BatchNorm of images; in place. Returns the names of those.

    A BatchNorm without running statistics, or one that runs twice, stays as it is.
    """
    followed = {layer.norm for layer in structure.layers(net)}
    calls = [str(node.target) for node in net.graph.nodes if node.op == "call_module"]
    found = []
    for node in list(net.graph.nodes):
        norm, name = module_of(net, node), str(node.target)
        kind = CONVOLUTIONS.get(type(norm)) if norm is not None else None
        if kind is None or norm.running_var is None or name in followed or calls.count(name) > 1:
            continue
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
