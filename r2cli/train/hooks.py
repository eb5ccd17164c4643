"""What the training loop asks of a compression method, and whom it tells."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from r2cli.train import regularizers


@dataclass(frozen=True)
class TrainHooks:
    """What a method of compression, whose learners are modules of the network, asks of the loop.

    A learner's own state is in its buffers and parameters, which the resume state has. `groups` are the optimizer's
    groups of such parameters, with a `base_lr` each, and `adam` those that Adam steps instead; they do not decay.
    `identity` are the options that a resumed run must share.
    """

    identity: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]] = ()
    before_epoch: Callable[[int], None] = lambda number: None
    before_evaluation: Callable[[int], None] = lambda number: None
    adam: Sequence[Mapping[str, Any]] = ()
    loss: Callable[[Tensor, Tensor], Tensor] | None = None  # of images and logits, added to the task's
    add_gradients: Callable[[], None] = lambda: None  # after the backward pass, to `.grad`
    regularizer: regularizers.RegularizerSpec | None = None


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to. `top1` in percent on the held-out split; ratios are max|w| / std over the layers."""

    epoch: int
    loss: float  # task loss, mean over the epoch
    penalty: float  # strength * R after the last step
    top1: float
    range_max: float
    range_mean: float
    images_per_second: float = 0.0  # of the training steps, evaluation and saving not counted


@dataclass(frozen=True)
class Progress:
    """Whom to tell: `step` after every optimizer step, `epoch` after every evaluation."""

    step: Callable[[int], None]
    epoch: Callable[[Epoch], None]


@dataclass(frozen=True)
class RunControl:
    """Where the state of a run is, whether to go on from it, and whom to tell."""

    state: Path
    resume: bool
    watch: Progress
