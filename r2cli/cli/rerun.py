"""The same command again: nothing is there, a stopped run left its state, or the files are finished."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r2cli import data as datasets
from r2cli.cli.command import line
from r2cli.config.groups import Preparation
from r2cli.errors import InputError
from r2cli.storage import manifest, own_code, schema
from r2cli.storage.input_spec import InputSpec
from r2cli.storage.manifest import Asked, checksum
from r2cli.storage.schema import Malformed


def asked(
    command: str, options: Mapping[str, Any], loaded: datasets.Data, given: Preparation, read: Sequence[Path | None]
) -> Asked:
    """What decides the result of a run: `options`, the data `loaded`, its preprocessing, and the files in `read`.

    None in `read` stands for a file that was not given; published weights are none. The network's own code is a file
    that the run reads.
    """
    spec = loaded.input
    size = list(spec.sides) if isinstance(spec, InputSpec) and spec.width else spec.size
    own: dict[str, Any] = {"data": datasets.recorded(loaded.name), "size": size, "mean": spec.mean, "std": spec.std}
    own |= {"pretrained": getattr(given, "model", None)} if given.pretrained else {}
    own |= {name: getattr(given, name) for name in ("metric", "metric_arg", "data_arg") if getattr(given, name)}
    code = [own_code.file_of(getattr(given, name, None)) for name in ("model", "data", "metric", "loss")]
    read = [] if given.pretrained else read
    files = [path for path in (*read, *code) if path is not None]
    images = f"{len(loaded.train)} to train and {len(loaded.test)} to test"
    known = hashlib.sha256(repr((loaded.class_names, spec.tokenizer)).encode()).hexdigest()
    sums = {f"{loaded.name}": f"{images}, classes and tokenizer {known}"}
    return of_files(command, {**own, **options}, files, sums)


def of_files(
    command: str, options: Mapping[str, Any], files: Sequence[Path], sums: Mapping[str, str | None] | None = None
) -> Asked:
    """The same without data: `options` and `files`, beside `sums` of what else was read."""
    own = {path.name: checksum(path) for path in files}
    places = {path.name: str(path) for path in files if own[path.name] is not None}
    return Asked(command, options, {**(sums or {}), **own}, line(), places)


def again(report: Mapping[str, Any], kind: type, output: Path) -> dict[str, Any]:
    """The `report` of a run that was finished before.

    Raises InputError where the record beside `output` has no such `kind` of report.
    """
    try:
        schema.read(kind, report)
    except Malformed as error:
        raise InputError(f"{manifest.beside(output)} is damaged ({error}): start again with --overwrite") from error
    return {**report, "finished_before": True}


def told(output: Path) -> str:
    """What people read of such a run."""
    return f"{output} was finished before, with the same options, and its files are as they were written"
