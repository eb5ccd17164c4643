"""How good a network is, as one number: metrics by name, torchmetrics', and the user's own.

A metric sees the outputs of a network, of torch or of an ONNX session alike: one tensor, or several by name.

    top1, top5      share of right classes, in percent; logits (n, classes, ...), labels (n, ...)
    miou, f1        over classes, times 100; labels below 0, or 255, are left out
    auroc           of logits of two classes, or one score each; of more classes one against the rest; times 100
    mse, mae, r2    of numbers
    psnr            of pictures, in dB, for values from 0 to 1, or to 255
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from r2cli.data import torchmetrics
from r2cli.errors import InputError, unknown
from r2cli.storage import own_code

Outputs = Tensor | Mapping[str, Tensor]
IGNORED = 255  # the label that segmentation sets leave out


class Meter(Protocol):
    """A metric while batches pass. Of several numbers by name, the first is the metric's value."""

    def update(self, outputs: Any, target: Any) -> None: ...

    def compute(self) -> Any: ...


@dataclass(frozen=True)
class Metric:
    """A metric by its name on the command line; `label` and `unit` are for people, who read `digits` behind the point.

    `decides` says that the first output has the logits of classes (n, classes), of which the largest decides.
    """

    name: str
    label: str
    unit: str
    start: Callable[[], Meter]
    higher: bool = True
    decides: bool = False

    def shown(self, value: float) -> str:
        """A value as people read it: 'top-1 93.20 %'."""
        number = f"{value:.2f}" if self.unit else f"{value:#.4g}"
        return f"{self.label} {number}{f' {self.unit}' if self.unit not in ('', POINTS) else ''}"

    def loss(self, before: float, after: float) -> float:
        """By how much `after` is worse."""
        return before - after if self.higher else after - before


@dataclass(frozen=True)
class Measured:
    """What a metric gave, and other numbers beside it."""

    metric: Metric
    value: float
    others: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.metric.shown(self.value)

    @property
    def top1(self) -> float | None:
        return self.value if self.metric.name == TOP1.name else None


POINTS = "points"  # of a hundred


# --- meters ----------------------------------------------------------------------------------------------------------


class Share:
    """A mean that adds up over batches and processes: `total` of `count`."""

    def __init__(self, of: Callable[[Any, Any], tuple[Tensor | float, int]], scale: float = 1.0) -> None:
        self.of, self.scale, self.total, self.count = of, scale, 0.0, 0

    def update(self, outputs: Any, target: Any) -> None:
        total, count = self.of(outputs, target)
        self.total += float(total)
        self.count += count

    def compute(self) -> float:
        return self.scale * self.total / max(1, self.count)


def first(outputs: Outputs) -> Tensor:
    """The only output of a network, or the first of several."""
    return outputs if isinstance(outputs, Tensor) else next(iter(outputs.values()))


def _correct(outputs: Outputs, labels: Any) -> tuple[int, int]:
    logits = first(outputs)
    found = require_labels(logits, labels)
    return int((logits.argmax(1) == found).sum()), found.numel()


def _among_five(outputs: Outputs, labels: Any) -> tuple[int, int]:
    logits = first(outputs)
    found = require_labels(logits, labels)
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return int((best == found.unsqueeze(1)).any(1).sum()), found.numel()


