"""`r2 verify`: the proof of an ONNX file, r2's or anybody's."""

from pathlib import Path
from typing import TYPE_CHECKING

from r2cli import console
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config import targets
from r2cli.config.groups import Inputs, MeasuredImages, Preparation, Told
from r2cli.config.inspection import VerifyConfig, VerifyFiles, VerifyGates
from r2cli.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from r2cli import data as datasets
    from r2cli.storage.checkpoint import Checkpoint


@command
def verify(
    given: VerifyFiles, images: MeasuredImages, config: VerifyConfig, wanted: VerifyGates, answer: Told
) -> Report:
    """Prove an ONNX file, r2's or anybody's: integer weights, bytes, the same results in each runtime and as before."""
    file, against = Path(given.file), given.against
    if file.suffix not in (".onnx", ".tflite"):
        raise InputError(f"{file} is no .onnx or .tflite file: name one, and its checkpoint with --against")
    if against is None and wanted.max_latency is not None:
        raise InputError("--max-latency needs --against: the checkpoint, or the float .onnx file")
    if answer.dry_run:
        console.tell([f"would verify {file}{f' against {against}' if against else ''}"], as_json=answer.json)
        return {"command": "verify"}

    from r2cli import api
    from r2cli import data as datasets
    from r2cli.cli import deliver, provenance
    from r2cli.deploy import engines

    engines.chosen(config.runtime)  # before any work
    original, source = _read(given, images)
    console.note(f"verifying {file}")
    proof = api.verify(file, original or against, source, config, reporter=console)
    proof = proof.extended(provenance.checks(file), {})
    report = {
        "command": "verify",
        "output": file,
        "against": against,
        "passed": proof.passed,
        "checks": [check.__dict__ for check in proof.checks],
        **proof.measures,
    }
    told = report.get("inputs", f"{report.get('samples')} test images")
    summary = f"{file}: {report['ticks']} checks, {report['bytes']:,} bytes; on {told}"
    is_data = source is not None and source.name != datasets.NOISE
    words = ["--data", given.data] if is_data and given.data else []
    follow = console.next_step("r2", "evaluate" if is_data else "analyze", file, *words)
    console.tell([*deliver.told(report), summary, follow], as_json=answer.json)
    if not proof.passed:
        failed = [f"{each.name} ({each.detail})" for each in proof.checks if not each.passed]
        raise CheckFailed(f"{file} failed its proof: {'; '.join(failed)}", report)
    gates.judge(report, wanted, size=report["bytes"], latency=report.get("latency_ratio"))
    gates.require(report)
    return report


def _read(given: VerifyFiles, images: MeasuredImages) -> "tuple[Checkpoint | None, datasets.Data | None]":
    """Return the checkpoint of --against, if it is one, and the data: None where inputs are drawn.

    Raises InputError for a missing file, other classes, and options that belong to a checkpoint.
    """
    from r2cli import data as datasets
    from r2cli.api import inputs, proof_inputs

    made, file = None, Path(given.file)
    if given.against is not None and given.against.suffix != ".onnx":
        named = Inputs(source=given.against, **{name: getattr(given, name) for name in SHARED})
        made, source = inputs.load(named, needed=False, tell=console.note)
    elif given.model is not None or given.model_arg:
        raise InputError("--model and --model-arg belong to --against CHECKPOINT: an ONNX file holds its own network")
    else:
        found = None if targets.is_tflite(file) else proof_inputs.named(file, given.data)
        if found is None:
            return None, None
        source = inputs.load_data(
            Preparation(data_dir=given.data_dir),
            given.data,
            default=found.data,
            spec=found.input,
            known=found.class_names,
        )
        source = inputs.fitting(given.file, found.input, found.class_names, source)
    return made, source if images.eval_images is None else datasets.with_test_images(source, images.eval_images)


SHARED = ("data", "data_dir", "model", "model_arg")
