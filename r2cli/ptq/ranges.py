"""Ranges of weight grids: from the least and the greatest value to a scale and a zero point.

Weights get zero point 0 and the rule that measured best over two CIFAR networks and both granularities, 4 bits,
nearest rounding (mean top-1): max(max / 7, -min / 8) 75.5, max|w| / 7 on -7..7 74.9, max|w| / 7.5 71.5. At 1 bit the
levels are -s and +s with s = mean|w|, the least-squares pair (Rastegari et al., "XNOR-Net", 2016).
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
