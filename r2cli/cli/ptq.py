"""`r2 ptq`: quantize a trained network without training."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from r2cli import console, registry
from r2cli.cli import gates, pictures
from r2cli.cli.command import Report, command
from r2cli.config import targets
from r2cli.config.groups import CompressionGates, Evaluation, FileForm, Inputs
from r2cli.config.inspection import PtqOutput
from r2cli.config.methods import PtqConfig
from r2cli.storage.run_files import RunFiles

if TYPE_CHECKING:
    from r2cli.data import Data
    from r2cli.ptq.auto import Trial
    from r2cli.ptq.quantize import PtqResult
    from r2cli.storage.checkpoint import Checkpoint


USUAL = ("target_bits", "target_bytes", "sensitivity")  # recorded of every run
SHOWN = 8  # points of a front


@command
def ptq(
    config: PtqConfig,
    given: Inputs,
    evaluation: Evaluation,
    wanted: CompressionGates,
    form: FileForm,
    written: PtqOutput,
) -> Report:
    """Quantize without training: codes, an ONNX file, and its proof."""
    started = perf_counter()
    source = gates.source(given)
    output = written.output or gates.beside(source, f"{config.suffix}.safetensors")
    gates.require_output(output, ".safetensors", source=source)
    file = targets.beside(output, config.target)
    gates.require_kept(source, file)
    files = RunFiles("ptq", [output, file], resume=written.resume, overwrite=written.overwrite)
    files.require_free()

    from r2cli import data as datasets
    from r2cli.api import inputs
    from r2cli.cli import baseline, deliver, model_card, rerun
    from r2cli.deploy.rehearsal import rehearse
    from r2cli.ptq import quantize as worker

    model_card.require(written, file)
    looks = worker.looks_at_images(config, has_data=given.data is not None)
    needed = looks and worker.needs_data(config)
    made, loaded = inputs.load(given, needed=needed, measures=looks, tell=console.note)
    has_images, loaded = loaded.name != datasets.NOISE, inputs.measured_by(evaluation, wanted, loaded)
    before = baseline.read(wanted, given, loaded)
    rehearse(made, config.target, loaded.shown)
    calibration = datasets.calibration_count(config.calibration, loaded) if looks and has_images else 0
    options = worker.options_of(config, worker.settings_of(config), calibration)
    gates.of_widths(config, form)
    if written.dry_run:
        lines = [f"would quantize {source} ({made.model.name}) to {config.suffix} -> {output}, {file}"]
        console.tell(lines, as_json=written.json)
        return {
            "command": "ptq",
            "options": options | (_mixed(config) if config.is_mixed else {}),
        }
    asked = rerun.asked(
        "ptq", options | _mixed(config) | _left_open(config) | form.asked, loaded, given, [source, config.cost]
    )
    to = deliver.Destination(files, asked, given, wanted, before, form, written, started)
    replaces = written.overwrite or written.resume
    with files.claimed(), pictures.beside(output, config.pareto, wanted=written.plot, replaces=replaces) as drawn:
        known = deliver.finished(to)
        if known is not None:
            return drawn(known)
        result = _made(made, loaded if has_images else None, config, calibration, wanted.max_drop)
        done = deliver.compressed(
            to,
            result,
            loaded,
            table=lambda report: _layers(result.layers, report["float_operations"]),
            notes=_notes(result, "bytes" if config.cost is None else "cost"),
        )
        return drawn(done)


def _made(
    made: "Checkpoint", source: "Data | None", config: PtqConfig, calibration: int, max_drop: float | None
) -> "PtqResult":
    from r2cli.ptq import quantize as worker
    from r2cli.ptq import smallest

    if config.minimize is not None:
        return smallest.find(made, source, config, calibration=calibration, max_drop=max_drop, reporter=console)
    return worker.quantize(made, source, config, calibration=calibration, reporter=console)


def _mixed(config: PtqConfig) -> dict[str, Any]:
    """What mixed precision is asked for."""
    names = ("target_bits", "target_bytes", "sensitivity", "budget", "act_widths", "target_act_bits", "minimize")
    return {name: getattr(config, name) for name in names if name in USUAL or getattr(config, name) is not None}


def _left_open(config: PtqConfig) -> dict[str, Any]:
    """What a method that chooses is free to choose, None, beside what it is held to."""
    if not registry.get(registry.PTQ_METHODS, config.method).chooses:
        return {}
    return {"granularity": config.granularity, "weight_range": config.weight_range}


def _notes(result: "PtqResult", spent: str) -> list[console.Line]:
    """Return lines that say what was chosen, and what ranges and corrections come from.

    `spent` is what mixed precision spends: bytes, or the cost of a table.
    """
    notes: list[console.Line] = [_front(result, spent), _again(result)] if result.bits else []
    notes += [_chosen(result.trials)] if result.trials else []
    notes += [_tried(result.details["smallest"], spent)] if "smallest" in result.details else []
    if registry.get(registry.PTQ_METHODS, result.settings.method).dataless or (
        result.settings.act_bits and not result.calibration
    ):
        images = result.calibration
        shown = f"{images} images" if images else "the BatchNorms' statistics, without an image"
        notes.append(f"ranges and corrections: from {shown}")
    if result.relu_top1 is not None:
        notes.append(f"ReLU6 became ReLU: float top-1 {result.relu_top1:.2f} %, {result.float_top1:.2f} before")
    return notes


def _chosen(trials: "Sequence[Trial]") -> str:
    """Return a line that says which trial was chosen and why, and which options give the same bytes."""
    from r2cli.ptq.auto import NEAREST, kept
    from r2cli.ptq.quantize import trial_again

    best = kept(trials)
    plain = min((trial for trial in trials if trial.method == NEAREST), key=lambda trial: trial.divergence)
    rounded = f", {plain.divergence:.2g} ({plain.sqnr:.1f}) with nearest rounding at its best"
    against = "" if plain is best else rounded
    what = "probabilities" if best.decides else "outputs"
    return (
        f"chosen of {len(trials)} trials, for {what} {best.away} (outputs {best.sqnr:.1f} dB) from the float network's"
        f"{against}; the same again: {' '.join(trial_again(trials))}"
    )


def _front(result: "PtqResult", spent: str) -> Any:
    """Return a table of what is lost over what is spent, the choice marked, of `SHOWN` points of the front."""
    points = result.details["front"]
    step = max(1, len(points) // SHOWN)
    shown = [each for place, each in enumerate(points) if each["chosen"] or place % step == 0]
    rows = [(f"{each['cost']:,.6g}", f"{each['loss']:.3g}", "chosen" if each["chosen"] else "") for each in shown]
    return console.table((spent, "lost", ""), rows)


def _tried(trials: Sequence[Mapping[str, Any]], spent: str) -> Any:
    """Return a table of the trials on the way to the smallest file."""
    rows = [
        (
            f"{each['spent']:,.6g}",
            f"{each['value']:.2f}",
            f"{each['drop']:+.2f}",
            "enough" if each["enough"] else "",
            f"{each['seconds']:.0f}",
        )
        for each in sorted(trials, key=lambda each: -float(each["spent"]))
    ]
    return console.table((spent, "metric", "metric lost", "", "seconds"), rows)


def _again(result: "PtqResult") -> str:
    """Return a line with the choice of mixed precision, as options that give the same bytes."""
    from r2cli.ptq.quantize import bits_again

    layers = [layer for layer in result.layers if layer.grid != "float"]
    count = sum(math.prod(layer.shape) for layer in layers)
    mean = sum(layer.bits * math.prod(layer.shape) for layer in layers) / count
    return f"{mean:.2f} bits a weight on average; the same again: {' '.join(bits_again(result.settings))}"


def _layers(layers: Sequence[Any], float_operations: Sequence[Mapping[str, Any]]) -> Any:
    """Return a table with a row for every layer, and for every kind of operation that stays float, with the reason."""
    from r2cli.graph.operators import ASKED

    usual = Counter(layer.act_bits for layer in layers).most_common(1)[0][0]
    cells = [(layer.layer, "x".join(map(str, layer.shape)), *_cells(layer, usual)) for layer in layers]
    kinds: dict[tuple[str, str], list[str]] = {}
    for each in float_operations:
        if each["reason"] != ASKED:  # a row of its own says so
            kinds.setdefault((each["kind"], each["reason"]), []).append(each["node"])
    for (kind, reason), nodes in kinds.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        cells.append((f"{nodes[0]}{more}", "", "", "float", "", f"{kind}: {reason}"))
    return console.table(("layer", "shape", "bits", "grid", "dB", "note"), cells)


def _cells(layer: Any, usual: int | None) -> tuple[object, ...]:
    """Bits, grid, dB and note of a layer; the bits of what it reads where they are not the `usual` ones."""
    if layer.grid == "float":
        return "", layer.grid, "", layer.note
    own = "floats" if layer.act_bits is None else f"{layer.act_bits} bits"
    reads = "" if layer.act_bits == usual else f"reads {own}"
    return layer.bits, layer.grid, f"{layer.sqnr:.1f}", "; ".join(filter(None, (reads, layer.note)))
