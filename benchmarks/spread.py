"""A network whose channel ranges are spread apart on purpose, and which is the same function.

    python benchmarks/spread.py model.safetensors spread.safetensors [--seed 0]

Channel i of every convolution-BatchNorm-ReLU-convolution pair is multiplied by exp(N(0, 1)) in the BatchNorm and
divided by as much where it is read. One grid per tensor cannot hold such weights, and cross-layer equalization undoes
it without data.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from r2cli.calibration import deployed
from r2cli.graph import batchnorm, operators, structure
from r2cli.graph.read import trace
from r2cli.ptq import equalize
from r2cli.storage import checkpoint


@torch.no_grad()
def spread(made: checkpoint.Checkpoint, seed: int) -> checkpoint.Checkpoint:
    """`made`, float, with the channels of all its pairs spread; pairs over a ReLU6 are left as they are."""
    net, folded = (trace(deployed.network(made), made.input.blank(2)) for _ in range(2))
    norms = {layer.name: layer.norm for layer in structure.layers(net)}
    draw = torch.Generator().manual_seed(seed)
    batchnorm.remove_norms(folded)
    for name, link in equalize.links(folded).items():
        own = norms[name]
        norm, second = net.get_submodule(own) if own else None, net.get_submodule(link.second.name)
        if norm is None or norm.weight is None or any(operators.is_a(folded, n, equalize.RELU6) for n in link.between):
            continue
        assert isinstance(norm, operators.NORMS) and isinstance(second, operators.LAYERS)
        factor = torch.randn(len(norm.weight), generator=draw).exp()
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)
        parts = equalize.by_channel(second, len(factor))
        second.weight.copy_((parts / factor.reshape(len(parts), 1, -1, 1)).reshape(second.weight.shape))
    floats = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return replace(made, floats=floats).then("spread", {"seed": seed}, {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    checkpoint.save(spread(checkpoint.load(given.source), given.seed), given.output)
    print(given.output)
