"""A count of the 16-bit patterns in a tensor, and all that can be computed from it without the tensor.

A bfloat16 or float16 tensor has at most 65,536 different values. How often each occurs answers every question about
their distribution exactly: extremes, moments, histograms, outliers, and the error of any grid. The pattern of a float32
value is its top half, so the values in a bucket differ by less than 1 part in 128. Where an answer depends on values
within a bucket, they are counted again in the tensor itself, piece by piece.

    count = Count(torch.bfloat16)
    for piece in pieces: count.add(piece)
    counts = count.counts()
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r2cli.quantized import grid_search
from r2cli.quantized.scratch import Pair, Scratch, pair

PATTERNS = 1 << 16
# Dtypes whose every value is one pattern; the others are counted as float32.
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
# No channel's grid is finer than this share of the coarsest one's: its bias then fits int32 on scale_x * scale_w.
FINEST = 2.0**-16
OF_ZEROS = (
    2.0**-64
)  # the scale of a weight that is 0 everywhere; times the scale of an activation it is a normal float32
# The exponent of the least step between top halves of float32 values. A histogram cannot be finer than that.
LEAST_STEP = -133

Pieces = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Counts:
    """The finite values of a tensor in buckets, from the least to the greatest, and how many values each has."""

    low: Tensor  # float64 (buckets,): the least value that a bucket can hold
    high: Tensor  # float64 (buckets,): the greatest; equal to `low` for 16-bit dtypes
    number: Tensor  # int64 (buckets,), > 0
    whole: bool  # every bucket has one value only, so all that follows is exact
    nan: int = 0
    inf: int = 0

    @property
    def total(self) -> int:
        return int(self.number.sum())

    @property
    def middle(self) -> Tensor:
        """float64 (buckets,): the values, or for float32 the middles of the buckets."""
        return (self.low + self.high) / 2


class Count:
    """A count to which the pieces of a tensor are added."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._table = torch.zeros(PATTERNS, dtype=torch.int64)
        self._patterns = Scratch()

    def add(self, piece: Tensor) -> None:
        """Count `piece`: 1-D, of this count's dtype, float32 for dtypes of more than 16 bits; float32 finite."""
        patterns = self._patterns.take(len(piece), torch.int32)
        if self.dtype in SIXTEEN_BIT:
            patterns.copy_(piece.view(torch.int16)).bitwise_and_(PATTERNS - 1)
        else:
            # By NumPy, because torch has no unsigned shift of 32 bits.
            np.right_shift(piece.numpy().view(np.uint32), 16, out=patterns.numpy().view(np.uint32))
        self._table += torch.bincount(patterns, minlength=PATTERNS)

    def counts(self) -> Counts:
        """Return the count of all pieces so far."""
        patterns = torch.arange(PATTERNS, dtype=torch.int32)
        if self.dtype in SIXTEEN_BIT:
            low = high = patterns.to(torch.int16).view(self.dtype).double()
        else:
            inner = (patterns << 16).view(torch.float32).double()
            outer = ((patterns << 16) | (PATTERNS - 1)).view(torch.float32).double()
            low, high = torch.minimum(inner, outer), torch.maximum(inner, outer)
        there = self._table > 0
        finite = torch.isfinite(low) & torch.isfinite(high)
        kept = (there & finite).nonzero().squeeze(1)
        kept = kept[low[kept].argsort(stable=True)]
        return Counts(
            low[kept],
            high[kept],
            self._table[kept],
            whole=self.dtype in SIXTEEN_BIT,
            nan=int(self._table[low.isnan()].sum()) if self.dtype in SIXTEEN_BIT else 0,
            inf=int(self._table[low.isinf()].sum()),
        )


# --- questions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Mean, standard deviation (of the population), kurtosis (normal: 3; None without spread), and mean of |w|."""

    mean: float
    std: float
    kurtosis: float | None
    mean_abs: float


def moments(counts: Counts) -> Moments:
    """Return the moments of a whole count that is not empty, by float64 sums over its different values."""
    assert counts.whole
    share = counts.number.double() / counts.total
    mean = float(share @ counts.low)
    offset = counts.low - mean
    square = offset.square()
    variance, fourth = float(share @ square), float(share @ square.square())
    kurtosis = fourth / variance**2 if variance**2 > 0 else None
    return Moments(mean, math.sqrt(variance), kurtosis, float(share @ counts.low.abs()))


def below(counts: Counts, edges: Iterable[float], pieces: Pieces | None = None) -> list[int]:
    """Return how many values are less than each edge, exactly.

    For an edge inside a bucket of a float32 count, `pieces`, the tensor's finite values, are counted again in one pass.
    That takes some 0.1 ns per value and edge.
    """
    wanted = torch.tensor(list(edges), dtype=torch.float64)
    index = torch.searchsorted(counts.low, wanted)  # buckets whose least value is below the edge
    running = torch.cat([counts.number.new_zeros(1), counts.number.cumsum(0)])
    found = [int(n) for n in running[index]]
    cut = [i for i, at in enumerate(index.tolist()) if at > 0 and float(counts.high[at - 1]) >= float(wanted[i])]
    # A whole bucket has low == high < edge: it is never cut.
    if cut:
        assert pieces is not None, "a float32 count needs the tensor for an edge inside a bucket"
        exact = dict.fromkeys(cut, 0)
        limits = {i: ceil32(float(wanted[i])) for i in cut}
        for piece in pieces():
            values = piece.numpy()
            for i in cut:
                exact[i] += int(np.count_nonzero(values < limits[i]))
        for i, number in exact.items():
            found[i] = number
    return found


