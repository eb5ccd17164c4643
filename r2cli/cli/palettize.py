"""`r2 palettize`: turn weights into indices into small tables of centroids, by k-means or by training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from r2cli import console, registry
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config.groups import DEFAULT_SOURCE, CompressionGates, Inputs
from r2cli.config.inspection import PalettizeOutput
from r2cli.config.methods import PalettizeConfig
from r2cli.errors import InputError
from r2cli.train.resume import resume_state

if TYPE_CHECKING:
    from r2cli.palettes.compression import PalettizedLayer


@command
def palettize(config: PalettizeConfig, given: Inputs, wanted: CompressionGates, written: PalettizeOutput) -> Report:
    """Compress to tables of centroids: codes, an ONNX file, and its proof."""
    started = perf_counter()
    source = gates.source(given.source, given.weights, DEFAULT_SOURCE)
    is_network = given.weights is not None or _is_checkpoint(source)
    method = config.method or (registry.PALETTE_METHOD if is_network else registry.PALETTE_METHOD_OF_FILES)
    suffix = config.suffix(method)
    output = written.output or gates.beside(source, f"{suffix}.safetensors")
    gates.require_output(output, ".safetensors", source=source)
    onnx, state = output.with_suffix(".onnx"), resume_state(output)
    gates.require_free([output, onnx] if is_network else [output], overwrite=written.overwrite)
    trains = registry.get(registry.PALETTE_METHODS, method).trains
    if written.resume and not trains:
        raise InputError(f"--resume belongs to training: --method {method} has nothing to resume")

    from r2cli.api import inputs
    from r2cli.cli import deliver
    from r2cli.palettes import palettization as worker

    worker.require_consistent(config, method, is_network=is_network)
    if not is_network:
        return _file(source, output, config, wanted, written)
    if trains:
        gates.require_no_state(state, resume=written.resume, overwrite=written.overwrite)
    made, loaded = inputs.load(given, tell=console.note)
    run = worker.ready(made, loaded, config)
    if written.dry_run:
        lines = [f"would palettize {source} ({made.model.name}) to {suffix} -> {output}, {onnx}"]
        console.tell(lines, as_json=written.json)
        return {"command": "palettize", "options": run.options}
    with gates.told_of(state):
        result = worker.compress(run, state, resume=written.resume, reporter=console)
    to = deliver.Destination("palettize", output, given.data, wanted, written.json, started, state)
    notes = ended_higher(result.epochs)
    return deliver.compressed(to, result, loaded, table=lambda _: _layers(result.layers), notes=notes)


def _file(
    source: Path, output: Path, config: PalettizeConfig, wanted: CompressionGates, written: PalettizeOutput
) -> Report:
    """Palettize a file of weights without a network."""
    from r2cli.palettes import palettization, weight_files

    started = perf_counter()
    settings = palettization.settings_of(config, registry.PALETTE_METHOD_OF_FILES)
    size = weight_files.total(source)
    options = {**settings.__dict__, "seed": config.seed}
    if written.dry_run:
        lines = [f"would palettize {source}, {size:,} bytes of tensors -> {output}"]
        console.tell(lines, as_json=written.json)
        return {"command": "palettize", "options": options}
    with console.bar("palettize", size, of_bytes=True) as progress:
        layers = weight_files.write(source, output, settings, seed=config.seed, advance=progress.advance)
    count = output.stat().st_size
    report = {
        "command": "palettize",
        "checkpoint": output,
        "bytes": count,
        **palettization.sizes(layers),
        "layers": [layer.__dict__ for layer in layers],
        "options": options,
        "seconds": round(perf_counter() - started, 1),
    }
    summary = f"{output}: {count:,} bytes of {size:,}, {report['bits_per_weight']:.2f} bits a weight with tables"
    console.tell([_layers(layers), summary, console.next_step(f"r2 analyze {output}")], as_json=written.json)
    gates.require(report, wanted, size=count)
    return report


def ended_higher(epochs: Sequence[Mapping[str, float]]) -> list[str]:
    """Return a line if training ended with a higher loss than its first epoch: most likely its steps were too large."""
    if not epochs or epochs[-1]["loss"] <= epochs[0]["loss"]:
        return []
    first, last = epochs[0]["loss"], epochs[-1]["loss"]
    return [f"the last epoch's loss is above the first one's ({last:.2f}, {first:.2f}): lower --clip-ratio or --lr"]


def _is_checkpoint(source: Path) -> bool:
    """Return whether `source` is a checkpoint of r2. A missing file counts as one, so that the error speaks of one."""
    from r2cli.storage import stream

    if not source.is_file():
        return not source.is_dir()
    return source.suffix != ".json" and "r2" in stream.metadata(source)


def _layers(layers: "Sequence[PalettizedLayer]") -> Any:
    """Return a table with a row for every layer."""
    cells = [
        (
            layer.layer,
            "x".join(map(str, layer.shape)),
            f"{layer.bits}/{layer.dim}",
            layer.tables,
            f"{layer.size:.2f}",
            f"{layer.entropy_coded:.2f}",
            f"{layer.sqnr:.1f}",
            layer.note,
        )
        for layer in layers
    ]
    return console.table(("layer", "shape", "bits/dim", "tables", "size", "Huffman", "dB", "note"), cells)
