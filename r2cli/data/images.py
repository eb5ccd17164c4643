"""Pictures without labels: `images:DIR`, in any folders below it, to calibrate on and to compare outputs on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r2cli.data import imagefolder
from r2cli.data.request import Data, Request
from r2cli.data.splits import ALL_ROWS, Batch, RowShare, Split, subset
from r2cli.data.task import UNLABELLED
from r2cli.errors import InputError
from r2cli.storage.input_spec import InputSpec

TEST = 0.2  # of the pictures are compared on, the same in every run


@dataclass
class Unlabelled:
    """A split without its labels."""

    split: Split
    spec: InputSpec

    def __post_init__(self) -> None:
        self.name, self.unreadable = self.split.name, self.split.unreadable

    def __len__(self) -> int:
        return len(self.split)

    def of(self, rows: Tensor) -> "Unlabelled":
        return Unlabelled(subset(self.split, rows), self.spec)

    def batches(
        self,
        size: int,
        device: torch.device,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        share: RowShare = ALL_ROWS,
    ) -> Iterator[Batch]:
        for images, _ in self.split.batches(size, device, shuffle, augment, share):
            yield images, None


def load(request: Request) -> Data:
    """Load a folder. Raises InputError where it cannot be read, or holds fewer than two pictures."""
    root = Path(request.where)
    if not root.is_dir():
        raise InputError(f"{root} is not a directory: images:DIR wants a folder with pictures in it, or in its folders")
    try:
        files = [(path, 0) for path in imagefolder.pictures(str(root))]
    except OSError as error:
        raise InputError(f"{error.filename or root} cannot be read: {error.strerror or error}") from error
    if len(files) < 2:
        raise InputError(f"{root} holds {len(files)} pictures: it wants two at least (jpg, png, bmp, webp, tiff)")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    test = max(1, int(TEST * len(files)))
    spec, make = imagefolder.prepared(request, [file for file, _ in files])
    train, held_out = (
        Unlabelled(make(name, [files[row] for row in sorted(rows)]), spec)
        for name, rows in (("train", order[test:]), ("test", order[:test]))
    )
    return Data(f"images:{root}", spec, (), train, held_out, measured=False, task=UNLABELLED)
