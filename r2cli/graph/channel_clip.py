"""ReLU6 after channels were scaled: min(relu(x), high), with one bound for each channel.

Equalization divides a channel by s, and ReLU6(s * x) = s * min(relu(x), 6 / s). So a network with ReLU6 computes the
same function after it, if each channel has the bound 6 / s. A checkpoint stores the bounds as `clips.NODE.high`, where
NODE is the node of the ReLU6 that they replace.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from r2cli.errors import R2Error
from r2cli.quantized.channels import per_channel

CLIPS = "clips."
HIGH = ".high"
# The bound of a channel that is not clipped. It is not infinity, because a checkpoint holds finite numbers only.
NEVER = torch.finfo(torch.float32).max


class Clip(nn.Module):
    """Compute min(relu(x), high) for x (n, channels, ...) and high (channels,), or () for one bound."""

    high: Tensor

    def __init__(self, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("high", high)

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.relu(x), per_channel(self.high, x.ndim - 1))


def put(net: fx.GraphModule, bounds: Mapping[str, Tensor]) -> None:
    """Replace each named node by a Clip, in place. Raises R2Error for a name that no node has."""
    nodes = {node.name: node for node in net.graph.nodes}
    for name, high in bounds.items():
        if name not in nodes:
            raise R2Error(
                f"the network has no value '{name}' to clip: give the network that the checkpoint was made of"
            )
        net.add_submodule(f"{CLIPS}{name}", Clip(high))
        with net.graph.inserting_after(nodes[name]):
            call = net.graph.call_module(f"{CLIPS}{name}", (nodes[name].args[0],))
        nodes[name].replace_all_uses_with(call)
        net.graph.erase_node(nodes[name])
    net.recompile()


def stored(floats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the bounds among the tensors of a checkpoint, by node."""
    bounds = {name: tensor for name, tensor in floats.items() if name.startswith(CLIPS) and name.endswith(HIGH)}
    return {name.removeprefix(CLIPS).removesuffix(HIGH): tensor for name, tensor in bounds.items()}
