"""Images that a benchmark has as tensors, normalised already, as the data of r2cli's functions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from r2cli.data import ALL_ROWS, Batch, Data, RowShare
from r2cli.storage.checkpoint import InputSpec


@dataclass
class GivenSplit:
    """Images float32 (n, c, h, w) and labels int64 (n,), always in this order: whoever made them drew them."""

    name: str
    images: Tensor
    labels: Tensor
    spec: InputSpec  # which says how many images run at once
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        size: int,
        device: torch.device,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        share: RowShare = ALL_ROWS,
    ) -> Iterator[Batch]:
        for images, labels in zip(torch.split(self.images, size), torch.split(self.labels, size), strict=True):
            rows = share.positions(len(labels))
            yield images[rows].to(device), labels[rows].to(device)


def data_of(given: InputSpec, classes: Sequence[str], calibration: Sequence[Tensor], test: Sequence[Batch]) -> Data:
    """Data whose training images, without labels that count, are for calibration alone, and whose test images are
    those of `test`."""
    images, asked = torch.cat(list(calibration)), torch.cat([images for images, _ in test])
    train = GivenSplit("train", images, torch.zeros(len(images), dtype=torch.int64), given)
    shown = GivenSplit("test", asked, torch.cat([labels for _, labels in test]), given)
    return Data("noise", given, tuple(classes), train, shown)
