"""Ranges of grids: from the least and the greatest value to a scale and a zero point.

Weights get zero point 0 and the rule that measured best over two CIFAR networks and both granularities, 4 bits,
nearest rounding (mean top-1): max(max / 7, -min / 8) 75.5, max|w| / 7 on -7..7 74.9, max|w| / 7.5 71.5. At 1 bit the
levels are -s and +s with s = mean|w|, the least-squares pair (Rastegari et al., "XNOR-Net", 2016).
Activations are unsigned with a zero point, 0 where nothing is negative.
"""

import torch
from torch import Tensor

from r2cli.codec import Grid
from r2cli.counts import min_max_scale, usable


def weight_grid(w: Tensor, bits: int, *, per_channel: bool) -> Grid:
    """A min-max grid for the weight (channels, ...): one for the tensor, or one per output channel (axis 0)."""
    flat = w.detach().reshape(w.shape[0], -1) if per_channel else w.detach().reshape(1, -1)
    scale = usable(min_max_scale(flat.amin(1), flat.amax(1), flat.abs().mean(1), bits).float())
    if not per_channel:
        scale = scale.squeeze(0)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return Grid(scale, zero, bits, signed=True, axis=0 if per_channel else None, odd=bits == 1)


def activation_grid(low: float, high: float, bits: int) -> Grid:
    """An unsigned grid over [low, high] with 0 on a level. A value that is always 0 gets the range [0, 1]."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        high = 1.0
    scale = (high - low) / (2**bits - 1)
    zero = max(0, min(2**bits - 1, round(-low / scale)))
    return Grid(torch.tensor(scale), torch.tensor(zero, dtype=torch.int32), bits, signed=False)
