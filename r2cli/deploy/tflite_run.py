"""A TensorFlow Lite file in LiteRT."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor

from r2cli.deploy import engines, second_engine, tflite_writer
from r2cli.deploy.audit import Check
from r2cli.deploy.engines import Array, Arrays, Engine, Run
from r2cli.deploy.runtime import Recorded, UnrunnableError, fed, filled, of_metadata
from r2cli.errors import InputError
from r2cli.storage.input_spec import Given


def load(path: Path, threads: int = 0, plain: bool = False) -> Run:
    """A function from inputs to outputs by name, both as the ONNX file of the same network has them.

    Values are put on the inputs' grids, outputs are what their codes stand for, and images are (n, c, h, w). With
    `plain`, TensorFlow Lite's own kernels run and not XNNPACK's. Raises UnrunnableError for a file that LiteRT does not
    load.
    """
    own = _opened(path, threads)
    inputs, outputs = own.get_input_details(), own.get_output_details()

    def run(given: Arrays) -> dict[str, Array]:
        for of in inputs:
            value = given[of["name"]]
            own.set_tensor(of["index"], _codes(value.transpose(0, 2, 3, 1) if value.ndim == 4 else value, of))
        own.invoke()
        found = {of["name"]: _values(own.get_tensor(of["index"]), of) for of in outputs}
        return {name: value.transpose(0, 3, 1, 2) if value.ndim == 4 else value for name, value in found.items()}

    return run


def runner(path: Path, threads: int = 0) -> Callable[..., Any]:
    """A function from inputs by place (n, ...) to the outputs, one tensor or a tuple, a batch of the file at a time.

    Raises UnrunnableError as `load` does.
    """
    own = _opened(path, threads)
    names, size = [of["name"] for of in own.get_input_details()], own.get_input_details()[0]["shape"][0]
    outputs, run = [of["name"] for of in own.get_output_details()], load(path, threads)

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


LITERT = Engine("tflite", "LiteRT", "ai_edge_litert", "pip install 'r2cli[tflite]'", load)


def beside_onnx(path: Path, onnx: Path, given: Sequence[Arrays], *, usual_db: float) -> Check:
    """Whether LiteRT makes of the inputs `given` what ONNX Runtime makes of the ONNX file of the same codes.

    Both round sums to codes, LiteRT by a multiplication of integers, so single codes may differ.
    """
    reference = engines.together(engines.named("onnxruntime").load(onnx, 0, False), given)
    return second_engine.check(path, LITERT, given, reference, usual_db=usual_db)


def _opened(path: Path, threads: int) -> Any:
    try:
        own = Interpreter(model_path=str(path), num_threads=threads or None)
        own.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnrunnableError(f"{path} does not load in LiteRT: {told}") from error
    return own


def _codes(values: Array, of: Any) -> Array:
    if of["dtype"] == values.dtype:
        return values
    scale, zero = of["quantization"]
    bounds = np.iinfo(of["dtype"])
    codes: Array = np.clip(np.rint(values / np.float32(scale)) + zero, bounds.min, bounds.max).astype(of["dtype"])
    return codes


def _values(codes: Array, of: Any) -> Array:
    if of["dtype"] == np.float32:
        return codes
    scale, zero = of["quantization"]
    values: Array = (codes.astype(np.float32) - zero) * np.float32(scale)
    return values
