"""Whether the network that r2 reads from an ONNX file is the one that the file is.

All later work, the proof included, starts from what was read, so a fault in reading would pass every later check.
"""

from pathlib import Path

import torch
from torch import nn

from r2cli.deploy import runtime
from r2cli.graph import equivalence
from r2cli.graph.equivalence import Misread
from r2cli.storage.input_spec import NetworkInput, places

TOLERANCE = 1e-3  # of an output's largest value: two programs add floats in other orders, and have their own exp
SAMPLES = 2


@torch.no_grad()
def require_same(path: Path, network: nn.Module, spec: NetworkInput, names: tuple[str, ...]) -> None:
    """Compare `network`, read from the file at `path`, with the file in ONNX Runtime on two random inputs.

    `names` are those of its outputs. Raises Misread where one differs, and UnrunnableError where ONNX Runtime cannot
    run the file.
    """
    given = equivalence.random_inputs(network, spec, SAMPLES)
    expected = equivalence.tensors(runtime.runner(path, optimise=False)(*places(given)))
    found = equivalence.tensors(network.eval()(*places(given)))
    for name, own, other in zip(names, found, expected, strict=True):
        if equivalence.relative(own, other) > TOLERANCE:
            raise Misread(
                f"{path}: r2 reads the output '{name}' as another function than ONNX Runtime runs, which is r2's fault "
                "and worth a report: export the network in another form, or with another opset"
            )
