"""The float network and what was made of it, as graphs that are the same node for node but for the grids."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import fx

from r2cli import registry
from r2cli.calibration import deployed
from r2cli.deploy import read_back, runtime
from r2cli.errors import InputError
from r2cli.graph import edit, equivalence
from r2cli.ptq import post_training
from r2cli.ptq.post_training import PtqSettings
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import Given, each

MATCHED_ON = 4  # samples


def graphs(
    reference: Checkpoint, candidate: Checkpoint | Path, batches: Iterable[Given]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The float network and the candidate, a checkpoint or an .onnx file, which is matched on the first of `batches`.

    Raises InputError where the reference has codes, the candidate has none, or is of another graph: the first value
    that differs is named; and where there is no batch.
    """
    inputs = next(iter(batches), None)
    if inputs is None:
        raise InputError("there is no sample to compare the networks on: the test split is empty")
    if reference.coded:
        raise InputError(f"{reference.origin} is quantized already: give the float network first")
    if isinstance(candidate, Path):
        plain, made = _of_file(reference, candidate, each(inputs, lambda one: one[:MATCHED_ON]))
    else:
        plain, made = _of_checkpoint(reference, candidate)
    return plain.eval().requires_grad_(False), made.eval().requires_grad_(False)


def _of_file(reference: Checkpoint, path: Path, inputs: Given) -> tuple[fx.GraphModule, fx.GraphModule]:
    file = read_back.opened(path)
    history = runtime.recorded(path).history if runtime.is_ours(path) else ()
    rounds = any(node.op_type == "QuantizeLinear" for node in file.graph.node)

    def again() -> fx.GraphModule:
        if read_back.has_norms(file):
            return equivalence.read(deployed.network(reference), reference.input, deployed.architecture(reference))
        return post_training.float_network(reference, _settings(history, 8 if rounds else None))

    return again(), read_back.network(path, file, again(), inputs)


def _of_checkpoint(reference: Checkpoint, candidate: Checkpoint) -> tuple[fx.GraphModule, fx.GraphModule]:
    if not candidate.coded:
        raise InputError(f"{candidate.origin} is a float network: give what `r2 ptq`, `qat` or `palettize` made of it")
    if candidate.folded or candidate.activations:
        plain = post_training.float_network(
            reference, _settings(candidate.history, 8 if candidate.activations else None)
        )
        made = deployed.network(candidate)
        assert isinstance(made, fx.GraphModule)
    else:
        plain, made = (
            equivalence.read(deployed.network(one), one.input, deployed.architecture(one))
            for one in (reference, candidate)
        )
    own = [node for node in made.graph.nodes if not edit.is_grid(node)]
    for first, second in zip(plain.graph.nodes, own, strict=False):
        if (first.name, str(first.target)) != (second.name, str(second.target)):
            raise InputError(
                f"{candidate.origin} is not of the network {reference.origin}: the first value that differs is "
                f"'{first.name}', there '{second.name}'. Names do not matter in its .onnx file: give that"
            )
    if len(plain.graph.nodes) != len(own):
        raise InputError(f"{candidate.origin} is not of the network {reference.origin}: one has more values")
    return plain, made


def _settings(history: Sequence[Mapping[str, Any]], act_bits: int | None) -> PtqSettings:
    """How the candidate was prepared for its codes: as its record says, if `ptq` made it."""
    usual = PtqSettings(registry.PTQ_NEAREST, 8, act_bits, post_training.CHANNEL, {})
    last: Mapping[str, Any] = history[-1] if history else {"command": ""}
    if last["command"] != "ptq":
        return usual
    asked = last["options"]
    own: dict[str, Any] = {part.name: asked[part.name] for part in fields(PtqSettings) if part.name in asked}
    own["parts"] = None if own.get("parts") is None else tuple(own["parts"])
    return PtqSettings(**own)
