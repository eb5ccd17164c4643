"""How wide the weights of a network are, which of them are outliers, and what they lose at 8 bits to 1 bit.

This needs no data and no code of the network. Each tensor is read twice, in pieces. The first pass counts values
(`value_counts.py`), sums their powers, and finds the outliers and the range of every output channel. The second pass
really rounds every weight: to min-max grids and to the best grids, with one grid and with one per output channel.

An outlier is further than `sigma` standard deviations from the mean. Output channels are the first dimension.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from r2cli.analysis.range_pass import Ranges, Reading, finite_pieces, read
from r2cli.analysis.rounding_pass import MIN_MAX, TENSOR, Losses, losses
from r2cli.errors import unknown
from r2cli.quantized import value_counts
from r2cli.quantized.value_counts import Bins
from r2cli.storage.stream import PIECE, Stored

# In a normal distribution 1 weight in 16,000 is beyond 4 standard deviations. Many more than that are no normal tail.
SIGMA = 4.0
DRIVERS = 8  # a report names at most this many channels
GROUPS = 512  # a report has at most this many channel ranges, so that it stays small; neighbours share one beyond

Advance = Callable[[int], None]


@dataclass(frozen=True)
class AnalyzeSettings:
    """`quick` leaves out the second pass, the rounding. `everything` also analyzes vectors, such as biases."""

    sigma: float = SIGMA
    quick: bool = False
    everything: bool = False
    piece: int = PIECE  # elements that are read at once; the results do not depend on it


@dataclass(frozen=True)
class Channels:
    """The ranges of the output channels, in order. If there are many, each range is that of `group` neighbours."""

    count: int
    group: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    median: float  # of the channels' max|w|
    drivers: tuple[tuple[int, float], ...]  # (channel, max|w|) of the channels with the widest ranges, widest first
    over_half: int  # the number of channels with a max|w| over half of the layer's


@dataclass(frozen=True)
class AnalyzedLayer:
    """The analysis of one weight tensor. Statistics are of its finite values, and None if there are none."""

    layer: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    nan: int
    inf: int
    low: float | None
    high: float | None
    mean: float | None
    mean_abs: float | None  # of |w|
    std: float | None
    kurtosis: float | None
    ratio: float | None  # max|w| / std
    outliers: int
    outlier_share: float
    saved_bits: float  # log2 of how much narrower the range is without the outliers
    histogram: Bins
    channels: Channels | None
    losses: Losses | None

    @property
    def name(self) -> str:
        """The name of the layer, without '.weight'."""
        return self.layer.removesuffix(".weight")

    @property
    def reach(self) -> float:
        """max|w|."""
        return max(abs(self.low or 0.0), abs(self.high or 0.0))

    def sqnr(self, bits: int, granularity: str) -> float | None:
        """Return the SQNR in dB of rounding to min-max grids, or None if it was not measured."""
        return None if self.losses is None else self.losses.sqnr[granularity][MIN_MAX][bits]


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that is not a layer, and the reason."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass(frozen=True)
class Analysis:
    """The layers of one file, or of one view of it: as trained, folded, or decoded."""

    file: str
    view: str
    rows: tuple[AnalyzedLayer, ...]
    others: tuple[OtherTensor, ...]
    note: str = ""

    @property
    def title(self) -> str:
        return f"{self.file}, {self.view}" if self.view else self.file


def split(tensors: Sequence[Stored], *, everything: bool) -> tuple[list[Stored], list[OtherTensor]]:
    """Split tensors into layers (floating point, two dimensions or more) and others, with a reason for each."""
    layers, others = [], []
    for stored in tensors:
        reason = ""
        if stored.dtype is None:
            reason = "type unknown to torch"
        elif not stored.dtype.is_floating_point:
            reason = "integers"
        elif len(stored.shape) < (1 if everything else 2):
            reason = "vector" if stored.shape else "scalar"
        if reason:
            others.append(OtherTensor(stored.name, stored.shape, stored.kind, reason))
        else:
            layers.append(stored)
    return layers, others


def matching(views: Sequence[Sequence[Stored]], patterns: Sequence[str]) -> list[list[Stored]]:
    """Return, for every view, the layers whose name matches one of `patterns`; all layers if there are no patterns.

    Raises InputError for a pattern that matches no layer of any view.
    """
    names = {stored.name for layers in views for stored in layers}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise unknown("layer in --only", pattern, names)
    kept = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns or ["*"])}
    return [[stored for stored in layers if stored.name in kept] for layers in views]


def rows(
    layers: Sequence[Stored], settings: AnalyzeSettings, *, threads: int, advance: Advance
) -> tuple[AnalyzedLayer, ...]:
    """Analyze the layers; returns a row for each, in order.

    Calls `advance` with numbers of bytes as they are done. Their sum in the end is `total(layers)`.
    """
    with _one_thread_each(), ThreadPoolExecutor(max(1, threads)) as pool:
        waiting = [pool.submit(row, stored, settings, advance) for stored in layers]
        try:
            return tuple(future.result() for future in waiting)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def total(layers: Sequence[Stored]) -> int:
    """Return the bytes of all layers: the sum of what `rows` passes to `advance`."""
    return sum(stored.bytes for stored in layers)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Run torch's operators on one thread. The threads of the pool work on different tensors; a piece is too small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row(stored: Stored, settings: AnalyzeSettings, advance: Advance = lambda _: None) -> AnalyzedLayer:
    """Analyze one floating-point tensor. Raises InputError where its file cannot be read."""
    progress = _Progress(stored.bytes, advance)
    first = read(
        stored,
        channels=not settings.quick,
        sigma=settings.sigma,
        piece=settings.piece,
        advance=lambda share: progress(share if settings.quick else share / 2),
    )
    there = first.moments is not None
    std = first.moments.std if first.moments else 0.0
    outliers, saved = _outliers(stored, first, settings)
    lost = None
    if first.channels is not None:
        lost = losses(stored, first, piece=settings.piece, advance=lambda share: progress(share / 2))
    progress.finish()
    return AnalyzedLayer(
        layer=stored.name,
        shape=stored.shape,
        dtype=stored.kind,
        count=stored.size,
        nan=first.counts.nan,
        inf=first.counts.inf,
        low=first.low if there else None,
        high=first.high if there else None,
        mean=first.moments.mean if first.moments else None,
        mean_abs=first.moments.mean_abs if first.moments else None,
        std=first.moments.std if first.moments else None,
        kurtosis=first.moments.kurtosis if first.moments else None,
        ratio=first.reach / std if std > 0 else None,
        outliers=outliers,
        outlier_share=outliers / stored.size if stored.size else 0.0,
        saved_bits=saved,
        histogram=value_counts.bins(first.counts, value_counts.bin_step(first.reach)),
        channels=None if first.channels is None else _channels(first.channels),
        losses=lost,
    )


class _Progress:
    """Turns shares of a tensor into whole bytes for `advance`. The bytes add up to `total`."""

    def __init__(self, total: int, advance: Advance) -> None:
        self._left, self._total, self._owed, self._advance = total, total, 0.0, advance

    def __call__(self, share: float) -> None:
        self._owed += share * self._total
        part = min(int(self._owed), self._left)
        self._owed, self._left = self._owed - part, self._left - part
        self._advance(part)

    def finish(self) -> None:
        self._advance(self._left)
        self._left = 0


def _outliers(stored: Stored, first: Reading, settings: AnalyzeSettings) -> tuple[int, float]:
    """Return the number of outliers, and the bits saved: log2 of how much narrower the range is without them.

    The first pass kept the values far from the mean. If they contain all outliers, counting them is enough; otherwise
    the tensor's counts decide, and the tensor is read again where they are too coarse.
    """
    if first.moments is None or not first.moments.std:
        return 0, 0.0
    mean, edge = first.moments.mean, settings.sigma * first.moments.std
    low, high, far = mean - edge, mean + edge, first.far
    if far is not None and far.gate <= min(-low, high):
        number = int(((far.values.double() < low) | (far.values.double() > high)).sum())
    else:
        number = value_counts.beyond(first.counts, low, high, lambda: finite_pieces(stored, settings.piece))
    if not number:
        return 0, 0.0
    return number, max(0.0, math.log2(first.reach / max(abs(mean - edge), abs(mean + edge))))


def _channels(ranges: Ranges) -> Channels:
    count = len(ranges.low)
    group = -(-count // GROUPS)
    reach = ranges.reach
    furthest = reach.sort(descending=True, stable=True)
    return Channels(
        count,
        group,
        low=tuple(float(part.min()) for part in torch.split(ranges.low, group)),
        high=tuple(float(part.max()) for part in torch.split(ranges.high, group)),
        median=float(reach.median()),
        drivers=tuple((int(furthest.indices[i]), float(furthest.values[i])) for i in range(min(count, DRIVERS))),
        over_half=int((reach > reach.amax() / 2).sum()),
    )


# --- orders --------------------------------------------------------------------------------------------------------


def _down(value: float | None) -> float:
    return math.inf if value is None else -value


def _least_sqnr(row: AnalyzedLayer, bits: int, granularity: str) -> float:
    found = row.sqnr(bits, granularity)
    return math.inf if found is None else found


# Keys for sorting. The layers that would lose most have the least keys.
SORTS: Mapping[str, Callable[[AnalyzedLayer, int, str], float]] = {
    "sqnr": _least_sqnr,
    "range": lambda row, bits, granularity: _down(row.ratio),
    "outliers": lambda row, bits, granularity: -row.outlier_share,
    "kurtosis": lambda row, bits, granularity: _down(row.kurtosis),
    "size": lambda row, bits, granularity: -row.count,
    "name": lambda row, bits, granularity: 0.0,
}


def ordered(
    found: Sequence[AnalyzedLayer], by: str, *, bits: int = 4, granularity: str = TENSOR
) -> list[AnalyzedLayer]:
    """Sort the rows, those that would lose most first. `by` is a key of `SORTS`; 'name' keeps their order.

    Layers with NaN or infinities come first, since they are errors.
    """
    key = SORTS[by]
    return sorted(found, key=lambda row: (by != "name" and not row.nan + row.inf, key(row, bits, granularity)))
