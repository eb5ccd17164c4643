"""How fast a file is beside its float one, in ONNX Runtime on one thread, and what takes the time where it is slower.

Runs of both take turns, and the least times are compared: what else the machine does falls on both, and only ever adds.
Medians of few runs were wrong by ten times where other programs had most of the cores.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from r2cli.deploy import onnx_export, runtime
from r2cli.deploy.engines import Arrays, Run, of_session
from r2cli.deploy.retarget import retarget
from r2cli.storage.atomic import scratch_folder
from r2cli.storage.checkpoint import Checkpoint

BUDGET_S = 0.4  # for all runs; a large network is run LEAST times, which takes longer
LEAST, MOST, WARM = 5, 50, 2  # runs of each file
SHOWN, SHARE = 4, 1.0  # operators at most, of this percentage of the time or more


@dataclass(frozen=True)
class Speed:
    """Least times of a batch in ms, of a file and of its float one; `costs` is the share of each operator in percent,
    the largest first, where the file is slower."""

    latency_ms: float
    float_latency_ms: float
    costs: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.latency_ms / self.float_latency_ms

    def measures(self) -> dict[str, Any]:
        return {
            "latency_ms": self.latency_ms,
            "float_latency_ms": self.float_latency_ms,
            "latency_ratio": self.ratio,
            "latency_costs": self.costs,
        }


UNMEASURED = dict.fromkeys(("latency_ms", "float_latency_ms", "latency_ratio", "latency_costs"))


def of_checkpoint(path: Path, checkpoint: Checkpoint, given: Arrays) -> Speed:
    """The file at `path` beside the float network that its checkpoint stands for, on the batch `given`."""
    plain = retarget(replace(checkpoint, activations={}), "float")
    with scratch_folder() as folder:
        beside = folder / "float.onnx"
        beside.write_bytes(onnx_export.to_bytes(plain))
        return of_files(path, beside, given, given)


def of_files(path: Path, float_path: Path, given: Arrays, float_given: Arrays) -> Speed:
    """The file at `path` beside another, each on its inputs: the same batch, by the names that each file has."""
    one, other = (of_session(runtime.session(each, threads=1), str(each)) for each in (path, float_path))
    own, beside = in_turns(one, given, other, float_given)
    costs = runtime.operator_times(path, dict(given)) if own > beside else {}
    shown = [(operator, share) for operator, share in costs.items() if share >= SHARE][:SHOWN]
    return Speed(1000 * own, 1000 * beside, dict(shown))


def in_turns(one: Run, given: Arrays, other: Run, other_given: Arrays) -> tuple[float, float]:
    """Least times in seconds of two functions that take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    started = perf_counter()
    while len(times[0]) < LEAST + WARM or (len(times[0]) < MOST and perf_counter() - started < BUDGET_S):
        for run, inputs, found in ((one, given, times[0]), (other, other_given, times[1])):
            start = perf_counter()
            run(inputs)
            found.append(perf_counter() - start)
    return min(times[0][WARM:]), min(times[1][WARM:])
