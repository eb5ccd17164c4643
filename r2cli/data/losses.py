"""What a network learns: losses by name, the user's own, and the distance to the float network, which needs no target.

    cross-entropy   of logits (n, classes, ...) and labels (n, ...); of maps, labels below 0, or 255, are left out
    bce             of logits and targets from 0 to 1, of any shape
    mse, l1         of numbers
    ctc             of logits (n, time, classes), class 0 blank, and labels (n, most), with -1 behind the last
    distill         of the float network's own outputs: Kullback-Leibler of logits, else the squared error

A loss sees the first output of several; the user's own function sees all by name.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn, no_grad

from r2cli.data.metrics import IGNORED, Outputs, by_name, first, require_labels, require_numbers, told
from r2cli.errors import InputError, unknown
from r2cli.storage import own_code
from r2cli.storage.input_spec import Given, places

# Of inputs by place, outputs by place, and the target: ().
Learned = Callable[[Given, Any, Any], Tensor]
LEFT_OUT = -100  # torch's own number of a label that does not count


@dataclass(frozen=True)
class Loss:
    """A loss by its name on the command line: a function of outputs and target, None for `distill`."""

    name: str
    of: Callable[[Outputs, Any], Tensor] | None

    @property
    def distils(self) -> bool:
        return self.of is None


def cross_entropy(outputs: Outputs, target: Any, smoothing: float = 0.0) -> Tensor:
    logits, labels = first(outputs), target
    if isinstance(labels, Tensor) and labels.ndim > 1:
        counted = (labels >= 0) & ((labels != IGNORED) | (logits.shape[1] > IGNORED))
        require_labels(logits, labels.where(counted, 0))
        labels = labels.long().where(counted, LEFT_OUT)
        total = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        return total / counted.sum().clamp_min(1)  # a batch may have no label that counts
    if not isinstance(labels, Tensor) or labels.device.type == "cpu":  # a GPU would have to wait
        labels = require_labels(logits, labels)
    return F.cross_entropy(logits, labels.long(), label_smoothing=smoothing)


def _bce(outputs: Outputs, target: Any) -> Tensor:
    return _of_numbers(F.binary_cross_entropy_with_logits, outputs, target)


def _of_numbers(loss: Callable[[Tensor, Tensor], Tensor], outputs: Outputs, target: Any) -> Tensor:
    require_numbers(outputs, target)
    found = first(outputs)
    return loss(found, target.to(found).reshape(found.shape))


def _ctc(outputs: Outputs, target: Any) -> Tensor:
    logits = first(outputs)
    if not isinstance(target, Tensor) or target.ndim != 2 or logits.ndim != 3:
        raise InputError(
            f"ctc takes logits (n, time, classes) and labels (n, most), and there are {tuple(logits.shape)} and "
            f"{told(target)}: give another --loss"
        )
    lengths = (target >= 0).sum(1)
    times = lengths.new_full((len(logits),), logits.shape[1])
    rows = logits.log_softmax(2).transpose(0, 1)
    return F.ctc_loss(rows, target.clamp_min(0), times, lengths, zero_infinity=True)


CROSS_ENTROPY, DISTILL = Loss("cross-entropy", cross_entropy), Loss("distill", None)
LOSSES: Mapping[str, Loss] = {
    one.name: one
    for one in (
        CROSS_ENTROPY,
        Loss("bce", _bce),
        Loss("mse", functools.partial(_of_numbers, F.mse_loss)),
        Loss("l1", functools.partial(_of_numbers, F.l1_loss)),
        Loss("ctc", _ctc),
        DISTILL,
    )
}
# What is learned where --loss does not say: what goes with the metric.
OF_METRIC: Mapping[str, str] = {
    **dict.fromkeys(("top1", "top5", "miou", "f1"), "cross-entropy"),
    **dict.fromkeys(("mse", "r2", "psnr"), "mse"),
    "mae": "l1",
}


def named(name: str) -> Loss:
    """The loss `name`: one of `LOSSES`, or the user's FILE.py:function. Raises InputError for another name."""
    if name in LOSSES:
        return LOSSES[name]
    if not own_code.is_code(name):
        raise unknown("--loss", name, [*LOSSES, "FILE.py:function"])
    return Loss(name, functools.partial(_own, name, own_code.factory(name, "loss")))


def _own(name: str, function: Callable[..., Any], outputs: Outputs, target: Any) -> Tensor:
    """The user's loss. Raises InputError where it raises, or gives no single number that has a gradient."""
    try:
        given = function(outputs, target)
    except InputError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(f"--loss {name} raised {type(error).__name__} ({why}): it takes (outputs, target)") from error
    if not isinstance(given, Tensor) or given.numel() != 1 or not given.is_floating_point():
        found = told(given) if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise InputError(f"--loss {name} gave {found}: it must return one number, a tensor of shape ()")
    if not given.requires_grad:
        raise InputError(f"--loss {name} gave a number without a gradient: compute it from the outputs by torch alone")
    return given.reshape(())


def of_target(loss: Loss, names: Sequence[str], smoothing: float = 0.0) -> Learned:
    """The loss of outputs with those names and the target, for the training loop."""
    if loss.of is None:
        raise InputError("--loss distill is the distance to a float network, which only qat and palettize have")
    own = functools.partial(cross_entropy, smoothing=smoothing) if loss is CROSS_ENTROPY else loss.of

    def learned(inputs: Given, outputs: Any, target: Any) -> Tensor:
        fits = isinstance(outputs, tuple) and len(outputs) == len(names)
        found = by_name(outputs, names if fits else [f"output_{place}" for place in range(len(places(outputs)))])
        return own(found, target)

    return learned


def of_teacher(teacher: nn.Module, *, decides: bool) -> Learned:
    """The distance to what `teacher` gives: Kullback-Leibler where the first output decides, else squared errors.

    Squared errors are relative to the teacher's own squares, so that all outputs count alike.
    """

    def learned(inputs: Given, outputs: Any, target: Any) -> Tensor:
        with no_grad():
            wanted = places(teacher(*places(inputs)))
        return distance(places(outputs), wanted, decides=decides)

    return learned


def distance(outputs: Sequence[Tensor], wanted: Sequence[Tensor], *, decides: bool) -> Tensor:
    """The distance of outputs from those that are wanted, ()."""
    if decides:
        found = outputs[0].log_softmax(1)
        return F.kl_div(found, wanted[0].log_softmax(1), reduction="none", log_target=True).sum(1).mean()
    parts = [
        (one - other).square().mean() / other.square().mean().clamp_min(1e-12)
        for one, other in zip(outputs, wanted, strict=True)
        if other.is_floating_point()
    ]
    if not parts:
        raise InputError("--loss distill compares numbers and the network gives integers alone: give another --loss")
    return sum(parts[1:], parts[0]) / len(parts)
