"""What every command that ends in an ONNX file does: write it, prove it, say so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from r2cli import attach, checkpoint, console, export, verify
from r2cli import data as datasets
from r2cli.errors import CheckFailed


def to_onnx(
    made: checkpoint.Checkpoint, path: Path, source: datasets.Data, *, what: str
) -> tuple[verify.Proof, dict[str, Any]]:
    """Write `made` as ONNX to `path` and prove the file on the data set's test split, with a bar on standard error."""
    cpu = torch.device("cpu")
    console.note(f"{what}: exporting to ONNX")
    checkpoint.write_atomically(path, export.to_bytes(made))
    with console.bar("prove", len(source.test)) as progress:

        def batches() -> Iterator[datasets.Batch]:
            for images, labels in source.test.batches(256, cpu):
                yield images, labels
                progress.advance(len(labels))

        proof = verify.prove(path, made, attach.network(made), batches())
    checks = [check.__dict__ for check in proof.checks]
    return proof, {"output": path, "passed": proof.passed, "checks": checks, **proof.measures}


def told(proof: verify.Proof) -> list[console.Line]:
    """The proof as ticks, a line each."""
    return [console.tick(check.name, check.passed, check.detail) for check in proof.checks]


def require_proof(proof: verify.Proof, path: Path) -> None:
    """Raises CheckFailed naming what the file at `path` failed."""
    failed = [f"{check.name} ({check.detail})" for check in proof.checks if not check.passed]
    if failed:
        raise CheckFailed(f"{path} failed its proof: {'; '.join(failed)}")
