"""Memory that is used again: for sums over pieces of a tensor, new pages cost more than the sums."""

import torch
from torch import Tensor


class Scratch:
    """Memory for one use, which grows to the largest that was asked for.

    What it gave before is overwritten, so each use has a Scratch of its own: whoever goes through the pieces makes it,
    and passes it on. It belongs to one thread.
    """

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements of `dtype`, 1-D, of any content."""
        size = count * dtype.itemsize
        if len(self._kept) < size:
            self._kept = torch.empty(size, dtype=torch.uint8)
        return self._kept[:size].view(dtype)

    def like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As many elements as `x` has, in its shape; of its own dtype unless another is given. `x` is contiguous."""
        return self.take(x.numel(), dtype or x.dtype).view_as(x)


Pair = tuple[Scratch, Scratch]


def pair() -> Pair:
    """Two, for what needs memory twice."""
    return Scratch(), Scratch()
