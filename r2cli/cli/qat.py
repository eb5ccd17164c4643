"""`r2 qat`: train a network as it will be deployed, with its weights and activations on few levels."""

from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from r2cli import console
from r2cli.cli import gates, pictures
from r2cli.cli.command import Report, command
from r2cli.config import targets
from r2cli.config.groups import CompressionGates, Evaluation, FileForm, Inputs
from r2cli.config.inspection import QatOutput
from r2cli.config.training import QatConfig
from r2cli.storage.run_files import RunFiles
from r2cli.train.resume import resume_state

if TYPE_CHECKING:
    from r2cli.qat.prepare import TrainedLayer

# The gates that compare with no float network.
OF_NEW = ("min_accuracy", "min_metric", "baseline", "max_regression", "max_bytes", "max_latency")


@command
def qat(
    config: QatConfig,
    given: Inputs,
    evaluation: Evaluation,
    wanted: CompressionGates,
    form: FileForm,
    written: QatOutput,
) -> Report:
    """Train with quantized weights and activations: codes, an ONNX file, and its proof."""
    started = perf_counter()
    has_weights = given.source is not None or given.weights is not None or given.pretrained
    is_new = config.from_scratch and given.model is not None and not has_weights
    if is_new:
        gates.require_measurable(wanted, OF_NEW, "a network from scratch has no float network to compare with")
    source = gates.source(given)
    output = written.output or gates.beside(source, f"{config.suffix}.safetensors")
    gates.require_output(output, ".safetensors", source=source)
    state, file = resume_state(output), targets.beside(output, config.target)
    gates.require_kept(source, file)
    files = RunFiles("qat", [output, file], state=state, resume=written.resume, overwrite=written.overwrite)
    files.require_free()

    from r2cli.api import inputs
    from r2cli.cli import baseline, deliver, model_card, rerun
    from r2cli.deploy.rehearsal import rehearse
    from r2cli.qat import quantization_aware as worker

    worker.require_bits(config)
    model_card.require(written, file)
    made, loaded = inputs.new_network(given, config.seed) if is_new else inputs.load(given, tell=console.note)
    loaded = inputs.measured_by(evaluation, wanted, loaded, trains=True)
    before = baseline.read(wanted, given, loaded)
    rehearse(made, config.target, loaded.shown)
    run = worker.ready(made, loaded, config)
    gates.of_widths(config, form)
    if written.dry_run:
        lines = [f"would train {source} ({made.model.name}) as {config.suffix} -> {output}, {file}"]
        console.tell(lines, as_json=written.json)
        return {"command": "qat", "options": run.options}
    asked = rerun.asked("qat", run.options | form.asked, loaded, given, [None if is_new else source])
    to = deliver.Destination(files, asked, given, wanted, before, form, written, started)
    replaces = written.overwrite or written.resume
    with files.claimed(), pictures.beside(output, wanted=written.plot, replaces=replaces) as drawn:
        known = deliver.finished(to)
        if known is not None:
            return drawn(known)
        with gates.told_of(state):
            result = worker.train(run, state, resume=written.resume, is_new=is_new, reporter=console)
        notes = gates.ended_higher([epoch.loss for epoch in result.epochs], mend="--lr")
        return drawn(deliver.compressed(to, result, run.source, table=lambda _: _layers(result.layers), notes=notes))


def _layers(layers: "Sequence[TrainedLayer]") -> Any:
    """Return a table with a row for every layer."""
    cells = [
        (
            layer.layer,
            "x".join(map(str, layer.shape)),
            layer.bits if layer.levels else "",
            layer.act_bits or "float",
            layer.levels or "",
            layer.note,
        )
        for layer in layers
    ]
    return console.table(("layer", "shape", "bits", "reads", "levels used", "note"), cells)
