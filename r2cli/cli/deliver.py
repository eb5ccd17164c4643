"""What every command that ends in an ONNX file does: write it, prove it, say so."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r2cli import attach, checkpoint, console, export, verify
from r2cli import data as datasets
from r2cli.cli import gates
from r2cli.errors import CheckFailed


def to_onnx(
    made: checkpoint.Checkpoint, path: Path, source: datasets.Data, *, what: str
) -> tuple[verify.Proof, dict[str, Any]]:
    """Write `made` as ONNX to `path` and prove the file on the data set's test split, with a bar on standard error."""
    cpu = torch.device("cpu")
    console.note(f"{what}: exporting to ONNX")
    checkpoint.write_atomically(path, export.to_bytes(made))
    model = attach.network(made)
    with console.bar("prove", len(source.test)) as progress:

        def batches() -> Iterator[datasets.Batch]:
            for images, labels in source.test.batches(256, cpu):
                yield images, labels
                progress.advance(len(labels))

        proof = verify.prove(path, made, model, batches())
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
        raise CheckFailed(f"{report['output']} failed its proof: {'; '.join(failed)}")
    top1, before = report["top1"], report.get("float_top1")
    gates.require(
        min_accuracy=min_accuracy,
        top1=top1,
        max_drop=max_drop,
        drop=None if before is None else before - top1,
        max_bytes=max_bytes,
        size=report["bytes"],
    )
