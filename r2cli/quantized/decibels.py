"""Signal to noise in decibels: how close a rounded tensor is to the float one."""

import torch
from torch import Tensor


def sqnr(rounded: Tensor, weight: Tensor) -> float:
    """Signal to noise of `rounded` against `weight`, of one shape, in dB; infinity without noise, or without signal."""
    error = (rounded - weight).double().square().sum()
    signal = weight.double().square().sum()
    return float(10 * torch.log10(signal / error)) if error > 0 and signal > 0 else float("inf")
