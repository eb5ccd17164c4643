"""What every command that makes an ONNX file does in the end: write it, prove it, and report it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from r2cli import api, console
from r2cli import data as datasets
from r2cli.calibration import deployed
from r2cli.calibration.result import Result
from r2cli.cli import gates, model_card, rerun
from r2cli.cli.baseline import Baseline, measured_on
from r2cli.config import targets
from r2cli.config.groups import CompressionGates, ExportForm, FileForm, FileGates, Inputs, ModelWritten
from r2cli.deploy import parity, runtime, vela
from r2cli.errors import CheckFailed, InputError
from r2cli.storage import checkpoint, own_code
from r2cli.storage.formats import CompressedReport
from r2cli.storage.manifest import Asked
from r2cli.storage.run_files import RunFiles

Table = Callable[[Mapping[str, Any]], console.Line]


@dataclass(frozen=True)
class Destination:
    """Where a command that compresses writes, the gates of the file, and how the command answers.

    `files` are the checkpoint and the file of its target, of `form`, and `asked` is what decides them. `before` is what
    --baseline names. `started` is a time of `perf_counter`.
    """

    files: RunFiles
    asked: Asked
    given: Inputs
    gates: CompressionGates
    before: Baseline | None
    form: FileForm
    written: ModelWritten
    started: float

    def __post_init__(self) -> None:
        if self.gates.max_latency is not None and self.file.suffix == ".tflite":
            raise InputError(f"{self.file} runs in TensorFlow Lite, and is not timed here: leave out --max-latency")

    @property
    def output(self) -> Path:
        return self.files.files[0]

    @property
    def file(self) -> Path:
        return self.files.files[1]


def finished(to: Destination) -> dict[str, Any] | None:
    """The report of a run that made the files before with the same options, after it is told; None for work to do.

    Raises InputError as `RunFiles.finished` does, and CheckFailed as `require` does.
    """
    known = to.files.finished(to.asked)
    if known is None:
        return None
    report = rerun.again(known, CompressedReport, to.output) | {"checkpoint": to.output, "output": to.file}
    judge(report, to.gates, to.before)
    model_card.write(to.written, to.file, report, to.asked.line)
    console.tell([rerun.told(to.output), *_ending(to, report)], as_json=to.written.json)
    require(report)
    return report


def compressed(
    to: Destination, result: Result, source: datasets.Data, *, table: Table, notes: Sequence[console.Line] = ()
) -> dict[str, Any]:
    """Write the checkpoint and its ONNX file, prove it, put both in their places, and print what came of it.

    What is printed is the `table` of the report, the proof, `notes`, and a line about the file. Raises CheckFailed as
    `require` does, after everything is written and printed.
    """
    made = result.checkpoint
    to.files.write(to.output, checkpoint.to_bytes(made))
    proved = to_file(made, to.files, to.file, source, form=to.form, what=str(to.output), original=result.original)
    report = {
        "command": to.files.command,
        "checkpoint": to.output,
        **proved,
        "measured_on": measured_on(to.given, source),
        **result.report,
        "seconds": round(perf_counter() - to.started, 1),
    }
    judge(report, to.gates, to.before)
    to.files.commit(to.asked, report)
    model_card.write(to.written, to.file, report, to.asked.line)
    console.tell([table(report), *told(report), *notes, *_ending(to, report)], as_json=to.written.json)
    require(report)
    return report


def _ending(to: Destination, report: Mapping[str, Any]) -> list[console.Line]:
    """Return one line about the file, and the next command."""
    entropy, metric = report.get("entropy_coded_bits"), report.get("metric")
    before = report.get("float_value")
    measured = not_measured(report)
    if metric is not None:
        digits = ".2f" if metric["unit"] else "#.4g"
        measured = f"{metric['shown']} in ONNX Runtime{'' if before is None else f' (float {before:{digits}})'}"
    coded = "" if entropy is None else f" with tables ({entropy:.2f} Huffman-coded)"
    bits = f"{report['bits_per_weight']:.2f} bits a weight{coded}"
    follow = next_command(to.file, to.output, to.given, is_measured=metric is not None)
    return [f"{to.file}: {measured}, {report['bytes']:,} bytes, {bits}", console.next_step(*follow)]


def next_command(file: Path, against: Path | None, given: Inputs, *, is_measured: bool) -> list[str]:
    """The command to run next: it evaluates on the data; without any it proves the file again `against` its checkpoint,
    or shows the weights of a float file."""
    if is_measured or given.data is not None:
        return ["r2", "evaluate", str(file), *gates.again(given)]
    if against is None:
        return ["r2", "analyze", str(file)]
    model = ["--model", given.model] if given.model and own_code.is_code(given.model) else []
    return ["r2", "verify", str(file), "--against", str(against), *model]


def not_measured(report: Mapping[str, Any]) -> str:
    """What is said in the place of a metric: how far the outputs are from the float network's, where that is known."""
    away = report.get("float_sqnr_db")
    return "accuracy not measured" if away is None else f"{away:.1f} dB from the float network, not measured otherwise"


