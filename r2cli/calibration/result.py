"""The result of training or compressing a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from r2cli.calibration import deployed
from r2cli.data.metrics import Measured
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Result:
    """A network that was trained or compressed, with what is reported of it.

    `checkpoint` holds the network and its history; `layers` has a row for each layer. `before` is what the task's
    metric says of the float network, or None if it was not measured. `options` are all values that the result depends
    on, and `details` are further entries of the command's report.
    """

    checkpoint: Checkpoint
    layers: Sequence[Any]
    before: Measured | None
    options: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)
    is_new: bool = False  # it was not trained before, so there is no accuracy to compare with
    original: Checkpoint | None = None  # the float network that it was made from, if there was one

    @property
    def network(self) -> nn.Module:
        """The network, ready to run in evaluation mode: coded weights decoded, activations rounded to their grids."""
        return deployed.network(self.checkpoint)

    @property
    def float_top1(self) -> float | None:
        """The accuracy of the float network in percent; None for another metric, or where it was not measured."""
        return None if self.before is None else self.before.top1

    @property
    def report(self) -> dict[str, Any]:
        """What `--json` prints about the work, as plain values."""
        layers = [layer.__dict__ for layer in self.layers]
        value = None if self.before is None else self.before.value
        return {
            "float_top1": self.float_top1,
            "float_value": value,
            "layers": layers,
            **self.details,
            "options": dict(self.options),
        }

    def to_bytes(self) -> bytes:
        """Return the bytes of the checkpoint's file, which are the same for the same work."""
        return checkpoint.to_bytes(self.checkpoint)
