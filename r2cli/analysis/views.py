"""The weights of a file to analyze, in one view or two: as trained, with BatchNorm folded, or decoded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from r2cli.analysis import layer_table, onnx_weights
from r2cli.analysis.layer_table import Analysis, AnalyzeSettings, OtherTensor
from r2cli.calibration import deployed
from r2cli.config import machine
from r2cli.config.inspection import AnalyzeConfig
from r2cli.errors import InputError, R2Error
from r2cli.graph import batchnorm, equivalence, operators, structure
from r2cli.graph.read import Unreadable
from r2cli.storage import checkpoint, stream
from r2cli.storage.stream import Stored, from_memory

TRAINED, FOLDED, DECODED = "as trained", "folded", "decoded"


@dataclass(frozen=True)
class View:
    """Weights that are analyzed together. `is_float_checkpoint` says that r2 made the file and can quantize it."""

    file: Path
    name: str
    layers: tuple[Stored, ...]
    others: tuple[OtherTensor, ...]
    note: str = ""
    is_float_checkpoint: bool = False


def chosen(path: Path, view: str, *, everything: bool) -> list[View]:
    """The views of a file, of a float checkpoint with BatchNorm 'trained', 'folded' or 'both'.

    Raises InputError where the view that was asked for cannot be had.
    """
    found = of_file(path, everything=everything)
    kept = [each for each in found if view == "both" or each.name not in (TRAINED, FOLDED) or view in each.name]
    if not kept:
        raise InputError(f"{path} cannot be folded ({found[0].note}): give --view trained")
    return kept


def of_file(path: Path, *, everything: bool) -> list[View]:
    """The views of a file: a float checkpoint with BatchNorm as trained and folded, a coded one decoded, others as is.

    Raises InputError naming the file and the tensor that cannot be read.
    """
    if path.suffix == ".onnx" and not path.is_dir():
        decoded, floats, others = onnx_weights.of_onnx(path)
        return [_view(path, DECODED if decoded else "", [*decoded, *floats], others, everything=everything)]
    stored = stream.tensors_of_model(path)
    recorded = stream.metadata(path).get("r2") if path.is_file() and path.suffix == ".safetensors" else None
    if recorded is None:
        return [_view(path, "", stored, [], everything=everything)]
    has_network, coded = checkpoint.has_network(path, recorded)
    if not has_network:
        state = [from_memory(name, tensor, str(path)) for name, tensor in checkpoint.load_state(path).items()]
        return [_view(path, DECODED, state, [], everything=everything)]
    if coded:
        made = checkpoint.load(path)
        found = [from_memory(name, one.decode(), str(path)) for name, one in made.coded.items()]
        rest = [from_memory(name, tensor, str(path)) for name, tensor in made.floats.items()]
        return [_view(path, DECODED, [*found, *rest], [], everything=everything)]
    trained = _view(path, TRAINED, stored, [], everything=everything)
    try:
        folded, silenced = _folded(checkpoint.load(path))
    except R2Error as error:
        why = error.why if isinstance(error, Unreadable) else error
        return [replace(trained, note=f"shown as trained only: {why}")]
    if not folded:
        return [replace(trained, name="", is_float_checkpoint=True)]
    note = f"{silenced} dead channels are shown as zero, as `r2 ptq` makes them" if silenced else ""
    # A weight that no BatchNorm is folded into is the same in both views.
    both = [folded.get(each.name, each) for each in trained.layers]
    second = replace(trained, name=FOLDED, layers=tuple(both), note=note)
    return [replace(view, is_float_checkpoint=True) for view in (trained, second)]


def _view(path: Path, name: str, found: Sequence[Stored], more: Sequence[OtherTensor], *, everything: bool) -> View:
    layers, others = layer_table.split(found, everything=everything)
    return View(path, name, tuple(layers), (*others, *more))


@torch.no_grad()
def _folded(made: checkpoint.Checkpoint) -> tuple[dict[str, Stored], int]:
    """Fold BatchNorm as `r2 ptq` does. Returns the folded weights by name, and the number of channels that became 0."""
    model = deployed.network(made)
    if not any(isinstance(module, operators.NORMS) for module in model.modules()):
        return {}, 0
    net = equivalence.read(model, made.input, deployed.architecture(made))
    silenced = sum(batchnorm.make_dead_channels_constant(net).values())
    factors = batchnorm.remove_norms(net)
    found = {}
    for layer, module in structure.named_layers(net):
        if layer.name in factors:
            weight = batchnorm.folded(module.weight, factors[layer.name])
            found[layer.weight] = from_memory(layer.weight, weight, made.origin)
    return found, silenced


def measured(
    views: Sequence[View], layers: Sequence[Sequence[Stored]], config: AnalyzeConfig, advance: Callable[[int], None]
) -> list[Analysis]:
    """A row for every one of the `layers` of each view. `advance` is told of bytes that are done."""
    settings = AnalyzeSettings(config.outlier_sigma, config.quick, config.everything)
    threads = config.threads or machine.usable_cores()
    return [
        Analysis(
            str(view.file),
            view.name,
            layer_table.rows(own, settings, threads=threads, advance=advance),
            view.others,
            view.note,
        )
        for view, own in zip(views, layers, strict=True)
    ]
