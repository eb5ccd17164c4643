"""What watches a value while calibration images pass, and the range of the grid that it ends in.

An observer keeps a few numbers or a histogram and no value, so memory does not grow with the number of images.

    minmax           from the least to the greatest value
    moving-average   the ends of a batch, averaged exponentially over the batches (Jacob et al., "Quantization and
                     Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, 3.1)
    percentile[:P]   without (100 - P) % of the values at each end; P = 99.99 unless given
    mse              the range whose grid loses least squared error
    entropy          the range whose grid keeps the distribution nearest in Kullback-Leibler divergence (Migacz, "8-bit
                     Inference with TensorRT", 2017)

A range holds 0, and is no wider than what was seen.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from r2cli.config import values
from r2cli.quantized import grid_search

BINS = 2048  # on each side of zero
PIECE = 1 << 22  # values: a float32 counts that many in one bin exactly
NEWEST = 0.1  # the weight of a batch in the moving average
PERCENTILE = 99.99
# Ranges that entropy tries, as shares of what was seen.
SHARES = tuple(number / 128 for number in range(1, 129))


class Observer(nn.Module):
    """Passes x on unchanged, any shape. `low` and `high` are the ends of what was seen, unless `finite` is False."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.finite = math.inf, -math.inf, True

    def forward(self, x: Tensor) -> Tensor:
        low, high = (float(end) for end in torch.aminmax(x.detach()))
        self.finite = self.finite and math.isfinite(low) and math.isfinite(high)
        if self.finite:
            self.see(x.detach(), low, high)
        return x

    def see(self, x: Tensor, low: float, high: float) -> None:
        """Take in `x`, which lies between `low` and `high`."""
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self, bits: int) -> tuple[float, float]:
        """The range of a grid of 2**bits levels."""
        return self.low, self.high


class MovingAverage(Observer):
    """The ends of the batches so far, the newest with a weight of its own."""

    def see(self, x: Tensor, low: float, high: float) -> None:
        if self.high < self.low:  # the first
            self.low, self.high = low, high
        self.low += NEWEST * (low - self.low)
        self.high += NEWEST * (high - self.high)


class Histogram(Observer):
    """`BINS` bins on each side of zero, of a width that is a power of two: it doubles when a value lies outside.

    Two neighbours then become one, so nothing is ever spread or guessed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step = 2.0**-126
        self.counts = torch.zeros(2, BINS, dtype=torch.int64)  # below zero, from the least; above it

    def see(self, x: Tensor, low: float, high: float) -> None:
        super().see(x, low, high)
        doubled = 1
        while self.step * doubled * BINS <= max(-low, high):
            doubled *= 2
        self._widen(doubled)
        end = self.step * BINS
        for piece in torch.split(x.flatten(), PIECE):
            found = torch.histc(piece.float(), 2 * BINS, -end, end)
            self.counts += found.to(torch.int64).cpu().view(2, BINS)

    def _widen(self, times: int) -> None:
        """Make bins `times` as wide, a power of two."""
        self.step *= times
        if times == 1:
            return
        groups = max(1, BINS // times)
        merged = self.counts.view(2, groups, -1).sum(2)
        self.counts = torch.zeros_like(self.counts)
        self.counts[0, -groups:], self.counts[1, :groups] = merged[0], merged[1]

    def middles(self) -> Tensor:
        """float64 (2 * BINS,): the middles of the bins, ascending."""
        return (torch.arange(-BINS, BINS, dtype=torch.float64) + 0.5) * self.step

    def within(self, low: float, high: float) -> tuple[float, float]:
        """A range that is no wider than what was seen, 0 within."""
        return min(0.0, max(low, self.low)), max(0.0, min(high, self.high))


class Percentile(Histogram):
    """Linear between the edges of a bin."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile

    def range(self, bits: int) -> tuple[float, float]:
        running = self.counts.flatten().double().cumsum(0)
        return self.within(*(self._at(running, share) for share in (100 - self.percentile, self.percentile)))

    def _at(self, running: Tensor, percent: float) -> float:
        wanted = running[-1] * percent / 100
        index = int(torch.searchsorted(running, wanted).clamp_max(len(running) - 1))
        before = running[index - 1] if index else running.new_zeros(())
        inside = float((wanted - before) / (running[index] - before).clamp_min(1))
        return (index - BINS + inside) * self.step