def require_labels(logits: Tensor, labels: Any) -> Tensor:
    """The labels (n, ...) of logits (n, classes, ...). Raises InputError for others, and for one that is no class."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise InputError(f"labels are integers, and the target is {told(labels)}: give another --metric or --loss")
    if logits.ndim < 2 or labels.shape != (len(logits), *logits.shape[2:]):
        raise InputError(
            f"the network gives {tuple(logits.shape)} for labels of {tuple(labels.shape)}: logits are (n, classes), so "
            "give another --metric or --loss"
        )
    found, classes = labels.to(logits.device).long(), logits.shape[1]
    for one in (int(found.max()), int(found.min())) if found.numel() else ():
        if not 0 <= one < classes:
            way = "" if classes > 1 else ", or, for a network of one number, give --loss bce and --metric auroc"
            raise InputError(f"the label {one} is none of the network's {classes} classes: number them from 0{way}")
    return found


def told(target: Any) -> str:
    """What a target is, for messages."""
    if isinstance(target, Tensor):
        return f"{str(target.dtype).removeprefix('torch.')} {tuple(target.shape)}"
    return "missing" if target is None else f"a {type(target).__name__}"


def require_numbers(outputs: Outputs, target: Any) -> tuple[Tensor, Tensor]:
    """The first output and its target, of one shape, in float64. Raises InputError for a target that is no such."""
    found = first(outputs).double()
    if not isinstance(target, Tensor):
        raise InputError(f"numbers are compared, and the target is {told(target)}: give another --metric or --loss")
    wanted = target.to(found.device).double()
    if found.numel() != wanted.numel() or len(found) != len(wanted):
        raise InputError(
            f"the network gives {tuple(found.shape)} and the target is {tuple(wanted.shape)}: they must be alike, so "
            "give another --metric or --loss"
        )
    return found.reshape(wanted.shape), wanted


def _squares(outputs: Outputs, target: Any) -> tuple[Tensor, int]:
    found, wanted = require_numbers(outputs, target)
    return (found - wanted).square().sum(), wanted.numel()


def _distances(outputs: Outputs, target: Any) -> tuple[Tensor, int]:
    found, wanted = require_numbers(outputs, target)
    return (found - wanted).abs().sum(), wanted.numel()


class Confusion:
    """Counts (classes, classes) of labels and decisions, and a number `of` them."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        self.of, self.counts = of, torch.zeros(0)

    def update(self, outputs: Any, target: Any) -> None:
        logits = _of_classes(first(outputs))
        labels, classes = (target.to(logits.device) if isinstance(target, Tensor) else target), logits.shape[1]
        if isinstance(labels, Tensor):
            counted = (labels >= 0) & ((labels != IGNORED) | (classes > IGNORED))
            labels = labels.where(counted, 0)
        pairs = (require_labels(logits, labels) * classes + logits.argmax(1))[counted]
        own = torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).double().cpu()
        self.counts = own if not self.counts.numel() else self.counts + own

    def compute(self) -> float:
        return 100 * float(self.of(self.counts)[self.counts.sum(0) + self.counts.sum(1) > 0].mean())


def _of_classes(logits: Tensor) -> Tensor:
    """Logits (n, classes, ...); of one score alone, which is above 0 for the second class, those of two classes."""
    logits = logits.unsqueeze(1) if logits.ndim == 1 else logits
    return torch.cat([-logits, logits], 1) if logits.shape[1] == 1 else logits


def _intersection_over_union(counts: Tensor) -> Tensor:
    right = counts.diagonal()
    return right / (counts.sum(0) + counts.sum(1) - right).clamp_min(1)


def _f1(counts: Tensor) -> Tensor:
    return 2 * counts.diagonal() / (counts.sum(0) + counts.sum(1)).clamp_min(1)


