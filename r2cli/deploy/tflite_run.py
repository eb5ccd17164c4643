"""A TensorFlow Lite file in LiteRT, beside ONNX Runtime."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2cli.config import targets
from r2cli.config.groups import ExportForm
from r2cli.deploy import engines, second_engine, tflite_load, tflite_writer
from r2cli.deploy.audit import Check
from r2cli.deploy.engines import ENGINES, Arrays
from r2cli.deploy.runtime import Recorded, fed, filled, of_metadata
from r2cli.errors import InputError
from r2cli.storage.input_spec import Given


def runner(path: Path, threads: int = 0) -> Callable[..., Any]:
    """A function from inputs by place (n, ...) to the outputs, one tensor or a tuple, a batch of the file at a time.

    Raises UnrunnableError as `tflite_load.load` does.
    """
    own = tflite_load.opened(path, threads)
    names, size = [of["name"] for of in own.get_input_details()], own.get_input_details()[0]["shape"][0]
    outputs, run = [of["name"] for of in own.get_output_details()], tflite_load.load(path, threads)

    def by_place(*inputs: Tensor) -> Given:
        count = len(inputs[0])
        found = engines.together(run, list(filled(fed(names, inputs), count, size)))
        tensors = tuple(torch.from_numpy(found[name][:count]) for name in outputs)
        return tensors if len(tensors) > 1 else tensors[0]

    return by_place


def recorded(path: Path) -> Recorded:
    """What the file at `path` records. Raises InputError for another tool's file, and for a damaged one."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: make one with `r2 ptq --target tflite`")
    return of_metadata(_metadata(path), path)


def _metadata(path: Path) -> dict[str, str]:
    try:
        return tflite_writer.metadata(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def form(path: Path) -> ExportForm:
    """The target of the file at `path`, and how many samples it takes at once. Raises InputError as `recorded` does."""
    told = {json.dumps(name): name for name, row in targets.TARGETS.items() if row.container == targets.TFLITE}
    size = int(tflite_load.opened(path, 1).get_input_details()[0]["shape"][0])
    return ExportForm(target=told.get(_metadata(path).get("r2.target", ""), "tflite"), batch=str(size))


def same_tensors(path: Path, content: bytes) -> Check:
    """Whether the file at `path` has the tensors of the file `content`: their types, shapes, grids and constants."""
    found, wanted = (tflite_writer.tensors(each) for each in (path.read_bytes(), content))
    wrong = next((name for name in (*wanted, *found) if found.get(name) != wanted.get(name)), None)
    count = sum(bool(each.content) for each in wanted.values())
    told = f"{len(wanted)} tensors, {count} of them constants, are those of the checkpoint"
    return Check("same tensors", wrong is None, told if wrong is None else f"'{wrong}' is not as the checkpoint has it")


def beside_onnx(path: Path, onnx: Path, given: Sequence[Arrays], *, usual_db: float) -> Check:
    """Whether LiteRT makes of the inputs `given` what ONNX Runtime makes of the ONNX file of the same codes.

    Both round sums to codes, LiteRT by a multiplication of integers, so single codes may differ.
    """
    reference = engines.together(engines.named("onnxruntime").load(onnx, 0, False), given)
    return second_engine.check(path, ENGINES["tflite"], given, reference, usual_db=usual_db)
