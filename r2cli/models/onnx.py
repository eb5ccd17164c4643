"""Networks that come as an ONNX file: the family `onnx`, whose one keyword is the graph without its weights.

`read` makes the spec and the tensors of a file. `build` makes the network of a spec: no file is opened again, and what
a checkpoint records is checked before it is built (`onnx_program`).
"""

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from r2cli.errors import InputError
from r2cli.models import onnx_file, onnx_program, onnx_reading
from r2cli.models.onnx_network import OnnxNetwork
from r2cli.models.onnx_program import OnnxProgram
from r2cli.models.onnx_reading import OnnxInput
from r2cli.storage.checkpoint import ModelSpec
from r2cli.storage.input_spec import KINDS, NetworkInput, TensorSpec, TensorsSpec, forms
from r2cli.storage.keywords import require_safe

FAMILY = "onnx"


def has(name: str) -> bool:
    """Say whether `name` is the family of networks that came as ONNX files."""
    return name == FAMILY


def require_there(path: Path) -> None:
    """Raises InputError for a file that is missing, before anything else is asked of it."""
    onnx_file.require_there(path)


def given(path: Path) -> list[OnnxInput]:
    """The inputs of the file at `path`. Raises InputError as `read` does."""
    return onnx_reading.given(path, onnx_file.opened(path))


def stated(path: Path) -> TensorsSpec | None:
    """The inputs of the file at `path`, where it leaves open nothing but how many samples there are, else None."""
    own = given(path)
    if any(None in one.shape[1:] or one.kind not in KINDS for one in own):
        return None
    shapes = [tuple(length for length in one.shape[1:] if length) for one in own]
    pairs = zip(own, shapes, strict=True)
    return TensorsSpec(tuple(TensorSpec(one.name, shape, one.kind, int(one.kind != "float32")) for one, shape in pairs))


def read(path: Path, inputs: NetworkInput, classes: int) -> tuple[ModelSpec, NetworkInput, dict[str, Tensor]]:
    """The spec of the network in the file at `path`, its inputs with the names that it has for them, its state_dict.

    Inputs that have names are taken by them, in the order of `inputs`, others by place. Raises InputError for a file
    that is damaged, quantized already, for inputs of another shape, or of what r2 cannot read, naming the node and its
    operator.
    """
    own = [one.name for one in given(path)]
    wanted = inputs.names if isinstance(inputs, TensorsSpec) and len(own) > 1 and all(inputs.names) else own
    if len(own) != len(forms(inputs)) or set(wanted) != set(own):
        raise InputError(
            f"{path} takes {len(own)} inputs ({', '.join(own)}), not {inputs}: give the data that it is for, as --data "
            "FILE.py:FACTORY"
        )
    program, tensors = onnx_reading.read(path, dict(zip(wanted, forms(inputs), strict=True)))
    if isinstance(inputs, TensorsSpec):
        inputs = TensorsSpec(tuple(replace(one, name=n) for one, n in zip(inputs.tensors, wanted, strict=True)))
    return ModelSpec(FAMILY, classes, inputs.channels, args={"graph": program.text()}), inputs, tensors


def build(spec: ModelSpec, most: int | None = None) -> nn.Module:
    """The network of `spec`, with zeros for weights. Raises InputError for a graph that is damaged, or whose tensors
    have more than `most` elements."""
    require_safe(spec.name, spec.args, "the network's description")
    program = onnx_program.of_text(spec.args.get("graph"), most)
    try:
        return OnnxNetwork(program)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:  # paths that no module may have
        raise InputError(f"the network that the file describes is damaged ({error}): write the file again") from error


def program(spec: ModelSpec) -> OnnxProgram:
    """What a spec records, with the names of inputs and outputs."""
    return onnx_program.of_text(spec.args.get("graph"))