class LeastError(Histogram):
    """Every value counts as the middle of its bin."""

    def range(self, bits: int) -> tuple[float, float]:
        there = self.counts.flatten().nonzero().squeeze(1)
        values, number = self.middles()[there], self.counts.flatten()[there].double()
        values = values.clamp(self.low, self.high)  # the outermost bins are not full
        low, high = grid_search.asymmetric_range(grid_search.spread(values[None], number[None]), bits)
        return float(low), float(high)


class Entropy(Histogram):
    """Both ends are drawn in alike. The bin at zero is left out: behind a ReLU it would be most of the distribution."""

    def range(self, bits: int) -> tuple[float, float]:
        counts = self.counts.flatten().double()
        counts[BINS] = 0
        if not bool(counts.any()):
            return self.low, self.high
        middles, (low, high) = self.middles(), self.within(self.low, self.high)
        found = [divergence(counts, middles, share * low, share * high, bits) for share in SHARES]
        share = SHARES[found.index(min(found))]
        return share * low, share * high


def divergence(counts: Tensor, middles: Tensor, low: float, high: float, bits: int) -> float:
    """KL divergence of the bins, clipped to [low, high], from what is left of them on a grid of 2**bits levels.

    Each level's values are spread evenly over those of its bins that were not empty.
    """
    scale, zero = grid_search.to_grid(torch.tensor(low), torch.tensor(high), 2**bits - 1)
    inside = (middles >= low) & (middles <= high)
    clipped = counts * inside
    reference = clipped.clone()
    at = inside.nonzero().squeeze(1)
    if not len(at):
        return math.inf
    reference[at[0]] += counts[: at[0]].sum()
    reference[at[-1]] += counts[at[-1] + 1 :].sum()
    level = (torch.round(middles / float(scale)) + float(zero)).clamp(0, 2**bits - 1).long()
    full = (reference > 0).double()
    total = torch.zeros(2**bits, dtype=torch.float64).index_add(0, level, clipped)
    bins = torch.zeros(2**bits, dtype=torch.float64).index_add(0, level, full * inside)
    candidate = torch.where(full > 0, (total / bins.clamp_min(1))[level], 0.0)
    p, q = reference / reference.sum(), candidate / candidate.sum().clamp_min(1e-300)
    return float((p * (p.clamp_min(1e-300) / q.clamp_min(1e-12)).log()).sum())


OBSERVERS: Mapping[str, Callable[[], Observer]] = {
    "minmax": Observer,
    "moving-average": MovingAverage,
    "percentile": lambda: Percentile(PERCENTILE),
    "mse": LeastError,
    "entropy": Entropy,
}


def observer(rule: str) -> Callable[[], Observer]:
    """What makes the observers of `rule`, for example 'mse' or 'percentile:99.9'. Raises InputError for another."""
    name, percent = values.range_rule("--act-range", *OBSERVERS)(rule)
    return OBSERVERS[name] if percent is None else lambda: Percentile(percent)


def usual(bits: int) -> str:
    """The rule that measured best. At 4 bits, top-1 of 2,000 CIFAR-10 images with 8-bit weights, ResNet-20 and
    MobileNet-V1 0.25, without and with the margin regularizer: minmax 72.7 73.7 62.5, mse 80.1 79.9 74.7 71.3,
    percentile:99.9 79.9 80.8 74.1 72.2, entropy 79.3 80.3 73.3 71.6 (float 81.3 81.6 78.6 76.1).
    """
    return "minmax" if bits >= 8 else "mse"