class Auroc:
    """The area under the curve of true over false positives, from all scores, by ranks."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, outputs: Any, target: Any) -> None:
        scores = _of_classes(first(outputs).double().cpu())
        self.labels.append(require_labels(scores, target.reshape(-1) if isinstance(target, Tensor) else target))
        self.scores.append(scores)

    def compute(self) -> float:
        scores, labels = torch.cat(self.scores), torch.cat(self.labels)
        if scores.shape[1] == 2:
            return 100 * _area(scores[:, 1] - scores[:, 0], labels == 1)
        share = scores.softmax(1)
        there = [one for one in range(scores.shape[1]) if 0 < int((labels == one).sum()) < len(labels)]
        return 100 * sum(_area(share[:, one], labels == one) for one in there) / max(1, len(there))


def _area(scores: Tensor, positive: Tensor) -> float:
    _, place, size = torch.unique(scores, return_inverse=True, return_counts=True)
    rank = (size.cumsum(0) - (size - 1) / 2)[place]  # equal scores share the mean of their ranks
    yes, no = int(positive.sum()), int((~positive).sum())
    return (float(rank[positive].sum()) - yes * (yes + 1) / 2) / max(1, yes * no)


class Psnr:
    """The mean over pictures of 10 log10(peak^2 / mse)."""

    def __init__(self) -> None:
        self.total, self.count, self.peak = 0.0, 0, 1.0

    def update(self, outputs: Any, target: Any) -> None:
        found, wanted = require_numbers(outputs, target)
        self.peak = max(self.peak, 255.0 if float(wanted.max()) > 1.5 else 1.0)
        error = (found - wanted).square().flatten(1).mean(1).clamp_min(1e-20)
        self.total -= float(10 * error.log10().sum())
        self.count += len(found)

    def compute(self) -> float:
        return 20 * math.log10(self.peak) + self.total / max(1, self.count)


class Determination:
    """R2: 1 - squared error / variance of the target, averaged over the numbers of a sample.

    As scikit-learn has it, a number that is always the same gives 0, and 1 where it is always met.
    """

    def __init__(self) -> None:
        self.count, self.first = 0, torch.zeros(0)
        self.parts = torch.zeros(0)  # (3, numbers): mean and squared deviations of the target, squared error

    def update(self, outputs: Any, target: Any) -> None:
        found, wanted = (one.reshape(len(one), -1).cpu() for one in require_numbers(outputs, target))
        error, new = (wanted - found).square().sum(0), len(wanted)
        if not self.count:
            self.first, self.parts = wanted[0], wanted.new_zeros(3, wanted.shape[1])
        beyond = wanted - self.first  # of a constant that is exactly 0
        mean, all_ = beyond.mean(0), self.count + new
        # Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983: no difference of large numbers.
        away = mean - self.parts[0]
        squares = (beyond - mean).square().sum(0) + away.square() * (self.count * new / all_)
        self.parts = self.parts + torch.stack([away * (new / all_), squares, error])
        self.count = all_

    def compute(self) -> float:
        _, squares, error = self.parts
        met = (error == 0) + 0 * error  # NaN stays NaN
        return float(torch.where(squares == 0, met, 1 - error / squares).mean())


# --- by name ---------------------------------------------------------------------------------------------------------

TOP1 = Metric("top1", "top-1", "%", lambda: Share(_correct, 100.0), decides=True)
METRICS: Mapping[str, Metric] = {
    one.name: one
    for one in (
        TOP1,
        Metric("top5", "top-5", "%", lambda: Share(_among_five, 100.0), decides=True),
        Metric("mse", "MSE", "", lambda: Share(_squares), higher=False),
        Metric("mae", "MAE", "", lambda: Share(_distances), higher=False),
        Metric("psnr", "PSNR", "dB", Psnr),
        Metric("miou", "mIoU", POINTS, lambda: Confusion(_intersection_over_union)),
        Metric("f1", "F1", POINTS, lambda: Confusion(_f1)),
        Metric("auroc", "AUROC", POINTS, Auroc),
        Metric("r2", "R2", "", Determination),
    )
}
TORCHMETRICS = "torchmetrics:"


def named(name: str, args: Sequence[str] = (), *, lower: bool = False) -> Metric:
    """The metric `name`: one of `METRICS`, torchmetrics:ClassName, or the user's FILE.py:function or class.

    `args` are its keywords, NAME=VALUE. With `lower` less is better. Raises InputError for a name that is none of them.
    """
    own = own_code.keywords(args, "--metric-arg")
    if name in METRICS:
        if own or lower:
            raise InputError(f"--metric {name} takes neither --metric-arg nor --metric-lower: it knows what is better")
        return METRICS[name]
    if name.startswith(TORCHMETRICS):
        made = torchmetrics.found(name.removeprefix(TORCHMETRICS))
    elif own_code.is_code(name):
        made = own_code.factory(name, "metric")
    else:
        raise unknown("--metric", name, [*METRICS, f"{TORCHMETRICS}ClassName", "FILE.py:function"])
    label = name.rpartition(":")[2]
    if inspect.isclass(made):
        meter = own_code.called(made, name, own, "--metric-arg")
        if not (hasattr(meter, "update") and hasattr(meter, "compute")):
            raise InputError(f"--metric {name} is a class without update and compute: see docs/tasks.md")
        lower = lower or getattr(meter, "higher_is_better", None) is False  # as torchmetrics' classes say
        return Metric(name, label, "", lambda: own_code.called(made, name, own, "--metric-arg"), higher=not lower)
    return Metric(name, label, "", lambda: Averaged(name, lambda *given: made(*given, **own)), higher=not lower)


class Averaged:
    """The user's function of outputs and targets, averaged over batches by their sizes."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function, self.count = name, function, 0
        self.totals: dict[str, float] = {}

    def update(self, outputs: Any, target: Any) -> None:
        own = len(first(outputs))
        for name, value in numbers_of(self.name, self.function(outputs, target)).items():
            self.totals[name] = self.totals.get(name, 0.0) + own * value
        self.count += own

    def compute(self) -> dict[str, float]:
        return {name: total / max(1, self.count) for name, total in self.totals.items()}


