"""`r2 palettize`: turn weights into indices into small tables of centroids, by k-means or by training."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from r2cli import console, registry
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config import targets
from r2cli.config.groups import CompressionGates, Evaluation, FileForm, Inputs
from r2cli.config.inspection import PalettizeOutput
from r2cli.config.methods import PalettizeConfig
from r2cli.storage.formats import PalettesReport
from r2cli.storage.run_files import RunFiles
from r2cli.train.resume import resume_state

if TYPE_CHECKING:
    from r2cli.palettes.compression import PaletteSettings, PalettizedLayer


@command
def palettize(
    config: PalettizeConfig,
    given: Inputs,
    evaluation: Evaluation,
    wanted: CompressionGates,
    form: FileForm,
    written: PalettizeOutput,
) -> Report:
    """Compress to tables of centroids: codes, an ONNX file, and its proof."""
    started = perf_counter()
    source = gates.source(given)
    is_network = given.weights is not None or given.pretrained or _is_checkpoint(source)
    method = config.method or (registry.PALETTE_METHOD if is_network else registry.PALETTE_METHOD_OF_FILES)
    suffix = config.suffix(method)
    output = written.output or gates.beside(source, f"{suffix}.safetensors")
    gates.require_output(output, ".safetensors", source=source)
    file, state = targets.beside(output, config.target), resume_state(output)
    gates.require_kept(source, file)
    files = RunFiles(
        "palettize",
        [output, file] if is_network else [output],
        state=state if registry.get(registry.PALETTE_METHODS, method).trains else None,
        resume=written.resume,
        overwrite=written.overwrite,
    )
    files.require_free()

    from r2cli.api import inputs
    from r2cli.cli import baseline, deliver, model_card, rerun
    from r2cli.deploy.rehearsal import rehearse
    from r2cli.palettes import palettization as worker

    model_card.require(written, file if is_network else None)
    worker.require_consistent(config, method, is_network=is_network)
    if not is_network:
        return _file(source, files, config, wanted, written)
    made, loaded = inputs.load(given, needed=worker.needs_data(config, method), measures=True, tell=console.note)
    trains = registry.get(registry.PALETTE_METHODS, method).trains
    loaded = inputs.measured_by(evaluation, wanted, loaded, trains=trains)
    before = baseline.read(wanted, given, loaded)
    rehearse(made, config.target, loaded.shown)
    run = worker.ready(made, loaded, config)
    gates.warn_of_speed(config.act_bits)
    if written.dry_run:
        lines = [f"would palettize {source} ({made.model.name}) to {suffix} -> {output}, {file}"]
        console.tell(lines, as_json=written.json)
        return {"command": "palettize", "options": run.options}
    asked = rerun.asked("palettize", run.options | form.asked, loaded, given, [source])
    to = deliver.Destination(files, asked, given, wanted, before, form, written, started)
    with files.claimed():
        known = deliver.finished(to)
        if known is not None:
            return known
        with gates.told_of(state):
            result = worker.compress(run, state, resume=written.resume, reporter=console)
        notes = gates.ended_higher([epoch["loss"] for epoch in result.epochs], mend="--clip-ratio or --lr")
        return deliver.compressed(to, result, loaded, table=lambda _: _layers(result.layers), notes=notes)


def _file(
    source: Path, files: RunFiles, config: PalettizeConfig, wanted: CompressionGates, written: PalettizeOutput
) -> Report:
    """Palettize a file of weights without a network."""
    from r2cli.cli import rerun
    from r2cli.palettes import palettization, weight_files

    gates.require_measurable(wanted, {"max_bytes"}, f"{source} has weights alone, without a network to measure")
    output = files.files[0]
    settings = palettization.settings_of(config, registry.PALETTE_METHOD_OF_FILES)
    size = weight_files.total(source)
    options = {**settings.__dict__, "seed": config.seed}
    if written.dry_run:
        lines = [f"would palettize {source}, {size:,} bytes of tensors -> {output}"]
        console.tell(lines, as_json=written.json)
        return {"command": "palettize", "options": options}
    asked = rerun.of_files("palettize", options, weight_files.parts(source))
    shown: list[console.Line]
    with files.claimed():
        known = files.finished(asked)
        if known is None:
            report, shown = _palettized(source, files, settings, config.seed)
            gates.judge(report, wanted, size=report["bytes"])
            files.commit(asked, report | {"options": options})
        else:
            report, shown = rerun.again(known, PalettesReport, output) | {"checkpoint": output}, [rerun.told(output)]
            gates.judge(report, wanted, size=report["bytes"])
    sizes = f"{report['bytes']:,} bytes of {size:,}, {report['bits_per_weight']:.2f} bits a weight with tables"
    console.tell([*shown, f"{output}: {sizes}", console.next_step("r2", "analyze", output)], as_json=written.json)
    gates.require(report)
    return report | {"options": options}


def _palettized(
    source: Path, files: RunFiles, settings: "PaletteSettings", seed: int
) -> tuple[dict[str, Any], list[console.Line]]:
    """Write the palettes of `source` to the temporary file of the output; the report, and its table."""
    from r2cli.palettes import palettization, weight_files

    started, output = perf_counter(), files.files[0]
    with console.bar("palettize", weight_files.total(source), of_bytes=True) as progress:
        layers = weight_files.write(source, files.writing(output), settings, seed=seed, advance=progress.advance)
    report = {
        "command": "palettize",
        "checkpoint": output,
        "bytes": files.size(output),
        **palettization.sizes(layers),
        "layers": [layer.__dict__ for layer in layers],
        "seconds": round(perf_counter() - started, 1),
    }
    return report, [_layers(layers)]


def _is_checkpoint(source: Path) -> bool:
    """Return whether `source` is a checkpoint of r2, or a network in an ONNX file.

    A missing file counts as one, so that the error speaks of one.
    """
    from r2cli.storage import stream

    if not source.is_file():
        return not source.is_dir()
    return source.suffix == ".onnx" or (source.suffix != ".json" and "r2" in stream.metadata(source))


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
