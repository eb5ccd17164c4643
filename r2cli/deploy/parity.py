"""What every engine gives on the samples, beside torch: each output, and the decisions among classes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2cli.data import Batch, metrics, own_splits
from r2cli.data.metrics import Measured
from r2cli.data.task import Task
from r2cli.deploy import audit, runtime
from r2cli.errors import InputError
from r2cli.quantized.decibels import of_result
from r2cli.storage.input_spec import Given, count, each, places

WEIGHT_ONLY_TOLERANCE = 1e-5  # relative: the order of float sums is all that may differ
AGREEMENT = 0.99  # share of equal decisions: a value on the edge of two codes may round either way
SQNR_DB = 30.0
TOP1_POINTS = 0.5
OFF_SAMPLES = 64  # images for the slow session without optimisation, and for the float network
COMPARED = 2**10  # images, or as many as have this many pixels, that torch runs on beside the file: 83 at 224 pixels
COMPARED_PIXELS = 2**22


@dataclass
class OutputRun:
    """One output of one engine on the samples, beside torch's."""

    signal: float = 0.0
    noise: float = 0.0
    worst: float = 0.0  # max |difference| / max |reference|; infinity where a value is NaN, or infinite in one alone

    def add(self, output: Tensor, reference: Tensor) -> None:
        output, reference = output.double(), reference.double()
        # Equal infinities are no difference: networks mask values with them. NaN is one, and is never within a bound.
        difference = torch.where(output == reference, 0.0, output - reference)
        known = torch.where(reference.isinf(), 0.0, reference)
        self.signal += float(known.square().sum())
        self.noise += float(difference.square().sum())
        worst = float(difference.abs().max()) / (float(known.abs().max()) or 1.0)
        self.worst = max(self.worst, worst if math.isfinite(worst) else math.inf)

    @property
    def sqnr(self) -> float:
        """Signal to noise in dB, at most `decibels.MOST`."""
        return of_result(self.signal, self.noise)


@dataclass
class Decisions:
    """Which class one engine decides for, by the largest logit, beside torch."""

    correct: int = 0
    resolved: int = 0  # correct, where two equal logits are decided as torch decided them
    equal: int = 0
    decided: int = 0  # equal, or torch's own lead over the other class is within the noise that SQNR_DB allows

    def add(self, logits: Tensor, reference: Tensor, labels: Any) -> None:
        equal = logits.argmax(1) == reference.argmax(1)
        lead = reference.amax(1) - reference.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
        other = logits.amax(1) - logits.gather(1, reference.argmax(1, keepdim=True)).squeeze(1)
        noise = 10 ** (-SQNR_DB / 20) * reference.square().mean(1).sqrt()
        self.equal += int(equal.sum())
        self.decided += int((equal | (other == 0) | (lead <= noise)).sum())
        chosen = torch.where((lead == 0) | (other == 0), reference.argmax(1), logits.argmax(1))
        self.correct += int((logits.argmax(1) == labels).sum())
        self.resolved += int((chosen == labels).sum())


@dataclass
class EngineRun:
    """One engine on the samples: each of its outputs beside torch's, and its decisions where the first has logits."""

    samples: int = 0
    outputs: dict[str, OutputRun] = field(default_factory=dict)
    decisions: Decisions = field(default_factory=Decisions)
    decides: bool = False  # whether there were labels for rows of logits
    measured: Measured | None = None  # by the task's metric

    def add(self, outputs: Given, reference: Given, names: Sequence[str], labels: Any = None) -> None:
        """Add a batch. `labels` (n,) are given where the first output has the logits of classes."""
        for name, own, expected in zip(names, places(outputs), places(reference), strict=True):
            self.outputs.setdefault(name, OutputRun()).add(own, expected)
        self.samples += count(reference)
        self.decides = labels is not None
        if labels is not None:
            self.decisions.add(places(outputs)[0], places(reference)[0], labels)

    @property
    def top1(self) -> float:
        return 100 * self.decisions.correct / self.samples

    @property
    def agreement(self) -> float:
        return 100 * self.decisions.equal / self.samples

    @property
    def sqnr(self) -> float:
        """Signal to noise in dB of the worst output."""
        return min(one.sqnr for one in self.outputs.values())

    @property
    def worst(self) -> float:
        return max(one.worst for one in self.outputs.values())