def numbers_of(name: str, given: Any) -> dict[str, float]:
    """A number, or several by name, as floats. Raises InputError for anything else, and for NaN and infinity."""
    found = dict(given) if isinstance(given, Mapping) else {"": given}
    if not found:
        raise InputError(f"--metric {name} gave no number: it must return a number, or a dict of them")
    out = {}
    for key, value in found.items():
        told_of = f" as '{key}'" if key else ""
        try:
            out[str(key)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"--metric {name} gave a {type(value).__name__}{told_of}: it must return a number, or a dict of them"
            ) from error
        if not math.isfinite(out[str(key)]):
            raise InputError(f"--metric {name} gave {out[str(key)]}{told_of}: it must be a finite number")
    return out


def updated(metric: Metric, meter: Meter, outputs: Outputs, target: Any) -> None:
    """Show a batch to a meter. Raises InputError where the user's code raises."""
    try:
        meter.update(outputs, target)
    except InputError:
        raise
    except Exception as error:
        raise _raised(metric, error) from error


def value_of(metric: Metric, meter: Meter) -> Measured:
    """What a meter gives. Raises InputError where it raises, or gives NaN or no number."""
    try:
        given = meter.compute()
    except InputError:
        raise
    except Exception as error:
        raise _raised(metric, error) from error
    main, *others = numbers_of(metric.name, given).items()
    return Measured(metric, main[1], dict(others))


def _raised(metric: Metric, error: Exception) -> InputError:
    told_of = " ".join(str(error).split())[:300]
    return InputError(f"--metric {metric.name} raised {type(error).__name__} ({told_of}): it takes (outputs, targets)")


def by_name(outputs: Tensor | tuple[Tensor, ...], names: Sequence[str]) -> Outputs:
    """What a metric is given of a network's outputs: one tensor, or several by name."""
    return dict(zip(names, outputs, strict=True)) if isinstance(outputs, tuple) else outputs


def report_of(metric: Metric | None, value: float | None, **more: Any) -> dict[str, Any] | None:
    """What a command's JSON says of a metric and its value; None where nothing was measured."""
    if metric is None or value is None:
        return None
    told_of = {"name": metric.name, "label": metric.label, "unit": metric.unit, "higher": metric.higher}
    return {**told_of, "value": value, "shown": metric.shown(value), **more}


def recorded(before: Measured | None) -> dict[str, float]:
    """What a history says of the float network's metric."""
    return {} if before is None else {f"float_{before.metric.name}": before.value}
