"""Memory that a thread keeps and uses again: new pages cost more than sums."""

import threading

import torch
from torch import Tensor

_buffers = threading.local()


def scratch(use: str, count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements of `dtype`, 1-D, in memory that is kept for `use` on this thread: new pages cost more than sums.

    What it held before is lost: one use is one place in the code.
    """
    kept: dict[str, Tensor] = _buffers.__dict__
    if use not in kept or kept[use].numel() < count * dtype.itemsize:
        kept[use] = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    return kept[use][: count * dtype.itemsize].view(dtype)