@torch.inference_mode()
def compare(
    path: Path,
    model: nn.Module,
    batches: Iterable[Batch],
    float_network: nn.Module | None,
    names: Sequence[str],
    task: Task,
) -> tuple[dict[str, EngineRun], Given]:
    """Every engine on the samples, and the first of them; 'overflowing' is ONNX Runtime without `EXACT_PRODUCTS`, where
    that matters, and 'float' the checkpoint's network beside the user's float one. What is measured is measured of the
    file on all samples, and of torch where they are so few that it ran on all of them."""
    engines = {"default": runtime.runner(path), "off": runtime.runner(path, optimise=False)}
    if not runtime.has_vnni():
        engines["overflowing"] = runtime.runner(path, exact=False)
    runs = {name: EngineRun() for name in ("torch", "default", "off", "overflowing", "float")}
    metric, first, everywhere = task.metric, None, True
    meters = {} if metric is None else {name: metric.start() for name in ("torch", "default")}
    model.eval()
    for given, target in batches:
        first = given if first is None else first
        everywhere = runs["torch"].samples < _compared(first)
        if not everywhere and metric is None:
            break
        inputs, target = places(given), own_splits.moved(target, torch.device("cpu"))
        found = {"default": engines["default"](*inputs)}
        if everywhere:
            found["torch"] = reference = each(model(*inputs), Tensor.cpu)
            labels = target if task.decides and places(reference)[0].ndim == 2 else None
            few = list(engines)[1:] if runs["off"].samples < OFF_SAMPLES else []
            for name, own in (found | {name: engines[name](*inputs) for name in few}).items():
                runs[name].add(own, reference, names, labels)
            if float_network is not None and runs["float"].samples < OFF_SAMPLES:
                own = float_network(*(one.clone() for one in inputs))  # it may write into its input
                runs["float"].add(reference, each(own, Tensor.cpu), names, labels)
        if metric is not None:
            for name, own in found.items():
                metrics.updated(metric, meters[name], metrics.by_name(own, names), target)
    if first is None:
        raise InputError("there is no sample to compare the file on: the test split is empty")
    if metric is not None:
        for name in meters if everywhere else ("default",):
            runs[name].measured = metrics.value_of(metric, meters[name])
    return runs, each(first, Tensor.cpu)


def _compared(first: Given) -> int:
    """On how many samples torch runs, whose first batch this is."""
    pixels = max(one[0, 0].numel() if one.ndim > 1 else 1 for one in places(first))
    return max(OFF_SAMPLES, min(COMPARED, COMPARED_PIXELS // max(1, pixels)))


def check(runs: Mapping[str, EngineRun], decide: tuple[bool, str] | None, *, exact: bool, follows: bool) -> audit.Check:
    """Whether the outputs are torch's. `decide` says whether decisions among classes are, where there are any.

    On grids, a value on the edge of two codes may round either way. In a deep network on coarse grids such flips add up
    to less than `SQNR_DB` without any fault: two runs of torch, in float32 and float64, differ as much there. So
    outputs that are far from torch's are right where the file `follows`: each of its parts is right from the codes
    before it, on the first samples. There is no bound on dB then, and the report has them.
    """
    if exact:
        worst = max(runs["default"].worst, runs["off"].worst)
        return audit.Check("parity", worst <= WEIGHT_ONLY_TOLERANCE, f"outputs within {worst:.1e} of torch's, relative")
    near = all(runs[name].sqnr >= SQNR_DB for name in ("default", "off"))
    if decide is None:
        told = [f"{runs[name].sqnr:.0f} dB {name}{_worst_of(runs[name])}" for name in ("default", "off")]
        detail = f"outputs beside torch's: {', '.join(told)}"
    else:
        near, detail = near and decide[0], decide[1]
    if follows and not near:
        detail += "; each part is right, and single codes at the edge of two add up"
    return audit.Check("parity", near or follows, detail)


def _worst_of(run: EngineRun) -> str:
    """Which of several outputs is furthest from torch's."""
    name = min(run.outputs, key=lambda name: run.outputs[name].sqnr)
    return f" ('{name}')" if len(run.outputs) > 1 else ""


def decisions(runs: Mapping[str, EngineRun]) -> tuple[bool, str]:
    """Whether the file decides for the classes that torch decides for, and what to say of it."""
    told, near = [], True
    for name in ("default", "off"):
        run = runs[name]
        near &= run.samples - run.decisions.decided <= max(1, (1 - AGREEMENT) * run.samples)
        told.append(f"{run.agreement:.1f} % / {run.sqnr:.0f} dB {name}")
    one_image = 100 / runs["default"].samples
    gap = one_image * (runs["default"].decisions.resolved - runs["torch"].decisions.resolved)
    near &= abs(gap) <= max(TOP1_POINTS, one_image)
    return near, f"argmax and logits beside torch's: {', '.join(told)}; top-1 {gap:+.2f}"
