"""What runs on both sides: one job of quantization under a clock, and the measures of the ONNX file that it leaves.

A peer's script runs in the peer's own environment and knows nothing of r2cli: it gets a float ONNX file and images as
.npy files, and leaves an ONNX file. Everything here needs numpy, onnx and ONNX Runtime alone.
"""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

BATCH = 64


@dataclass(frozen=True)
class Job:
    """One cell: paths of what goes in and comes out, and how to quantize. `steps` is AdaRound's, a layer."""

    model: str  # float ONNX
    checkpoint: str  # what r2 makes it from
    calibration: str  # float32 (n, 3, s, s), normalised
    images: str
    labels: str  # int64 (n,)
    output: str
    weight_bits: int
    granularity: str  # channel or tensor
    method: str
    steps: int | None
    act_bits: int = 8
    keep: tuple[str, ...] = ()  # as r2's --keep has them
    code: str = ""  # FILE.py:FACTORY, where the checkpoint's network is made by that

    def batches(self) -> list[Any]:
        """The calibration images, float32 (BATCH, 3, s, s)."""
        images = np.load(self.calibration)
        return [np.ascontiguousarray(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]


class Refused(Exception):
    """The tool does not do this."""


@dataclass
class Made:
    """What a tool leaves where it writes no file: its own simulation (images to logits), and why; and its choice, where
    it makes one."""

    simulate: Callable[[Any], Any] | None = None
    no_file: str = ""
    chosen: str = ""


@dataclass
class Clock:
    """Wall and CPU seconds of the process, from its making; `lap` names what has just ended."""

    laps: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 2), now

    def read(self) -> dict[str, Any]:
        wall, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        return {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), "laps": self.laps}


def memory(what: str) -> float:
    """MiB that this process holds (VmRSS), or has held at most (VmHWM). NaN where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def one_thread() -> None:
    """Let every session of ONNX Runtime that a tool makes have one thread; torch reads OMP_NUM_THREADS."""
    original = onnxruntime.SessionOptions.__init__

    def init(self: Any) -> None:
        original(self)
        self.intra_op_num_threads = 1

    onnxruntime.SessionOptions.__init__ = init


def main(quantize: Callable[[Job, Clock], Made], *packages: str) -> None:
    """Do the job in the file that the command line names, and print what was measured as the last line."""
    one_thread()
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    before, clock = memory("VmRSS"), Clock()
    try:
        made = quantize(job, clock)
    except Refused as reason:
        print(json.dumps({"refused": str(reason)}))
        return
    found = clock.read()
    found |= {"peak_mb": round(memory("VmHWM")), "grown_mb": round(memory("VmHWM") - before)}
    found["versions"] = {name: version(name) for name in packages}
    if made.chosen:
        found["chosen"] = made.chosen
    if made.simulate is not None:
        found["no_file"] = made.no_file
        found["simulated_top1"] = top1(made.simulate, np.load(job.images), np.load(job.labels))
    print(json.dumps(found))


# --- measures of a file --------------------------------------------------------------------------------------------


def session(path: str | Path, *, optimise: bool = True) -> Any:
    """ONNX Runtime on the CPU with one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # without VNNI others overflow
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(path: str | Path, *, optimise: bool = True) -> Callable[[Any], Any]:
    """A function from images to logits."""
    own = session(path, optimise=optimise)
    name = own.get_inputs()[0].name
    return lambda images: own.run(None, {name: images})[0]


def top1(predict: Callable[[Any], Any], images: Any, labels: Any) -> float:
    """Accuracy in percent on images float32 (n, 3, s, s) with labels (n,)."""
    right = 0
    for i in range(0, len(labels), BATCH):
        right += int((np.asarray(predict(images[i : i + BATCH])).argmax(1) == labels[i : i + BATCH]).sum())
    return 100 * right / len(labels)


def least_ms(runs: Mapping[str, Callable[[Any], Any]], image: Any, rounds: int) -> dict[str, float]:
    """The least time of one image, in ms, of functions that take turns; the first five rounds do not count."""
    least = dict.fromkeys(runs, float("inf"))
    order = random.Random(0)
    for number in range(rounds + 5):
        for name in order.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name](image)
            if number >= 5:
                least[name] = min(least[name], 1000 * (time.perf_counter() - start))
    return least


def weight_types(path: str | Path) -> str:
    """Of what type the weights of the layers are stored in a file, for example 'INT8' or 'FLOAT, INT8'."""
    graph = onnx.load(path).graph
    made_by = {output: node for node in graph.node for output in node.output}
    stored = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in graph.initializer}
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            value = node.input[1]
            while value not in stored and value in made_by:
                value = made_by[value].input[0]
            found[stored.get(value, "?")] += 1
    return ", ".join(sorted(found))
