"""ReLU6 behind channels that were scaled: min(relu(x), high), with a bound of its own for every channel.

ReLU6(s * x) is s * min(relu(x), 6 / s), so a network with ReLU6 can be equalized and stay the same function. The bounds
are in the checkpoint as `clips.NODE.high`, by the node of the ReLU6 in whose place they stand.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from r2cli.errors import R2Error
from r2cli.quantized.channels import per_channel

CLIPS = "clips."
HIGH = ".high"
NEVER = torch.finfo(torch.float32).max  # the bound of what is not clipped: a checkpoint's numbers are finite


class Clip(nn.Module):
    """min(relu(x), high): x (n, channels, ...), high (channels,), or () for one bound."""

    high: Tensor

    def __init__(self, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("high", high)

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.relu(x), per_channel(self.high, x.ndim - 1))


def put(net: fx.GraphModule, bounds: Mapping[str, Tensor]) -> None:
    """Put a Clip in the place of each named node; in place. Raises R2Error for a name that no node has."""
    nodes = {node.name: node for node in net.graph.nodes}
    for name, high in bounds.items():
        if name not in nodes:
            raise R2Error(f"the network has no value '{name}' to clip: the checkpoint is of another network")
        net.add_submodule(f"{CLIPS}{name}", Clip(high))
        with net.graph.inserting_after(nodes[name]):
            call = net.graph.call_module(f"{CLIPS}{name}", (nodes[name].args[0],))
        nodes[name].replace_all_uses_with(call)
        net.graph.erase_node(nodes[name])
    net.recompile()


def stored(floats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bounds among a checkpoint's tensors, by node."""
    found = {name: tensor for name, tensor in floats.items() if name.startswith(CLIPS) and name.endswith(HIGH)}
    return {name.removeprefix(CLIPS).removesuffix(HIGH): tensor for name, tensor in found.items()}
