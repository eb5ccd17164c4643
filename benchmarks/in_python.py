"""One ONNX file in one runtime that has a Python package: its outputs, its time beside the float file, its memory.

It runs in an environment of that runtime, and needs numpy alone beside it: runtimes.py makes the order and reads what
is printed. Every runtime is a function of `LOADERS` that opens a file for images of one shape, on one thread.

    python in_python.py LOADER ORDER.json
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

Array = Any
Run = Callable[[Array], Array]  # float32 (n, c, h, w) -> the network's result
WARM, LEAST = 2, 3  # runs that do not count, and runs that do, whatever time they take


def onnxruntime(path: str, shape: tuple[int, ...], optimise: bool = True) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # as docs/deploy.md says
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def openvino(path: str, shape: tuple[int, ...], plain: bool = False) -> Run:
    """`plain`: without its low-precision transformations, in float."""
    import openvino as ov

    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    if plain:
        options["LP_TRANSFORMS_MODE"] = "NO"
    compiled = ov.Core().compile_model(path, "CPU", options)
    return lambda images: np.array(compiled(images)[0])


def reference(path: str, shape: tuple[int, ...]) -> Run:
    from onnx.reference import ReferenceEvaluator

    network: Any = ReferenceEvaluator(path)
    return lambda images: network.run(None, {network.input_names[0]: images})[0]


def opencv(path: str, shape: tuple[int, ...]) -> Run:
    import cv2

    cv2.setNumThreads(1)
    network = cv2.dnn.readNetFromONNX(path)

    def run(images: Array) -> Array:
        network.setInput(images)
        return network.forward().copy()

    return run


def tract(path: str, shape: tuple[int, ...]) -> Run:
    import tract as engine

    network = engine.onnx().load(path)
    network.set_input_fact(0, ",".join(map(str, shape)) + ",f32")
    runnable = network.into_model().into_runnable()
    return lambda images: runnable.run([images])[0].to_numpy()


def tvm(path: str, shape: tuple[int, ...]) -> Run:
    import onnx
    import tvm as compiler
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    model = onnx.load(path)
    built = from_onnx(model, shape_dict={model.graph.input[0].name: list(shape)})
    machine = relax.VirtualMachine(compiler.compile(built, target="llvm"), compiler.cpu())

    def run(images: Array) -> Array:
        found = machine["main"](compiler.runtime.tensor(images))
        return (found if hasattr(found, "numpy") else found[0]).numpy()

    return run


def ncnn(path: str, shape: tuple[int, ...]) -> Run:
    import ncnn as engine

    found = find_spec("pnnx")  # whose import needs torch, and whose program does not
    assert found is not None and found.origin is not None
    binary = Path(found.origin).with_name("pnnx")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.onnx"
        copy.write_bytes(Path(path).read_bytes())
        _converted([str(binary), "model.onnx", f"inputshape={list(shape)}".replace(" ", "")], folder)
        network = engine.Net()
        network.opt.num_threads = 1
        for load, name in ((network.load_param, "model.ncnn.param"), (network.load_model, "model.ncnn.bin")):
            if load(str(Path(folder) / name)):
                raise RuntimeError(f"ncnn does not load the {name} that pnnx made")

    def run(images: Array) -> Array:
        with network.create_extractor() as extractor:
            extractor.input("in0", engine.Mat(images[0]).clone())
            code, found = extractor.extract("out0")
        if code:
            raise RuntimeError(f"ncnn ends with {code}")
        return np.array(found)[None]

    return run


def mnn(path: str, shape: tuple[int, ...]) -> Run:
    import MNN

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model.mnn"
        # Without MNN's own script around the converter, which installs a package to report what was converted.
        convert = [sys.executable, "-c", "import MNN, sys, _tools; _tools.mnnconvert(sys.argv)"]
        _converted([*convert, "-f", "ONNX", "--modelFile", path, "--MNNModel", str(made), "--bizCode", "r2"], folder)
        one_thread = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": 1},))
        network = MNN.nn.load_module_from_file(str(made), [], [], runtime_manager=one_thread)

    def run(images: Array) -> Array:
        found = network.forward([MNN.expr.const(images, list(images.shape), MNN.expr.NCHW)])
        return np.array(MNN.expr.convert(found[0], MNN.expr.NCHW).read())

    return run


def litert(path: str, shape: tuple[int, ...]) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    network = Interpreter(path, num_threads=1)
    network.allocate_tensors()
    given, result = network.get_input_details()[0], network.get_output_details()[0]
    (scale, zero), (result_scale, result_zero) = given["quantization"], result["quantization"]

    def run(images: Array) -> Array:
        codes = np.rint(images.transpose(0, 2, 3, 1) / np.float32(scale)) + zero
        network.set_tensor(given["index"], codes.clip(-128, 127).astype(np.int8))
        network.invoke()
        return (network.get_tensor(result["index"]).astype(np.float32) - result_zero) * np.float32(result_scale)

    return run


LOADERS: dict[str, Callable[[str, tuple[int, ...]], Run]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "openvino plain": lambda path, shape: openvino(path, shape, plain=True),
    "reference": reference,
    "opencv": opencv,
    "tract": tract,
    "tvm": tvm,
    "ncnn": ncnn,
    "mnn": mnn,
    "litert": litert,
}


def _converted(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        told = (done.stderr + done.stdout).strip().splitlines()
        raise RuntimeError(f"the converter ends with {done.returncode}: {told[-1] if told else 'no word'}")


def outputs(run: Run, images: Array) -> Array:
    """The results of `images` (n, c, h, w), one at a time, as (n, ...)."""
    return np.concatenate([np.asarray(run(images[place : place + 1])) for place in range(len(images))])


def least_ms(runs: dict[str, Run], image: Array, seconds: float) -> dict[str, float]:
    """The least time of `image` (1, c, h, w) in ms of functions that take turns for `seconds`, `LEAST` at least."""
    least, begun, number = dict.fromkeys(runs, float("inf")), perf_counter(), 0
    while number < WARM + LEAST or perf_counter() - begun < seconds:
        for name, run in runs.items():
            start = perf_counter()
            run(image)
            if number >= WARM:
                least[name] = min(least[name], 1000 * (perf_counter() - start))
        number += 1
    return least


def measured(loader: str, order: dict[str, Any]) -> dict[str, Any]:
    """What the file of an order does; 'failed' says in which step it does not."""
    images = np.load(order["images"])
    load, shape = LOADERS[loader], (1, *images.shape[1:])
    before, step = _peak_mb(), "loading"
    try:
        begun = perf_counter()
        run = load(order["file"], shape)
        taken, step = perf_counter() - begun, "running"
        found = outputs(run, images)
    except Exception as error:  # each runtime has its own
        return {"failed": f"{step}: {reason(error)}"}
    np.save(order["result"], found)
    memory = _peak_mb() - before
    runs = {"ms": run}
    if order["beside"]:
        try:
            runs["float_ms"] = load(order["beside"], shape)
        except Exception as error:
            return {"load_s": taken, "mb": memory, "no_time": reason(error)}
    return {"load_s": taken, "mb": memory, **least_ms(runs, images[:1], order["seconds"])}


def reason(error: Exception) -> str:
    """The line of an error that says most: the first that is no place in a source file."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '", "File ", "Stack"))]
    return (told or lines or [""])[0][:200] or type(error).__name__


def _peak_mb() -> float:
    """What this process has held at most. The system's count of a process begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    found = measured(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # some runtimes fail as they go
