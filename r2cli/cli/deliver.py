"""What every command that ends in an ONNX file does: write it, prove it, say so."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from r2cli import console
from r2cli import data as datasets
from r2cli.calibration import deployed
from r2cli.cli import gates
from r2cli.deploy import onnx_export, verify
from r2cli.errors import CheckFailed
from r2cli.storage import checkpoint


@dataclass(frozen=True)
class Order:
    """What is asked of a command that compresses: where its files go, what they must reach, and how it tells.

    `output` is the checkpoint, beside which the ONNX file goes; `state` is what a stopped run left, to be removed.
    """

    command: str
    output: Path
    options: Mapping[str, Any]
    data: str | None
    started: float  # of the clock that `perf_counter` reads
    json: bool
    min_accuracy: float | None
    max_drop: float | None
    max_bytes: int | None
    state: Path | None = None

    @property
    def onnx(self) -> Path:
        return self.output.with_suffix(".onnx")


def compressed(
    order: Order,
    made: checkpoint.Checkpoint,
    source: datasets.Data,
    before: float | None,
    *,
    original: checkpoint.Checkpoint | None = None,
    more: Mapping[str, Any],
    table: Callable[[Mapping[str, Any]], console.Line],
    notes: Sequence[console.Line] = (),
) -> dict[str, Any]:
    """Write the checkpoint and its ONNX file, prove it, and tell: `table` of the report, the proof, `notes`, the rest.

    `before` is the float network's top-1 in percent, None where it was not measured; `original` that network's own
    checkpoint, None where training began without one; the report has `more` as well.
    Raises CheckFailed as `require` does.
    """
    made = made.then(order.command, order.options, {} if before is None else {"float_top1": before})
    checkpoint.save(made, order.output)
    proof, proved = to_onnx(made, order.onnx, source, what=str(order.output), original=original)
    if order.state is not None:
        order.state.unlink(missing_ok=True)
    report = {
        "command": order.command,
        "checkpoint": order.output,
        **proved,
        "float_top1": before,
        **more,
        "options": order.options,
        "seconds": round(perf_counter() - order.started, 1),
    }
    console.tell([table(report), *told(proof, report), *notes, *_result(order, report)], as_json=order.json)
    require(proof, report, min_accuracy=order.min_accuracy, max_drop=order.max_drop, max_bytes=order.max_bytes)
    return report


def _result(order: Order, report: Mapping[str, Any]) -> list[console.Line]:
    """The file in one line, and the next command."""
    before, entropy = report["float_top1"], report.get("entropy_coded_bits")
    top1 = "accuracy not measured"
    if report["top1"] is not None:
        top1 = f"top-1 {report['top1']:.2f} % in ONNX Runtime{'' if before is None else f' (float {before:.2f})'}"
    coded = "" if entropy is None else f" with tables ({entropy:.2f} Huffman-coded)"
    bits = f"{report['bits_per_weight']:.2f} bits a weight{coded}"
    follow = f"r2 evaluate {order.onnx}{f' --data {order.data}' if order.data else ''}"
    return [f"{order.onnx}: {top1}, {report['bytes']:,} bytes, {bits}", console.next_step(follow)]


def to_onnx(
    made: checkpoint.Checkpoint,
    path: Path,
    source: datasets.Data,
    *,
    what: str,
    original: checkpoint.Checkpoint | None = None,
) -> tuple[verify.Proof, dict[str, Any]]:
    """Write `made` as ONNX to `path` and prove the file on the data set's test split, with a bar on standard error;
    beside the float network that it was made from, where its checkpoint, `original`, is at hand."""
    cpu = torch.device("cpu")
    console.note(f"{what}: exporting to ONNX")
    checkpoint.write_atomically(path, onnx_export.to_bytes(made))
    model = deployed.network(made)
    float_network = None if original is None else deployed.network(original)
    with console.bar("prove", len(source.test)) as progress:

        def batches() -> Iterator[datasets.Batch]:
            for images, labels in source.test.batches(256, cpu):
                yield images, labels
                progress.advance(len(labels))

        proof = verify.prove(path, made, model, batches(), float_network)
    checks = [check.__dict__ for check in proof.checks]
    return proof, {
        "output": path,
        "passed": proof.passed,
        "checks": checks,
        "embeddings": _embeddings(made, model),
        **proof.measures,
    }


def _embeddings(made: checkpoint.Checkpoint, model: nn.Module) -> dict[str, int] | None:
    """How many weights of embeddings the file holds as codes, and how many as floats; None without embeddings."""
    sizes = {
        f"{name}.weight": module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    coded = sum(size for name, size in sizes.items() if name in made.coded)
    return {"coded": coded, "float": sum(sizes.values()) - coded} if sizes else None


def told(proof: verify.Proof, report: Mapping[str, Any]) -> list[console.Line]:
    """The proof as ticks, a line each; and what became of embeddings, where there are any."""
    lines: list[console.Line] = [console.tick(check.name, check.passed, check.detail) for check in proof.checks]
    overflow = report["overflow_db"]
    if overflow is not None and overflow < verify.SQNR_DB:
        lines.append(
            "note: on a processor without VNNI, as this one, ONNX Runtime's default kernels overflow "
            f'({overflow:.0f} dB): deploy with the session option {verify.EXACT_PRODUCTS} = "1", as r2 does, '
            "or with --weight-bits 7"
        )
    own = report["embeddings"]
    if own is not None:
        kept = f"{own['coded']:,} weights as codes" if own["coded"] else f"{own['float']:,} weights stay float32"
        lines.append(f"embeddings: {kept}")
    return lines


def require(
    proof: verify.Proof,
    report: Mapping[str, Any],
    *,
    min_accuracy: float | None,
    max_bytes: int | None,
    max_drop: float | None = None,
) -> None:
    """Raises CheckFailed naming what the file of `report` failed of its proof, or else every gate that is not met.

    A drop is from `float_top1` of the report, where that is known.
    """
    failed = [f"{check.name} ({check.detail})" for check in proof.checks if not check.passed]
    if failed:
        raise CheckFailed(f"{report['output']} failed its proof: {'; '.join(failed)}", report)
    top1, before = report["top1"], report.get("float_top1")
    gates.require(
        report,
        min_accuracy=min_accuracy,
        top1=top1,
        max_drop=max_drop,
        drop=None if before is None else before - top1,
        max_bytes=max_bytes,
        size=report["bytes"],
    )
