"""Signal to noise in decibels (dB): how close a rounded tensor is to the float one.

Ten dB more means a tenth of the squared error.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 200.0  # dB: what is said where there is no noise, and infinity cannot be said


def decibels(signal: float, noise: float) -> float:
    """Return 10 * log10(signal / noise) for two sums of squares, and infinity if either is zero.

    Without noise nothing is lost, and without a signal there is nothing to lose. Sums that are no finite numbers have
    -`MOST`: no bound lets them pass.
    """
    if not math.isfinite(signal) or not math.isfinite(noise):
        return -MOST
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf


def of_result(signal: float, noise: float) -> float:
    """Return the `decibels` of what a network gives, at most `MOST`. Noise beside a reference of zeros has -`MOST`."""
    return -MOST if signal == 0 < noise else min(MOST, decibels(signal, noise))


def sqnr(rounded: Tensor, weight: Tensor) -> float:
    """Return the signal to noise in dB of `rounded` against `weight`, two tensors of one shape; see `decibels`."""
    noise = (rounded - weight).double().square().sum()
    return decibels(float(weight.double().square().sum()), float(noise))


def noises(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Return the noise of outputs, (n,): of each of their n rows, as a share of a row's signal on average.

    The mean of the shares is taken over the outputs.
    """
    shares = []
    for one, other in zip(outputs, expected, strict=True):
        difference, signal = (rows.double().square().reshape(len(other), -1).sum(1) for rows in (one - other, other))
        shares.append(difference / signal.mean().clamp_min(1e-30))
    return torch.stack(shares).mean(0)
