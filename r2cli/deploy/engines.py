"""Runtimes by name: how each loads an ONNX file as a function of arrays, and how it is installed.

A runtime is a row of `ENGINES`. What needs it imports it only when a file is loaded.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2cli.deploy import runtime
from r2cli.errors import InputError, unknown

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]  # by the names of a file's inputs, or outputs
Run = Callable[[Arrays], dict[str, Array]]


@dataclass(frozen=True)
class Engine:
    """A runtime: the name of its option, how people write it, its module, and how `pip` gets it.

    `load` opens a file on the CPU with a number of threads, 0 for all. Its last argument asks for plain kernels: those
    of floats, in the place of kernels that may overflow on this processor.
    """

    name: str
    shown: str
    module: str
    install: str
    load: Callable[[Path, int, bool], Run]

    @property
    def installed(self) -> bool:
        return find_spec(self.module) is not None


def _onnxruntime(path: Path, threads: int = 0, plain: bool = False) -> Run:
    return of_session(runtime.session(path, threads=threads), str(path))


def of_session(session: Any, what: str) -> Run:
    """A function of arrays that a session of ONNX Runtime computes."""
    names = [each.name for each in session.get_outputs()]

    def run(given: Arrays) -> dict[str, Array]:
        try:
            found = session.run(names, dict(given))
        except Exception as error:  # its exceptions have no common base but this
            raise runtime.UnrunnableError(_failure(what, f"ONNX Runtime {runtime.VERSION}", error, "runs")) from error
        if strange := [name for name, each in zip(names, found, strict=True) if not isinstance(each, np.ndarray)]:
            raise InputError(f"{what} gives '{strange[0]}', which is no tensor: take that output out of the file")
        return dict(zip(names, found, strict=True))

    return run


def together(run: Run, given: Sequence[Arrays]) -> dict[str, Array]:
    """The outputs of all of `given`, one behind the other."""
    found = [run(each) for each in given]
    return {name: np.concatenate([np.atleast_1d(each[name]) for each in found]) for name in found[0]}


def _openvino(path: Path, threads: int = 0, plain: bool = False) -> Run:
    import openvino

    shown = f"OpenVINO {openvino.__version__.partition('-')[0]}"
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    if plain:  # an option of its CPU plugin: without its low-precision transformations it computes in float
        options["LP_TRANSFORMS_MODE"] = "NO"
    try:
        compiled = openvino.Core().compile_model(path, "CPU", options)
    except Exception as error:  # as above
        raise runtime.UnloadableError(_failure(str(path), shown, error, "loads")) from error
    names = [each.get_any_name() for each in compiled.outputs]

    def run(given: Arrays) -> dict[str, Array]:
        try:
            found = compiled(dict(given))
        except Exception as error:  # as above
            raise runtime.UnrunnableError(_failure(str(path), shown, error, "runs")) from error
        return {name: np.array(found[place]) for place, name in enumerate(names)}

    return run


def _litert(path: Path, threads: int = 0, plain: bool = False) -> Run:
    from r2cli.deploy import tflite_load

    return tflite_load.load(path, threads, plain)


def _failure(what: str, shown: str, error: Exception, verb: str) -> str:
    """The error of a runtime that loads or runs a file, in one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return f"{what} fails when {shown} {verb} it: {(lines or [type(error).__name__])[0]}"


ENGINES: Mapping[str, Engine] = {
    each.name: each
    for each in (
        Engine("onnxruntime", "ONNX Runtime", "onnxruntime", "pip install onnxruntime", _onnxruntime),
        Engine("openvino", "OpenVINO", "openvino", "pip install '.[openvino]'", _openvino),
        Engine("tflite", "LiteRT", "ai_edge_litert", "pip install 'r2cli[tflite]'", _litert),
    )
}


# Those that a proof takes by itself, where they are installed. LiteRT runs files of its own targets alone.
USUAL = {name: each for name, each in ENGINES.items() if name != "tflite"}


def named(name: str) -> Engine:
    """The runtime `name`. Raises InputError for one that is unknown, or not installed."""
    if name not in ENGINES:
        raise unknown("runtime", name, ENGINES)
    engine = ENGINES[name]
    if not engine.installed:
        raise InputError(f"--runtime {name}: {engine.shown} is not installed: get it with `{engine.install}`")
    return engine


def runner(engine: Engine, path: Path, threads: int = 0) -> Callable[..., Any]:
    """A function from inputs by place, each (n, ...), to the outputs of the file at `path`: one tensor or a tuple.

    A file of a fixed batch takes them in batches of that size, the last one filled up.
    """
    if engine.name == "onnxruntime":
        return runtime.runner(path, threads=threads)
    run, wanted = engine.load(path, threads, False), runtime.opened(path).graph.input
    names, fixed = [each.name for each in wanted], wanted[0].type.tensor_type.shape.dim[0].dim_value

    def outputs(*inputs: Tensor) -> Any:
        given, samples = runtime.fed(names, inputs), len(inputs[0])
        parts = list(runtime.filled(given, samples, fixed or samples))
        found = tuple(torch.from_numpy(each[:samples]) for each in together(run, parts).values())
        return found if len(found) > 1 else found[0]

    return outputs


def chosen(names: Iterable[str]) -> list[Engine]:
    """The runtimes of these names, or all that are installed where none is named."""
    asked = [named(name) for name in dict.fromkeys(names)]
    return asked or [engine for engine in USUAL.values() if engine.installed]
