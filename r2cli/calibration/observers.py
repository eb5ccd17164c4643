"""Observers: they watch a value while calibration images pass, and choose the range of its grid.

An observer keeps a few numbers or a histogram, but no values. So its memory does not grow with the number of images.

    minmax           from the least to the greatest value
    moving-average   the least and the greatest value of each batch, in an exponential average over the batches (Jacob
                     et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
                     Inference", 2018, section 3.1)
    percentile[:P]   without (100 - P) % of the values at each end; P = 99.99 unless given
    mse              the range whose grid has the least squared error
    entropy          the range whose grid has the least Kullback-Leibler divergence from the histogram (Migacz, "8-bit
                     Inference with TensorRT", 2017)

A range always contains 0, and is never wider than the observed values.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from r2cli.config import values
from r2cli.quantized import grid_search

BINS = 2048  # on each side of zero, as in TensorRT's method
PIECE = 1 << 22  # values for one call of torch.histc: it counts in float32, which is exact only up to 2**24
NEWEST = 0.1  # the weight of the newest batch in the moving average
PERCENTILE = 99.99
# The ranges that entropy tries, as shares of the observed range.
SHARES = tuple(number / 128 for number in range(1, 129))
NEARLY = 1e-6  # nats: of divergences that differ by no more, the widest range is taken


class Observer(nn.Module):
    """Pass x (of any shape) on unchanged, and keep the least and the greatest value in `low` and `high`.

    `finite` becomes False at the first NaN or infinity; `low` and `high` mean nothing from then on. Until a number has
    come, `low` is above `high`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.finite = math.inf, -math.inf, True

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        low, high = (float(end) for end in torch.aminmax(x.detach()))
        self.finite = self.finite and math.isfinite(low) and math.isfinite(high)
        if self.finite:
            self.update(x.detach(), low, high)
        return x

    def update(self, x: Tensor, low: float, high: float) -> None:
        """Record the values of `x`. Its least value is `low`, its greatest `high`."""
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self, bits: int) -> tuple[float, float]:
        """Return the ends of the range for a grid of 2**bits levels."""
        return self.low, self.high


class MovingAverage(Observer):
    """Average the least and the greatest values of the batches exponentially: the newest has the weight `NEWEST`."""

    def update(self, x: Tensor, low: float, high: float) -> None:
        if self.high < self.low:  # the first batch: the average starts at its values
            self.low, self.high = low, high
        self.low += NEWEST * (low - self.low)
        self.high += NEWEST * (high - self.high)


class Histogram(Observer):
    """Count values in `BINS` bins on each side of zero. When a value lies outside, all bins double their width.

    Two neighbours then become one bin, so that all counts stay exact. (With bins of any other width, counts would have
    to be split between the new bins by a guess.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.step = 2.0**-126  # the width of a bin: at first the smallest normal float32, so it only needs to grow
        self.counts = torch.zeros(2, BINS, dtype=torch.int64)  # row 0 below zero, ascending; row 1 above zero

    def update(self, x: Tensor, low: float, high: float) -> None:
        super().update(x, low, high)
        doubled = 1
        while self.step * doubled * BINS <= max(-low, high):
            doubled *= 2
        self._widen(doubled)
        end = self.step * BINS
        for piece in torch.split(x.flatten(), PIECE):
            found = torch.histc(piece.float(), 2 * BINS, -end, end)
            self.counts += found.to(torch.int64).cpu().view(2, BINS)

    def _widen(self, times: int) -> None:
        """Make the bins `times` as wide, where `times` is a power of two."""
        self.step *= times
        if times == 1:
            return
        groups = max(1, BINS // times)  # this many bins are left on each side; the others are empty
        merged = self.counts.view(2, groups, -1).sum(2)
        self.counts = torch.zeros_like(self.counts)
        self.counts[0, -groups:], self.counts[1, :groups] = merged[0], merged[1]

    def middles(self) -> Tensor:
        """Return the middles of the bins, ascending, none of them outside the observed values: float64 (2 * BINS,).

        Where many values are the greatest of all, as behind a ReLU6, the middle of their bin would lie above it.
        """
        return ((torch.arange(-BINS, BINS, dtype=torch.float64) + 0.5) * self.step).clamp(self.low, self.high)

    def within(self, low: float, high: float) -> tuple[float, float]:
        """Cut a range to the observed values, and widen it where it does not contain 0."""
        return min(0.0, max(low, self.low)), max(0.0, min(high, self.high))


class Percentile(Histogram):
    """Cut (100 - percentile) % of the values off each end. Within a bin, values count as evenly spread."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile

    def range(self, bits: int) -> tuple[float, float]:
        running = self.counts.flatten().double().cumsum(0)
        return self.within(*(self._at(running, share) for share in (100 - self.percentile, self.percentile)))

    def _at(self, running: Tensor, percent: float) -> float:
        """Return the value below which `percent` of all values lie, by the running sum of the counts (2 * BINS,)."""
        wanted = running[-1] * percent / 100
        index = int(torch.searchsorted(running, wanted).clamp_max(len(running) - 1))
        before = running[index - 1] if index else running.new_zeros(())
        inside = float((wanted - before) / (running[index] - before).clamp_min(1))
        return (index - BINS + inside) * self.step