def beyond(counts: Counts, low: float, high: float, pieces: Pieces | None = None) -> int:
    """Return how many values are less than `low` or greater than `high`, exactly."""
    under, up_to_high = below(counts, [low, math.nextafter(high, math.inf)], pieces)
    return under + counts.total - up_to_high


def histogram(counts: Counts, edges: Iterable[float], pieces: Pieces | None = None) -> list[int]:
    """Return the number of values between ascending edges. The last bin has its upper edge too, as in NumPy."""
    wanted = list(edges)
    wanted[-1] = math.nextafter(wanted[-1], math.inf)
    running = below(counts, wanted, pieces)
    return [after - before for before, after in zip(running, running[1:], strict=False)]


@dataclass(frozen=True)
class Bins:
    """Bins of equal width whose edges cut no bucket: `step` is a power of two, and bins are closed towards zero.

    Bin k >= 0 is [k, k + 1) steps, and bin k < 0 is (k, k + 1] steps. -0 is in bin -1.
    """

    step: float
    first: int
    counts: tuple[int, ...]


def bin_step(reach: float, most: int = 128) -> float:
    """Return the least power of two with which values up to `reach` take at most `most` bins on each side of zero.

    `most` is a power of two.
    """
    if reach == 0:
        return 1.0
    return 2.0 ** max(math.frexp(reach)[1] - most.bit_length() + 1, LEAST_STEP)


def bin_index(x: Tensor, step: float, memory: Pair | None = None) -> Tensor:
    """Return the bin of every float32 value: int32, the shape of `x`, in the `memory` that is given or in its own."""
    first, second = memory or pair()
    size = torch.abs(x, out=first.like(x)).div_(step)
    index = second.like(x, torch.int32).copy_(size)
    sign = size.view(torch.int32)  # its values are not needed any more
    return index.bitwise_xor_(torch.bitwise_right_shift(x.view(torch.int32), 31, out=sign))  # -k - 1 below zero


def bins(counts: Counts, step: float) -> Bins:
    """Return the exact histogram of a count, from its least to its greatest bin, with a step that `bin_step` made."""
    if not len(counts.number):
        return Bins(step, 0, ())
    toward = torch.where(torch.signbit(counts.high), counts.high, counts.low)  # the end of the bucket next to zero
    size = torch.floor(toward.abs() / step).long()
    index = torch.where(torch.signbit(toward), -size - 1, size)
    first = int(index.min())
    return Bins(step, first, tuple(torch.bincount(index - first, weights=counts.number.double()).long().tolist()))


def ceil32(value: float) -> np.float32:
    """Return the least float32 that is not less than `value`. For a float32 x, x < value means x < ceil32(value)."""
    with np.errstate(over="ignore"):
        near = np.float32(value)
    return near if float(near) >= value else np.nextafter(near, np.float32(np.inf))


# --- grids ---------------------------------------------------------------------------------------------------------


def min_max_scale(low: Tensor, high: Tensor, mean_abs: Tensor, bits: int) -> Tensor:
    """Return the scale of a signed grid that reaches from `low` to `high`; at one bit, that of -mean|w| and mean|w|.

    All tensors have one shape, with one entry per grid. The scale of a grid of zeros is 0.
    """
    if bits == 1:
        return mean_abs
    return torch.maximum(high / (2 ** (bits - 1) - 1), -low / 2 ** (bits - 1))


def usable(scale: Tensor) -> Tensor:
    """Return `scale` (channels,) with every entry above zero: a dead channel gets the finest grid that is allowed.

    Where all are 0 they become `OF_ZEROS`, so that codes of other values than 0 stand for next to nothing too.
    """
    coarsest = scale.amax()
    return scale.clamp_min(coarsest * FINEST) if coarsest > 0 else torch.full_like(scale, OF_ZEROS)


def rounded(x: Tensor, scale: Tensor, bits: int, memory: Pair | None = None) -> tuple[Tensor, Tensor]:
    """Round `x` as a signed `Grid` does, which is midrise at one bit. Returns (what is lost / scale, codes).

    `x` is float32, and `scale` broadcasts to it. Both results have the shape and dtype of `x`, and are in the `memory`
    that is given, or in their own.
    """
    first, second = memory or pair()
    levels = torch.div(x, scale, out=first.like(x))
    codes = second.like(x)
    if bits == 1:
        # Levels -scale and scale; 0 goes down, as halves go to even codes.
        torch.gt(levels, 0, out=codes)
        return levels.abs_().sub_(1), codes
    lowest = -(2 ** (bits - 1))
    torch.round(levels, out=codes).clamp_(lowest, -lowest - 1)
    return levels.sub_(codes), codes


def noise(counts: Counts, scale: Tensor, bits: int) -> float:
    """Return the summed squared error of rounding a whole count's tensor, in float32, to the grid of `scale` ()."""
    assert counts.whole
    error, _ = rounded(counts.low.float(), scale, bits)
    return float(scale) ** 2 * float(counts.number.double() @ error.double().square())


def best_scale(counts: Counts, start: float, bits: int, octaves: int = 16) -> float:
    """Return the scale with the least error for a grid of `bits` >= 2, to 2 %, from `start` down by `octaves`.

    It is chosen on the middles of the buckets, which are the values themselves in a whole count.
    """
    middle, number = counts.middle[None], counts.number.double()[None]
    spread = grid_search.spread(middle, number)
    return float(grid_search.symmetric_scale(spread, torch.tensor([start]), bits, octaves))
