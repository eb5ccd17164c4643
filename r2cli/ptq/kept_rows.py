"""Values of a network for all images: in memory, or on disk where they are large.

At 224 pixels one value of 256 images takes more than a gigabyte, and two networks side by side have several. A step of
learning reads some rows of them only. So the rows of a large value lie in a temporary file without a name, exactly as
they were computed, and the system keeps of it in memory what it has room for.
"""

import tempfile
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from r2cli.storage.input_spec import Given, places

MOST = 128 * 2**20  # bytes of a value in memory


class OnDisk:
    """A value (n, ...) on the CPU whose rows are read as it is indexed, by a slice or by numbers (k,)."""

    def __init__(self, like: Tensor) -> None:
        # Pixels may lie before channels in memory: they come back as they were, so that the same kernels read them.
        self.channels_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
        self.row = self._laid(like)[0]
        self.rows = 0
        self.file = tempfile.TemporaryFile()
        weakref.finalize(self, self.file.close)

    def __len__(self) -> int:
        return self.rows

    def numel(self) -> int:
        return self.rows * self.row.numel()

    def append(self, part: Tensor) -> None:
        """Write more rows, (k, ...). Raises OSError where the disk is full."""
        self.file.write(self._laid(part).contiguous().view(torch.uint8).numpy().data)
        self.rows += len(part)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        numbers = range(*index.indices(self.rows)) if isinstance(index, slice) else index.tolist()
        found = self.row.new_empty(len(numbers), *self.row.shape)
        for place, number in zip(found, numbers, strict=True):
            self.file.seek(number * self.row.nbytes)
            self.file.readinto(place.view(torch.uint8).numpy().data)
        return found.movedim(-1, 1) if self.channels_last else found

    def _laid(self, part: Tensor) -> Tensor:
        """Return (k, ...) in the order in which it lies in memory."""
        return part.movedim(1, -1) if self.channels_last else part


KeptRows = tuple[Tensor | OnDisk, ...]  # the values of all images, by place


def parts(values: KeptRows, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield `values` in their order, at most `size` rows at once."""
    for start in range(0, len(values[0]), size):
        yield tuple(one[start : start + size] for one in values)


def at(values: KeptRows, index: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of `values` at `index` (k,)."""
    return tuple(one[index] for one in values)


def gathered(batches: Iterator[Given], rows: int) -> KeptRows:
    """Return values that come in batches as one. They have `rows` rows in all, which says whether they fit."""
    kept: list[list[Tensor] | OnDisk] = []
    for batch in map(places, batches):
        kept = kept or [OnDisk(one) if _is_large(one, rows) else [] for one in batch]
        for held, one in zip(kept, batch, strict=True):
            held.append(one)
    return tuple(torch.cat(held) if isinstance(held, list) else held for held in kept)


def _is_large(like: Tensor, rows: int) -> bool:
    return like.device.type == "cpu" and like[0].nbytes * rows > MOST
