"""What a compression method asks of the training loop, and what the loop calls on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from r2cli.data.losses import Learned
from r2cli.data.metrics import Metric
from r2cli.storage.input_spec import Given
from r2cli.train import regularizers


@dataclass(frozen=True)
class TrainHooks:
    """What a method of compression asks of the loop. Its quantizers or palettes are modules of the network.

    Their state is in buffers and parameters, which the resume state contains. `groups` are groups of such parameters
    for the optimizer, each with a `base_lr`; `adam` are groups that Adam trains instead. They have no weight decay
    unless a group says so. `identity` are the options that a resumed run must share.
    """

    identity: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]] = ()
    before_epoch: Callable[[int], None] = lambda number: None
    before_evaluation: Callable[[int], None] = lambda number: None
    adam: Sequence[Mapping[str, Any]] = ()
    loss: Callable[[Given, Any], Tensor] | None = None  # of inputs and outputs, added to the task's
    learned: Learned | None = None  # in the place of the task's loss
    add_gradients: Callable[[], None] = lambda: None  # after the backward pass, to `.grad`
    regularizer: regularizers.RegularizerSpec | None = None


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch. The ranges are max|w| / std over the layers.

    `value` is what the task's metric gives on the test half, None where it is not measured; `top1` is the same in
    percent, and None for another metric.
    """

    epoch: int
    loss: float  # task loss, mean over the epoch
    penalty: float  # strength * R after the last step
    top1: float | None
    range_max: float
    range_mean: float
    images_per_second: float = 0.0  # of the training steps, evaluation and saving not counted
    value: float | None = None

    def shown(self, metric: Metric | None) -> str:
        """What was measured, as people read it."""
        return "not measured" if metric is None or self.value is None else metric.shown(self.value)


@dataclass(frozen=True)
class Progress:
    """Functions to call: `step` after every step of the optimizer, `epoch` after every evaluation."""

    step: Callable[[int], None]
    epoch: Callable[[Epoch], None]


@dataclass(frozen=True)
class RunControl:
    """The file with the state of a run, whether to resume from it, and the functions to call on the way."""

    state: Path
    resume: bool
    watch: Progress
