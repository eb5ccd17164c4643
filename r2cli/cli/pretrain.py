"""`r2 pretrain`: train a float network with a range regularizer."""

from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from r2cli import console
from r2cli.cli import gates, pictures
from r2cli.cli.command import Report, command
from r2cli.config.groups import AccuracyGate, NewNetwork
from r2cli.config.inspection import PretrainOutput
from r2cli.config.training import PretrainConfig
from r2cli.storage import own_code
from r2cli.storage.formats import TrainedReport
from r2cli.storage.run_files import RunFiles
from r2cli.train.resume import resume_state

if TYPE_CHECKING:
    from r2cli.train.pretraining import PretrainRun


@command
def pretrain(given: NewNetwork, config: PretrainConfig, wanted: AccuracyGate, written: PretrainOutput) -> Report:
    """Train a float network, with a regularizer of its weights' range."""
    output = written.output
    gates.require_output(output, ".safetensors")
    state = resume_state(output)
    files = RunFiles("pretrain", [output], state=state, resume=written.resume, overwrite=written.overwrite)
    files.require_free()

    from r2cli import data as datasets
    from r2cli.api import data_notes, inputs, weights
    from r2cli.cli import baseline, rerun
    from r2cli.train import pretraining as worker

    source = inputs.load_data(given, given.data, default=given.data, model=given.model)
    for line in data_notes.told_of_data(given.model, source.input, source):
        console.note(line)
    spec = weights.model_spec(given, given.model, source, given.width)
    recorded = {"data": datasets.recorded(given.data)}
    recorded |= {} if given.weights is None else {"weights": given.weights.name}
    run = worker.ready(spec, source, config, recorded=recorded)
    before = baseline.read(wanted, given, source)
    if written.dry_run:
        console.tell([f"would train {run.plan} -> {output}"], as_json=written.json)
        return {"command": "pretrain", "options": run.options}
    asked = rerun.asked("pretrain", run.options, source, given, [given.weights])
    replaces = written.overwrite or written.resume
    with files.claimed(), pictures.beside(output, wanted=written.plot, replaces=replaces) as drawn:
        known = files.finished(asked)
        if known is None:
            report = _trained(run, given, files) | {"measured_on": baseline.measured_on(given, source)}
            gates.judge(report, wanted, baseline=before)
            files.commit(asked, report)
        else:
            report = rerun.again(known, TrainedReport, output) | {"output": output}
            gates.judge(report, wanted, baseline=before)
        drawn(report)
    again = [] if known is None else [rerun.told(output)]
    console.tell([*again, *_ending(report, given, is_text=source.input.is_text)], as_json=written.json)
    gates.require(report)
    return report


def _trained(run: "PretrainRun", given: NewNetwork, files: RunFiles) -> dict[str, Any]:
    """Train, and write the checkpoint to its temporary file; the report."""
    from r2cli import models
    from r2cli.api import weights
    from r2cli.storage import checkpoint
    from r2cli.train import pretraining as worker

    started, (output,), state = perf_counter(), files.files, files.state
    assert state is not None
    console.note(f"training {run.plan} on {run.config.device}")
    network = worker.network_of(run)
    if said := models.told_of_batches(network):
        console.note(said)
    weights.start_from(network, given, run.spec, tell=console.note)
    with gates.told_of(state):
        result = worker.train(run, network, state, resume=files.resume, reporter=console)
    files.write(output, checkpoint.to_bytes(result.checkpoint))
    return {
        "command": "pretrain",
        "output": output,
        "bytes": files.size(output),
        **result.report,
        "unreadable": sorted({*run.source.train.unreadable, *run.source.test.unreadable}),
        "seconds": round(perf_counter() - started, 1),
    }


def _ending(report: Mapping[str, Any], given: NewNetwork, *, is_text: bool) -> list[console.Line]:
    """The checkpoint in one line, what was left out, and the next command."""
    output = report["output"]
    worst = f"max|w|/std {report['range_mean']:.2f} mean, {report['range_max']:.2f} worst layer"
    measured = "accuracy not measured" if report["metric"] is None else report["metric"]["shown"]
    summary = f"{output}: {measured}, {worst}, {report['parameters']:,} parameters"
    more = ["--act-bits", "none"] if is_text else []
    more += [] if given.data == "digits" else gates.again(given)
    more += ["--model", given.model] if own_code.is_code(given.model) else []
    follow = console.next_step("r2", "ptq", output, "--weight-bits", 4, *more)
    higher = gates.ended_higher([epoch["loss"] for epoch in report["epochs"]], mend="--lr")
    return [summary, *higher, *gates.unreadable(report["unreadable"]), follow]
