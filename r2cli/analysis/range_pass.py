"""The first pass over a tensor: counts of values, moments, extremes, and the range of every output channel."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from r2cli.quantized import value_counts
from r2cli.quantized.scratch import Scratch
from r2cli.quantized.value_counts import SIXTEEN_BIT, Count, Counts, Moments
from r2cli.storage.stream import Stored

# Fourth powers of numbers between 1 / SAFE and SAFE fit float32. For other tensors they are computed in float64.
SAFE = 1e6
# The bound between outliers and others is known only at the end of the pass. The first piece gives an estimate of it.
# Values beyond GATE times the estimate are kept (0.3 % of normal weights), so that counting the outliers needs no
# second pass, unless there are more than MOST_FAR of them or the final bound is lower than that.
GATE = 0.75
MOST_FAR = 1 << 20

Advance = Callable[[float], None]  # is called with shares of a tensor as they are done; they add up to 1


@dataclass(frozen=True)
class Ranges:
    """The least weight, the greatest weight and the mean of |w| of every output channel: float32 (channels,)."""

    low: Tensor
    high: Tensor
    mean_abs: Tensor

    @property
    def reach(self) -> Tensor:
        return torch.maximum(-self.low, self.high)


@dataclass(frozen=True)
class Outliers:
    """Every finite value of a tensor with |w| > gate."""

    gate: float
    values: Tensor


@dataclass(frozen=True)
class Reading:
    """The result of the first pass. Moments (None if there are no values), `low` and `high` are of finite values."""

    counts: Counts
    moments: Moments | None
    low: float
    high: float
    channels: Ranges | None  # None if they were not asked for, or not all values are finite
    far: Outliers | None = None  # the values far from the mean; None if there were too many, or `counts` is exact

    @property
    def reach(self) -> float:
        return max(-self.low, self.high)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of output channels and the weights of each. A vector is one channel."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))


def spans(shape: tuple[int, ...], piece: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield pieces as (row, rows, start, stop). Elements start to stop are whole rows, or a part of one long row."""
    rows, width = matrix(shape)
    if not rows * width:
        return
    together = max(1, piece // width)
    for row in range(0, rows, together):
        many = min(together, rows - row)
        stop = (row + many) * width
        for at in range(row * width, stop, piece):
            yield row, many, at, min(stop, at + piece)


def read(stored: Stored, *, channels: bool, sigma: float, piece: int, advance: Advance) -> Reading:
    """Read the floating-point tensor `stored` once. Outliers are `sigma` standard deviations from the mean."""
    assert stored.dtype is not None
    whole = _counted_as(stored.dtype) in SIXTEEN_BIT
    raw, floats, sizes = Scratch(), Scratch(), Scratch()
    count, wide = Count(_counted_as(stored.dtype)), _Wide(sigma, sizes)
    rows = _Rows(matrix(stored.shape), sizes) if channels else None
    for row, many, start, stop in spans(stored.shape, piece):
        part = stored.read(start, stop, raw)
        if whole:
            count.add(part if part.dtype == count.dtype else part.to(count.dtype))
        if not whole or rows is not None:
            part = as_float(part, floats)
        if not whole:
            count.add(wide.add(part))
        if rows is not None:
            rows.add(row, part.view(many, -1))
        advance((stop - start) / stored.size)
    counts = count.counts()
    nan, inf = counts.nan + wide.nan, counts.inf + wide.inf
    counts = Counts(counts.low, counts.high, counts.number, whole=whole, nan=nan, inf=inf)
    if not len(counts.number):
        return Reading(counts, None, 0.0, 0.0, None)
    low, high = (float(counts.low[0]), float(counts.high[-1])) if whole else (wide.low, wide.high)
    found = value_counts.moments(counts) if whole else wide.moments()
    ranges = rows.ranges() if rows is not None and not nan and not inf else None
    return Reading(counts, found, low, high, ranges, None if whole else wide.far())


def finite_pieces(stored: Stored, piece: int) -> Iterator[Tensor]:
    """The finite values in pieces, float32."""
    floats = Scratch()
    for part in stored.pieces(piece):
        yield _finite(as_float(part, floats))


def as_float(part: Tensor, memory: Scratch) -> Tensor:
    """`part` as float32: itself, or a copy in `memory`."""
    return part if part.dtype == torch.float32 else memory.like(part, torch.float32).copy_(part)


def _finite(part: Tensor) -> Tensor:
    """Return `part`, or a copy without its NaN and infinities."""
    # Two extremes are faster than a mask, and nearly all weights are finite.
    all_finite = math.isfinite(float(part.amin())) and math.isfinite(float(part.amax()))
    return part if all_finite else part[torch.isfinite(part)]


def _counted_as(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values are counted. All 8-bit floats are bfloat16 values; float64 becomes float32."""
    if dtype in SIXTEEN_BIT:
        return dtype
    return torch.bfloat16 if dtype.itemsize == 1 else torch.float32


class _Wide:
    """Extremes, power sums and the far values of what is counted by float32's top halves.

    `sizes` is memory for |w|, which `_Rows` uses after it.
    """

    def __init__(self, sigma: float, sizes: Scratch) -> None:
        self._sizes, self._square, self._power = sizes, Scratch(), Scratch()
        self.low, self.high = math.inf, -math.inf
        self.nan = self.inf = 0
        self._sigma = sigma
        self._shift: float | None = None
        self._sums = [0.0] * 4  # of d, d**2, d**3, d**4 with d = x - shift
        self._size = 0.0  # of |x|
        self._count = 0
        self._gate, self._far, self._room = math.inf, [torch.empty(0)], MOST_FAR

    def add(self, part: Tensor) -> Tensor:
        """Add float32 values; returns the finite ones."""
        low, high = float(part.amin()), float(part.amax())
        if not (math.isfinite(low) and math.isfinite(high)):
            self.nan, self.inf = self.nan + int(part.isnan().sum()), self.inf + int(part.isinf().sum())
            part = part[torch.isfinite(part)]
            if not len(part):
                return part
            low, high = float(part.amin()), float(part.amax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self._shift is None:
            # Weights are usually around 0. If they are not, the mean is subtracted first: in sums of fourth powers the
            # digits that matter would cancel.
            mean, std = float(part.double().mean()), float(part.double().std(correction=0))
            self._shift = mean if abs(mean) > std else 0.0
            # Rounded up to float32, since float32 values are compared with it.
            self._gate = float(value_counts.ceil32(abs(mean) + GATE * self._sigma * std))
        reach = max(-low, high)
        if self._shift or not 1 / SAFE < reach < SAFE:
            sums = self._power_sums(part.double().sub_(self._shift))
        else:
            sums = self._power_sums(part)  # torch adds in pairs: float32 loses nothing that could be seen
        self._sums = [before + more for before, more in zip(self._sums, sums, strict=True)]
        self._count += len(part)
        size = torch.abs(part, out=self._sizes.like(part))
        self._size += float(size.sum() if reach < SAFE else size.double().sum())
        if reach > self._gate and self._room:
            # Few values are far. NumPy's flatnonzero finds them faster than a mask does, and much faster than torch.
            far = torch.from_numpy(part.numpy()[np.flatnonzero(size.numpy() > self._gate)])
            self._room -= min(self._room, len(far))
            self._far.append(far)
        return part

    def moments(self) -> Moments:
        first, second, third, fourth = (total / self._count for total in self._sums)
        mean = first + (self._shift or 0.0)
        if self.low == self.high:
            return Moments(self.low, 0.0, None, abs(self.low))
        variance = max(0.0, second - first**2)
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        kurtosis = central / variance**2 if variance**2 > 0 else None
        return Moments(mean, math.sqrt(variance), kurtosis, self._size / self._count)

    def far(self) -> "Outliers | None":
        return Outliers(self._gate, torch.cat(self._far)) if self._room else None

    def _power_sums(self, x: Tensor) -> list[float]:
        """The sums of x, x**2, x**3 and x**4, (n,)."""
        square, power = torch.mul(x, x, out=self._square.like(x)), self._power.like(x)
        sums = [x.sum(), square.sum(), torch.mul(square, x, out=power).sum()]
        return [float(each) for each in (*sums, torch.mul(square, square, out=power).sum())]


class _Rows:
    """Collects the range of every row from its parts."""

    def __init__(self, matrix: tuple[int, int], sizes: Scratch) -> None:
        self._rows, self._width = matrix
        self._sizes = sizes
        self._low = torch.full((self._rows,), math.inf)
        self._high = torch.full((self._rows,), -math.inf)
        self._sum = torch.zeros(self._rows, dtype=torch.float64)

    def add(self, row: int, part: Tensor) -> None:
        """Add `part`, float32 (rows, some of their weights), which begins at `row`."""
        own = slice(row, row + len(part))
        self._low[own] = torch.minimum(self._low[own], part.amin(1))
        self._high[own] = torch.maximum(self._high[own], part.amax(1))
        size = torch.abs(part, out=self._sizes.like(part))
        sums = size.sum(1)
        self._sum[own] += sums if bool(torch.isfinite(sums).all()) else size.sum(1, dtype=torch.float64)

    def ranges(self) -> Ranges:
        return Ranges(self._low, self._high, (self._sum / self._width).float())
