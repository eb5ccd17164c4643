"""The first reading of a tensor: patterns, moments, extremes, and the range of every output channel."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from r2cli import counts as tables
from r2cli.counts import WHOLE, Count, Counts, Moments
from r2cli.tensors import Stored

Share = Callable[[float], None]  # told of shares of a tensor, 1 in all


@dataclass(frozen=True)
class Ranges:
    """What every output channel holds: float32 (channels,) each."""

    low: Tensor
    high: Tensor
    mean_abs: Tensor

    @property
    def reach(self) -> Tensor:
        return torch.maximum(-self.low, self.high)


@dataclass(frozen=True)
class Reading:
    """`moments`, `low` and `high` are of the finite values; the moments are None where there is none."""

    counts: Counts
    moments: Moments | None
    low: float
    high: float
    channels: Ranges | None  # where they were asked for, and there are values and all are finite

    @property
    def reach(self) -> float:
        return max(-self.low, self.high)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(output channels, weights of each); a vector is one channel."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))


def spans(shape: tuple[int, ...], piece: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, rows, start, stop): elements start to stop are whole rows, or a part of one that is longer than `piece`."""
    rows, width = matrix(shape)
    if not rows * width:
        return
    together = max(1, piece // width)
    for row in range(0, rows, together):
        many = min(together, rows - row)
        stop = (row + many) * width
        for at in range(row * width, stop, max(piece, many * width) if width <= piece else piece):
            yield row, many, at, min(stop, at + piece)


def read(stored: Stored, *, channels: bool, piece: int, advance: Share) -> Reading:
    """Read `stored`, a floating tensor, once."""
    assert stored.dtype is not None
    whole = _counted_as(stored.dtype) in WHOLE
    count, wide = Count(_counted_as(stored.dtype)), _Wide()
    rows = _Rows(matrix(stored.shape)) if channels else None
    for row, many, start, stop in spans(stored.shape, piece):
        part = stored.read(start, stop)
        if whole:
            count.add(part.to(count.dtype))
        if not whole or rows is not None:
            part = part.float()
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
    found = tables.moments(counts) if whole else wide.moments()
    return Reading(counts, found, low, high, rows.ranges() if rows is not None and not nan and not inf else None)


def finite_pieces(stored: Stored, piece: int) -> Iterator[Tensor]:
    """The finite values in pieces, float32."""
    for part in stored.pieces(piece):
        yield _finite(part.float())


def _finite(part: Tensor) -> Tensor:
    """`part` itself, or a copy without its NaN and infinities."""
    all_finite = math.isfinite(float(part.amin())) and math.isfinite(float(part.amax()))
    return part if all_finite else part[torch.isfinite(part)]


def _counted_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose patterns are counted: eight bits are values of bfloat16, and float64 is deployed as float32."""
    if dtype in WHOLE:
        return dtype
    return torch.bfloat16 if dtype.itemsize == 1 else torch.float32


class _Wide:
    """Extremes and power sums, in float64, of values whose patterns are not the whole value."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.nan = self.inf = 0
        self._shift: float | None = None
        self._sums = torch.zeros(5, dtype=torch.float64)  # of |x|, d, d**2, d**3, d**4 with d = x - shift
        self._count = 0

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
        offset = part.double()
        size = torch.linalg.vector_norm(offset, 1)
        if self._shift is None:
            # Weights lie around 0. Values that do not would cancel in the fourth power: they are taken from their mean.
            mean, std = float(offset.mean()), float(offset.std(correction=0))
            self._shift = mean if abs(mean) > std else 0.0
        if self._shift:
            offset.sub_(self._shift)
        square = offset.square()
        powers = [size, offset.sum(), square.sum(), torch.dot(offset, square), torch.dot(square, square)]
        self._sums += torch.stack(powers)
        self._count += len(part)
        return part

    def moments(self) -> Moments:
        size, first, second, third, fourth = (self._sums / self._count).tolist()
        mean = first + (self._shift or 0.0)
        if self.low == self.high:
            return Moments(self.low, 0.0, None, abs(self.low))
        variance = max(0.0, second - first**2)
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        kurtosis = central / variance**2 if variance**2 > 0 else None
        return Moments(mean, math.sqrt(variance), kurtosis, size)


class _Rows:
    """The range of every row while its parts are added."""

    def __init__(self, matrix: tuple[int, int]) -> None:
        self._rows, self._width = matrix
        self._low = torch.full((self._rows,), math.inf)
        self._high = torch.full((self._rows,), -math.inf)
        self._sum = torch.zeros(self._rows, dtype=torch.float64)

    def add(self, row: int, part: Tensor) -> None:
        """Add `part` (rows, some weights), float32, of the rows from `row`."""
        own = slice(row, row + len(part))
        self._low[own] = torch.minimum(self._low[own], part.amin(1))
        self._high[own] = torch.maximum(self._high[own], part.amax(1))
        self._sum[own] += torch.linalg.vector_norm(part, 1, dim=1, dtype=torch.float64)

    def ranges(self) -> Ranges:
        return Ranges(self._low, self._high, (self._sum / self._width).float())
