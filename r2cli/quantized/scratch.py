"""Memory that is used again. For sums over pieces of a tensor, new memory pages take longer than the sums."""

import torch
from torch import Tensor


class Scratch:
    """Memory for one purpose, which grows to the largest size that was asked for.

    Taking it overwrites what it gave before, so each purpose has a Scratch of its own. The loop over the pieces makes
    it, and passes it on. It belongs to one thread.
    """

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return `count` elements of `dtype`, 1-D, with any content."""
        size = count * dtype.itemsize
        if len(self._kept) < size:
            self._kept = torch.empty(size, dtype=torch.uint8)
        return self._kept[:size].view(dtype)

    def like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return memory in the shape of `x`, which is contiguous, and in its dtype unless another is given."""
        return self.take(x.numel(), dtype or x.dtype).view_as(x)


Pair = tuple[Scratch, Scratch]


def pair() -> Pair:
    """Return two, for operations that need two tensors."""
    return Scratch(), Scratch()
