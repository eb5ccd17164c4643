"""How good a network is, as one number: metrics by name, and what all of them share.

A metric sees the outputs of a network, of torch or of an ONNX session alike: one tensor, or several by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from r2cli.errors import InputError

Outputs = Tensor | Mapping[str, Tensor]


class Meter(Protocol):
    """A metric while batches pass. What `compute` gives of several names is reported, the first of them gated."""

    def update(self, outputs: Any, target: Any) -> None: ...

    def compute(self) -> Any: ...


@dataclass(frozen=True)
class Metric:
    """A metric by its name on the command line; `label` and `unit` are for people.

    `decides` says that the first output has the logits of classes (n, classes), of which the largest decides.
    """

    name: str
    label: str
    unit: str
    start: Callable[[], Meter]
    higher: bool = True
    decides: bool = False


class Share:
    """A share or a mean that adds up over batches and processes: `total` of `count`."""

    def __init__(self, of: Callable[[Tensor, Any], tuple[Tensor | float, int]], scale: float = 1.0) -> None:
        self.of, self.scale, self.total, self.count = of, scale, 0.0, 0

    def update(self, outputs: Any, target: Any) -> None:
        total, count = self.of(first(outputs), target)
        self.total += float(total)
        self.count += count

    def compute(self) -> float:
        return self.scale * self.total / max(1, self.count)


def first(outputs: Outputs) -> Tensor:
    """The only output of a network, or the first of several."""
    return outputs if isinstance(outputs, Tensor) else next(iter(outputs.values()))


def _correct(logits: Tensor, labels: Any) -> tuple[int, int]:
    labels = require_labels(logits, labels)
    return int((logits.argmax(1) == labels).sum()), len(labels)


def require_labels(logits: Tensor, labels: Any) -> Tensor:
    """The labels (n,) of logits (n, classes, ...). Raises InputError for others, and for one that is no class."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise InputError(
            f"labels are integers, and the target is {told(labels)}: give --metric and --loss that take it"
        )
    if logits.ndim < 2 or labels.shape != (len(logits), *logits.shape[2:]):
        raise InputError(
            f"the network gives {tuple(logits.shape)} for labels of {tuple(labels.shape)}: logits are (n, classes), so "
            "give another --metric or --loss"
        )
    found: Tensor = labels.to(logits.device)
    classes = logits.shape[1]
    for one in (int(found.max()), int(found.min())) if found.numel() else ():
        if not 0 <= one < classes:
            raise InputError(f"the label {one} is none of the network's {classes} classes: number them from 0")
    return found


def told(target: Any) -> str:
    """What a target is, for messages."""
    if isinstance(target, Tensor):
        return f"{str(target.dtype).removeprefix('torch.')} {tuple(target.shape)}"
    return "missing" if target is None else f"a {type(target).__name__}"


TOP1 = Metric("top1", "top-1", "%", lambda: Share(_correct, 100.0), decides=True)


def value_of(metric: Metric, meter: Meter) -> float:
    """The number that a meter gives."""
    return float(meter.compute())


def by_name(outputs: Tensor | tuple[Tensor, ...], names: tuple[str, ...]) -> Outputs:
    """What a metric is given of a network's outputs: one tensor, or several by name."""
    return dict(zip(names, outputs, strict=True)) if isinstance(outputs, tuple) else outputs


def on(outputs: Outputs, device: torch.device) -> Outputs:
    if isinstance(outputs, Tensor):
        return outputs.to(device)
    return {name: one.to(device) for name, one in outputs.items()}
