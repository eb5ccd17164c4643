"""What compressing a network gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from r2cli.calibration import deployed
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Result:
    """A network that was trained or compressed, and what became of it.

    `checkpoint` holds the network and its history; `layers` has a value for each layer. `float_top1` is the float
    network's accuracy in percent, None where it was not measured. `options` are what the work depended on, and
    `details` what the report of the command has beside.
    """

    checkpoint: Checkpoint
    layers: Sequence[Any]
    float_top1: float | None
    options: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)
    is_new: bool = False  # nobody trained it before, so that there is no accuracy to compare with
    original: Checkpoint | None = None  # the float network that it was made from, where there was one

    @property
    def network(self) -> nn.Module:
        """The network, ready to run in evaluation mode: coded weights decoded, activations rounded to their grids."""
        return deployed.network(self.checkpoint)

    @property
    def report(self) -> dict[str, Any]:
        """What `--json` prints of the work, as plain values."""
        layers = [layer.__dict__ for layer in self.layers]
        return {"float_top1": self.float_top1, "layers": layers, **self.details, "options": dict(self.options)}

    def to_bytes(self) -> bytes:
        """The checkpoint as the bytes of its file; the same for the same work."""
        return checkpoint.to_bytes(self.checkpoint)
