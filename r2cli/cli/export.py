"""`r2 export`: write a checkpoint as an ONNX file, and prove the file."""

from time import perf_counter

from r2cli import console
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config import targets
from r2cli.config.groups import Evaluation, ExportForm, ExportGates, Inputs
from r2cli.config.inspection import ExportOutput
from r2cli.errors import InputError
from r2cli.storage.formats import CompressedReport
from r2cli.storage.run_files import RunFiles


@command
def export(
    given: Inputs, evaluation: Evaluation, wanted: ExportGates, form: ExportForm, written: ExportOutput
) -> Report:
    """Write a checkpoint, float or quantized, as ONNX, and prove the file."""
    source = gates.source(given)
    usual = "tflite" if written.output is not None and written.output.suffix == ".tflite" else targets.DEFAULT
    container = targets.get(form.target or usual).container
    ending = ".".join(dict.fromkeys((form.target, container))) if form.target else container
    ending = f"float.{ending}" if source.suffix == ".onnx" and not form.target else ending
    output = written.output or gates.beside(source, ending)
    gates.require_output(output, f".{container}", source=source)
    targets.require_installed(form.target or usual)
    files = RunFiles("export", [output], overwrite=written.overwrite)
    files.require_free()

    from r2cli.api import inputs
    from r2cli.cli import baseline, deliver, model_card, rerun
    from r2cli.deploy.retarget import retarget

    model_card.require(written, output)
    started = perf_counter()
    made, loaded = inputs.load(given, needed=False, measures=True, tell=console.note)
    made = retarget(made, form.target)
    if targets.get(made.target).container != container:
        raise InputError(f"{source} is for {made.target}: give --target {made.target}, or --target {usual}")
    if wanted.max_latency is not None and (not made.coded or container != "onnx"):
        raise InputError("--max-latency is of an .onnx file of codes beside its float network: leave it out")
    loaded = inputs.measured_by(evaluation, wanted, loaded)
    before = baseline.read(wanted, given, loaded)
    if written.dry_run:
        console.tell([f"would export {source} -> {output}"], as_json=written.json)
        return {"command": "export"}
    asked = rerun.asked("export", {"target": made.target, **form.asked}, loaded, given, [source])
    with files.claimed():
        known = files.finished(asked)  # of an export that was killed while its files were placed
        if known is None:
            report = {
                "command": "export",
                **deliver.to_file(made, files, output, loaded, form=form, what=str(source)),
                "measured_on": baseline.measured_on(given, loaded),
                "seconds": round(perf_counter() - started, 1),
            }
            deliver.judge(report, wanted, before)
            files.commit(asked, report)
        else:
            report = rerun.again(known, CompressedReport, output) | {"output": output}
            deliver.judge(report, wanted, before)
    model_card.write(written, output, report, asked.line)
    kind = f"{report['bits_per_weight']:.2f} bits a weight" if made.coded else "float32"
    metric = report.get("metric")
    measured = deliver.not_measured(report) if metric is None else f"{metric['shown']} in ONNX Runtime"
    summary = f"{output}: {measured}, {report['bytes']:,} bytes, {kind}"
    against = given.source if made.coded else None
    follow = console.next_step(*deliver.next_command(output, against, given, is_measured=metric is not None))
    console.tell([*deliver.told(report), summary, follow], as_json=written.json)
    deliver.require(report)
    return report
