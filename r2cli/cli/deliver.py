"""What every command that makes an ONNX file does in the end: write it, prove it, and report it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from r2cli import api, console
from r2cli import data as datasets
from r2cli.calibration import deployed
from r2cli.calibration.result import Result
from r2cli.cli import gates
from r2cli.config.groups import CompressionGates, FileGates
from r2cli.deploy import onnx_export, runtime, verify
from r2cli.errors import CheckFailed
from r2cli.storage import checkpoint

Table = Callable[[Mapping[str, Any]], console.Line]


@dataclass(frozen=True)
class Destination:
    """Where a command that compresses writes, the gates of the file, and how the command answers.

    The ONNX file is written beside `output`, the checkpoint. `data` is the value of --data, for the next command.
    `state` is the file that a stopped run keeps; it is removed at the end. `started` is a time of `perf_counter`, in
    seconds.
    """

    command: str
    output: Path
    data: str | None
    gates: CompressionGates
    json: bool
    started: float
    state: Path | None = None

    @property
    def onnx(self) -> Path:
        """The ONNX file."""
        return self.output.with_suffix(".onnx")


def compressed(
    to: Destination, result: Result, source: datasets.Data, *, table: Table, notes: Sequence[console.Line] = ()
) -> dict[str, Any]:
    """Write the checkpoint and its ONNX file, prove the file, and print the report, which is returned too.

    The output is the `table` of the report, the proof, `notes`, and a line about the file. Raises CheckFailed as
    `require` does, after everything is written and printed.
    """
    made = result.checkpoint
    checkpoint.save(made, to.output)
    proof, proved = to_onnx(made, to.onnx, source, what=str(to.output), original=result.original)
    if to.state is not None:  # removed only now, when the files that the run was for exist
        to.state.unlink(missing_ok=True)
    # Without data the float network was not measured, and the proof ran on noise, whose accuracy means nothing.
    measured = {} if result.float_top1 is not None or result.is_new else {"top1": None, "torch_top1": None}
    report = {
        "command": to.command,
        "checkpoint": to.output,
        **proved,
        **result.report,
        **measured,
        "seconds": round(perf_counter() - to.started, 1),
    }
    console.tell([table(report), *told(proof, report), *notes, *_ending(to, report)], as_json=to.json)
    require(proof, report, to.gates)
    return report


def _ending(to: Destination, report: Mapping[str, Any]) -> list[console.Line]:
    """Return one line about the file, and the next command."""
    before, entropy = report["float_top1"], report.get("entropy_coded_bits")
    top1 = "accuracy not measured"
    if report["top1"] is not None:
        top1 = f"top-1 {report['top1']:.2f} % in ONNX Runtime{'' if before is None else f' (float {before:.2f})'}"
    coded = "" if entropy is None else f" with tables ({entropy:.2f} Huffman-coded)"
    bits = f"{report['bits_per_weight']:.2f} bits a weight{coded}"
    follow = f"r2 evaluate {to.onnx}{f' --data {to.data}' if to.data else ''}"
    return [f"{to.onnx}: {top1}, {report['bytes']:,} bytes, {bits}", console.next_step(follow)]


def to_onnx(
    made: checkpoint.Checkpoint,
    path: Path,
    source: datasets.Data,
    *,
    what: str,
    original: checkpoint.Checkpoint | None = None,
) -> tuple[verify.Proof, dict[str, Any]]:
    """Write `made` as ONNX to `path`, and prove the file on the test split of the data. Returns the proof and a report.

    `original` is the float checkpoint that it was made from, if there is one: the proof compares with it too. `what` is
    the name of the network in notes on standard error.
    """
    console.note(f"{what}: exporting to ONNX")
    checkpoint.write_atomically(path, onnx_export.to_bytes(made))
    proof = api.verify(path, made, source, original=original, reporter=console)
    return proof, {
        "output": path,
        "passed": proof.passed,
        "checks": [check.__dict__ for check in proof.checks],
        "embeddings": _embeddings(made, deployed.network(made)),
        **proof.measures,
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


def told(proof: verify.Proof, report: Mapping[str, Any]) -> list[console.Line]:
    """Return a line with a tick for every check of the proof, and a line about embeddings if there are any."""
    lines: list[console.Line] = [console.tick(check.name, check.passed, check.detail) for check in proof.checks]
    overflow = report["overflow_db"]
    if overflow is not None and overflow < verify.SQNR_DB:
        lines.append(
            "note: on a processor without VNNI, as this one, ONNX Runtime's default kernels overflow "
            f'({overflow:.0f} dB): deploy with the session option {runtime.EXACT_PRODUCTS} = "1", as r2 does, '
            "or with --weight-bits 7"
        )
    own = report["embeddings"]
    if own is not None:
        kept = f"{own['coded']:,} weights as codes" if own["coded"] else f"{own['float']:,} weights stay float32"
        lines.append(f"embeddings: {kept}")
    return lines


def require(proof: verify.Proof, report: Mapping[str, Any], wanted: FileGates) -> None:
    """Raise CheckFailed with every check of the proof that failed, or else with every gate that is not met.

    The drop is that from `float_top1` of the report, if it is known.
    """
    failed = [f"{check.name} ({check.detail})" for check in proof.checks if not check.passed]
    if failed:
        raise CheckFailed(f"{report['output']} failed its proof: {'; '.join(failed)}", report)
    top1, before = report["top1"], report.get("float_top1")
    drop = None if before is None or top1 is None else before - top1
    gates.require(report, wanted, top1=top1, drop=drop, size=report["bytes"])
