"""A TensorFlow Lite file in LiteRT, beside ONNX Runtime."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    try:
        found = tflite_writer.metadata(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return of_metadata(found, path)


def beside_onnx(path: Path, onnx: Path, given: Sequence[Arrays], *, usual_db: float) -> Check:
    """Whether LiteRT makes of the inputs `given` what ONNX Runtime makes of the ONNX file of the same codes.

    Both round sums to codes, LiteRT by a multiplication of integers, so single codes may differ.
    """
    reference = engines.together(engines.named("onnxruntime").load(onnx, 0, False), given)
    return second_engine.check(path, ENGINES["tflite"], given, reference, usual_db=usual_db)
