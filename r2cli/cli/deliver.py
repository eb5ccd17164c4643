"""What every command that ends in an ONNX file does: write it, prove it, say so."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from r2cli import attach, checkpoint, console, export, verify
from r2cli import data as datasets
from r2cli.errors import CheckFailed, InputError


def source_of(made: checkpoint.Checkpoint, name: str | None, workers: int) -> datasets.Data:
    """The data set `name`, by default the checkpoint's own, with the checkpoint's preprocessing."""
    own = made.history[0]["options"].get("data", "digits") if made.history else "digits"
    loaded = datasets.load(name or own, spec=made.input, workers=workers)
    require_classes(made.origin, made.class_names, loaded)
    return loaded


def require_classes(origin: str, class_names: Sequence[str], loaded: datasets.Data) -> None:
    """Raises InputError where a data set's classes are not those, in that order, that the network tells apart."""
    if tuple(class_names) != loaded.class_names:
        pairs = itertools.zip_longest(class_names, loaded.class_names, fillvalue="nothing")
        own, other = next((own, other) for own, other in pairs if own != other)
        raise InputError(
            f"{loaded.name} has the class '{other}' where {origin} was trained on '{own}': give the data of its classes"
        )


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
