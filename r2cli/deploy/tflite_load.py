"""A TensorFlow Lite file as a function of arrays, in LiteRT."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from r2cli.deploy import tflite_export
from r2cli.deploy.runtime import UnloadableError
from r2cli.errors import InputError

Array = np.ndarray[Any, Any]


def load(path: Path, threads: int = 0, plain: bool = False) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """A function from inputs to outputs by name, both as the ONNX file of the same network has them.

    Values are put on the inputs' grids, outputs are what their codes stand for, and images are (n, c, h, w). An .onnx
    file of a target of TensorFlow Lite is written as such first. Raises UnloadableError for a file that LiteRT does not
    load, and for an .onnx file that has no such form.
    """
    own = opened(path, threads)
    inputs, outputs = own.get_input_details(), own.get_output_details()

    def run(given: Mapping[str, Array]) -> dict[str, Array]:
        for of in inputs:
            value = given[of["name"]]
            own.set_tensor(of["index"], _codes(value.transpose(0, 2, 3, 1) if value.ndim == 4 else value, of))
        own.invoke()
        found = {of["name"]: _values(own.get_tensor(of["index"]), of) for of in outputs}
        return {name: value.transpose(0, 3, 1, 2) if value.ndim == 4 else value for name, value in found.items()}

    return run


def opened(path: Path, threads: int) -> Any:
    """LiteRT's interpreter of a file. Raises UnloadableError as `load` does."""
    try:
        given: dict[str, Any] = {"model_path": str(path)}
        if path.suffix == ".onnx":
            given = {"model_content": tflite_export.to_bytes(path.read_bytes())}
        own = Interpreter(num_threads=threads or None, **given)
        own.allocate_tensors()
    except InputError as error:
        raise UnloadableError(f"{path} does not run in LiteRT: {error}") from error
    except (ValueError, RuntimeError) as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnloadableError(f"{path} does not load in LiteRT: {told}") from error
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