def to_file(
    made: checkpoint.Checkpoint,
    files: RunFiles,
    path: Path,
    source: datasets.Data,
    *,
    form: FileForm,
    what: str,
    original: checkpoint.Checkpoint | None = None,
) -> dict[str, Any]:
    """Write `made` as the file of its target, which `files.commit` puts at `path`, and prove the file on the data
    set's test split, with a bar on standard error. Returns the proof and what it measured.

    `form` is what is asked of the file. `original` is the float checkpoint that it was made from, if there is one: the
    proof compares with it too. `what` is the name of the network in notes on standard error.
    """
    is_lite = targets.get(made.target).container == targets.TFLITE
    console.note(f"{what}: exporting to {'TensorFlow Lite' if is_lite else 'ONNX'}")
    temporary = files.write(path, api.export(made, form=ExportForm(batch=form.batch, opset=form.opset)))
    timed = source.measured or source.task.metric is None  # with --no-eval a file is only made and proved
    try:
        proof = api.verify(temporary, made, source, original=original, timed=timed, reporter=console)
    except InputError as error:  # people know the file by the name that it is to have
        raise InputError(str(error).replace(str(temporary), str(path))) from error
    checks = [replace(check, detail=check.detail.replace(str(temporary), str(path))) for check in proof.checks]
    return {
        "output": path,
        "passed": all(check.passed for check in checks),
        "checks": [check.__dict__ for check in checks],
        "embeddings": _embeddings(made, deployed.network(made)),
        **proof.measures,
        **({"vela": vela.report(temporary)} if made.target == targets.ETHOS_U else {}),
        **({} if source.measured else {"top1": None, "torch_top1": None, "metric": None}),
    }


def _embeddings(made: checkpoint.Checkpoint, model: nn.Module) -> dict[str, int] | None:
    """Return how many weights of embeddings are codes, and how many are floats; None without embeddings."""
    sizes = {
        f"{name}.weight": module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    coded = sum(size for name, size in sizes.items() if name in made.coded)
    return {"coded": coded, "float": sum(sizes.values()) - coded} if sizes else None


def told(report: Mapping[str, Any]) -> list[console.Line]:
    """The proof as ticks, a line each; and what became of embeddings, where there are any."""
    lines: list[console.Line] = [
        console.tick(each["name"], each["passed"], each["detail"]) for each in report["checks"]
    ]
    overflow = report.get("overflow_db")
    if overflow is not None and overflow < parity.SQNR_DB:
        lines.append(
            "note: on a processor without VNNI, as this one, ONNX Runtime's default kernels overflow "
            f'({overflow:.0f} dB): deploy with the session option {runtime.EXACT_PRODUCTS} = "1", as r2 does, '
            "or with --weight-bits 7"
        )
    if report.get("latency_ratio") is not None:
        lines.append(_speed(report))
    compiled = report.get("vela")
    if compiled is not None:
        lines.append(
            f"vela, {compiled['accelerator']}: {compiled['on_npu']} operators on the NPU, {compiled['on_cpu']} beside "
            f"it, {compiled['flash_bytes']:,} bytes of flash, {compiled['sram_bytes']:,} of SRAM, "
            f"{compiled['cycles']:,} cycles an image"
        )
    own = report.get("embeddings")
    if own is not None:
        kept = f"{own['coded']:,} weights as codes" if own["coded"] else f"{own['float']:,} weights stay float32"
        lines.append(f"embeddings: {kept}")
    return lines


def _speed(report: Mapping[str, Any]) -> str:
    """How fast the file is beside its float network, and which operators take the time where it is slower."""
    costs = ", ".join(f"{operator} {share:.0f} %" for operator, share in report["latency_costs"].items())
    told = f"{report['latency_ms']:.2f} ms, float {report['float_latency_ms']:.2f}, one thread"
    slower = f"; the time goes to {costs}" if costs else ""
    return f"speed: {report['latency_ratio']:.2f} of float32 ({told}{slower})"


def judge(report: dict[str, Any], wanted: FileGates, before: Baseline | None) -> None:
    """`gates.judge` of a file: the drop is that from `float_value` of the report, if it is known."""
    gates.judge(report, wanted, size=report["bytes"], latency=report.get("latency_ratio"), baseline=before)


def require(report: Mapping[str, Any]) -> None:
    """Raises CheckFailed naming what the file of `report` failed of its proof, or else every gate that is not met."""
    failed = [f"{each['name']} ({each['detail']})" for each in report["checks"] if not each["passed"]]
    if failed:
        raise CheckFailed(f"{report['output']} failed its proof: {'; '.join(failed)}", report)
    gates.require(report)
