"""`r2 pretrain`: train a float network with a range regularizer."""

from time import perf_counter

from r2cli import console
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config.groups import AccuracyGate, NewNetwork
from r2cli.config.inspection import PretrainOutput
from r2cli.config.methods import PretrainConfig
from r2cli.train.resume import resume_state


@command
def pretrain(given: NewNetwork, config: PretrainConfig, wanted: AccuracyGate, written: PretrainOutput) -> Report:
    """Train a float network, with a regularizer of its weights' range."""
    started = perf_counter()
    output = written.output
    gates.require_output(output, ".safetensors")
    state = resume_state(output)
    gates.require_free([output], overwrite=written.overwrite)
    gates.require_no_state(state, resume=written.resume, overwrite=written.overwrite)

    from r2cli import data as datasets
    from r2cli.api import inputs
    from r2cli.storage import checkpoint
    from r2cli.train import pretraining as worker

    source = inputs.load_data(given, given.data, default=given.data, model=given.model)
    spec = inputs.model_spec(given, given.model, source, given.width)
    recorded = {"data": datasets.recorded(given.data)}
    recorded |= {} if given.weights is None else {"weights": given.weights.name}
    run = worker.ready(spec, source, config, recorded=recorded)
    if written.dry_run:
        console.tell([f"would train {run.plan} -> {output}"], as_json=written.json)
        return {"command": "pretrain", "options": run.options}
    console.note(f"training {run.plan} on {config.device}")
    network = worker.network_of(run)
    inputs.start_from(network, given, spec, tell=console.note)
    with gates.told_of(state):
        result = worker.train(run, network, state, resume=written.resume, reporter=console)
    checkpoint.save(result.checkpoint, output)
    state.unlink(missing_ok=True)
    unreadable = sorted({*source.train.unreadable, *source.test.unreadable})
    report = {
        "command": "pretrain",
        "output": output,
        "bytes": output.stat().st_size,
        **result.report,
        "unreadable": unreadable,
        "seconds": round(perf_counter() - started, 1),
    }
    last = result.epochs[-1]
    ratio = f"max|w|/std {last.range_mean:.2f} mean, {last.range_max:.2f} worst layer"
    summary = f"{output}: top-1 {last.top1:.2f} %, {ratio}, {result.parameters:,} parameters"
    more = f"{' --act-bits none' if source.input.is_text else ''}"
    more += "" if given.data == "digits" else f" --data {given.data}"
    follow = console.next_step(f"r2 ptq {output} --weight-bits 4{more}")
    console.tell([summary, *gates.unreadable(unreadable), follow], as_json=written.json)
    gates.require(report, wanted, top1=last.top1)
    return report
