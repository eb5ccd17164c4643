"""Whether the network that r2 reads from an ONNX file is the one that the file is.

All later work, the proof included, starts from what was read, so a fault in reading would pass every later check.
"""

from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from r2cli.deploy import runtime
from r2cli.graph import equivalence
from r2cli.graph.equivalence import Misread
from r2cli.models.onnx_file import HALVES, opened
from r2cli.models.onnx_program import OnnxProgram
from r2cli.storage.input_spec import NetworkInput, places

TOLERANCE = 1e-3  # of an output's largest value: two programs add floats in other orders, and have their own exp
OF_HALVES = 5e-2  # where the file computes in 16 bits, and r2 in 32
SAMPLES = 2


@torch.no_grad()
def require_same(path: Path, network: nn.Module, spec: NetworkInput, program: OnnxProgram) -> None:
    """Compare `network`, the `program` read from the file at `path`, with the file in ONNX Runtime on random inputs.

    Raises Misread where an output differs, and UnrunnableError where ONNX Runtime cannot run the file.
    """
    model, given = opened(path), places(equivalence.random_inputs(network, spec, SAMPLES))
    taken = _as_taken(model, dict(zip(program.inputs, given, strict=True)))
    expected = equivalence.tensors(runtime.runner(path, optimise=False)(*taken))
    found = equivalence.tensors(network.eval()(*given))
    tolerance = OF_HALVES if _has_halves(model) else TOLERANCE
    for name, own, other in zip(program.outputs, found, expected, strict=True):
        if equivalence.relative(own, other) > tolerance:
            raise Misread(
                f"{path}: r2 reads the output '{name}' as another function than ONNX Runtime runs, which is r2's fault "
                "and worth a report: export the network in another form, or with another opset"
            )


def _as_taken(model: onnx.ModelProto, given: Mapping[str, Tensor]) -> list[Tensor]:
    """The inputs in the order of the file, and in its types: r2 reads those of 16 bits as float32."""
    kinds = {each.name: each.type.tensor_type.elem_type for each in model.graph.input if each.name in given}
    return [given[name].half() if kind == TensorProto.FLOAT16 else given[name] for name, kind in kinds.items()]


def _has_halves(model: onnx.ModelProto) -> bool:
    """Whether the file computes in floats of 16 bits somewhere."""
    casts = [
        each for node in model.graph.node if node.op_type == "Cast" for each in node.attribute if each.name == "to"
    ]
    kinds = {each.data_type for each in model.graph.initializer} | {each.i for each in casts}
    return bool(kinds & set(HALVES))