class LeastError(Histogram):
    """Find the range with the least squared error. Every value counts as the middle of its bin."""

    def range(self, bits: int) -> tuple[float, float]:
        filled = self.counts.flatten().nonzero().squeeze(1)
        values, number = self.middles()[filled], self.counts.flatten()[filled].double()
        low, high = grid_search.asymmetric_range(grid_search.spread(values[None], number[None]), bits)
        return float(low), float(high)


class Entropy(Histogram):
    """Find the range with the least divergence. Both ends are shortened by the same share."""

    def range(self, bits: int) -> tuple[float, float]:
        counts = self.counts.flatten().double()
        # Without the first bin above zero: after a ReLU it would be most of the distribution, and hide the rest.
        counts[BINS] = 0
        if not bool(counts.any()):
            return self.low, self.high
        middles, (low, high) = self.middles(), self.within(self.low, self.high)
        divergences = [divergence(counts, middles, share * low, share * high, bits) for share in SHARES]
        least = min(divergences) + NEARLY
        share = max(share for share, found in zip(SHARES, divergences, strict=True) if found <= least)
        return share * low, share * high


def divergence(counts: Tensor, middles: Tensor, low: float, high: float, bits: int) -> float:
    """Return the KL divergence in nats between a histogram and what a grid of 2**bits levels over [low, high] keeps.

    `counts` and `middles` are float64 (bins,). As in TensorRT's method, the values outside the range are added to its
    outermost bins, and the grid spreads the values of a level evenly over those of its bins that are not empty. It is
    infinite where most values lie outside: what such a range keeps says nothing of them.
    """
    scale, zero = grid_search.to_grid(torch.tensor(low), torch.tensor(high), 2**bits - 1)
    inside = (middles >= low) & (middles <= high)
    clipped = counts * inside
    reference = clipped.clone()
    if clipped.sum() < counts.sum() / 2:
        return math.inf
    kept = inside.nonzero().squeeze(1)
    reference[kept[0]] += counts[: kept[0]].sum()
    reference[kept[-1]] += counts[kept[-1] + 1 :].sum()
    level = (torch.round(middles / float(scale)) + float(zero)).clamp(0, 2**bits - 1).long()
    full = (reference > 0).double()
    total = torch.zeros(2**bits, dtype=torch.float64).index_add(0, level, clipped)
    bins = torch.zeros(2**bits, dtype=torch.float64).index_add(0, level, full * inside)
    candidate = torch.where(full > 0, (total / bins.clamp_min(1))[level], 0.0)
    p, q = reference / reference.sum(), candidate / candidate.sum().clamp_min(1e-300)
    # The bounds avoid log(0) and division by 0. A bin with p > 0 and q = 0 costs much, but the sum stays finite.
    return float((p * (p.clamp_min(1e-300) / q.clamp_min(1e-12)).log()).sum())


OBSERVERS: Mapping[str, Callable[[], Observer]] = {
    "minmax": Observer,
    "moving-average": MovingAverage,
    "percentile": lambda: Percentile(PERCENTILE),
    "mse": LeastError,
    "entropy": Entropy,
}


def observer(rule: str) -> Callable[[], Observer]:
    """Return what makes observers of `rule`, such as 'mse' or 'percentile:99.9'. Raises InputError if it is unknown."""
    name, percent = values.range_rule("--act-range", *OBSERVERS)(rule)
    return OBSERVERS[name] if percent is None else lambda: Percentile(percent)


def usual(bits: int) -> str:
    """Return the default rule for `bits`: the one that gave the best top-1.

    Measured at 4 bits with 8-bit weights on 2,000 images of CIFAR-10. ResNet-20 and MobileNet-V1 0.25, each without and
    with the margin regularizer, have 81.3, 81.6, 78.6 and 76.1 % in float. They kept 80.1, 79.9, 74.7 and 71.3 % with
    mse, 79.9, 80.8, 74.1 and 72.2 with percentile:99.9, 79.3, 80.3, 73.3 and 71.6 with entropy; minmax was far below
    (72.7, 73.7 and 62.5 in three of the four).
    """
    return "minmax" if bits >= 8 else "mse"
