"""What a network is for: how good it is, and what it learns. Classification is one of many."""

from dataclasses import dataclass

from r2cli.data.losses import CROSS_ENTROPY, DISTILL, Loss
from r2cli.data.metrics import TOP1, Metric
from r2cli.storage.checkpoint import LOGITS


@dataclass(frozen=True)
class Task:
    """A metric, None where the outputs are compared with the float network's alone; a loss; the outputs' names.

    `logits` says that the first output has logits of classes, whatever the metric is.
    """

    metric: Metric | None = TOP1
    outputs: tuple[str, ...] = LOGITS
    loss: Loss = CROSS_ENTROPY
    logits: bool = True

    @property
    def decides(self) -> bool:
        """Whether the first output has logits, of which the largest decides."""
        return self.metric is not None and self.metric.decides


CLASSIFICATION = Task()
UNLABELLED = Task(None, loss=DISTILL, logits=False)
