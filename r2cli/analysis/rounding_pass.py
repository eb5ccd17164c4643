"""The second pass over a tensor: every weight is really rounded, and the errors are summed.

Per tensor and per output channel, to the grid from the least to the greatest weight and to the best of several narrower
ones. Of a 16-bit dtype the tensor's own grid needs no reading: its distinct values are rounded, each as often as it
occurs. A channel tries the tensor's best range, scaled to its own mean|w|, and one below and one above that.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from r2cli.analysis.range_pass import Advance, Ranges, Reading, as_float, matrix, spans
from r2cli.quantized import value_counts as tables
from r2cli.quantized.decibels import decibels
from r2cli.quantized.scratch import Pair, Scratch, pair
from r2cli.storage.stream import Stored

BITS = (8, 4, 3, 2, 1)
TENSOR, CHANNEL = "tensor", "channel"
MIN_MAX, BEST = "min-max", "best"
AROUND = (2**-0.33, 1.0, 2**0.33)  # factors of the tensor's best range that each channel tries
MAPPED = 64  # at most this many histograms, of channels or of groups of neighbours
MAP_BINS = 32  # on each side of zero


@dataclass(frozen=True)
class ChannelBins:
    """A histogram for each channel, or for each `group` of neighbours. Bins on each side of zero, as in `Bins`."""

    group: int
    step: float
    first: int
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Losses:
    """What rounding loses: `sqnr[granularity][rule][bits]` in dB, infinite where it loses nothing.

    `empty[bits]` is the share of levels of the tensor's min-max grid that no weight is rounded to.
    """

    sqnr: Mapping[str, Mapping[str, Mapping[int, float]]]
    empty: Mapping[int, float]
    channels: ChannelBins


def losses(stored: Stored, reading: Reading, *, piece: int, advance: Advance) -> Losses:
    """Round `stored`, which has at least one value and only finite ones."""
    assert reading.channels is not None and reading.moments is not None
    raw, floats, memory = Scratch(), Scratch(), pair()  # one pair for all rounding: what is in the cache is used again
    tensor = _TensorGrids(reading, memory)
    channels = _ChannelGrids(reading.channels, tensor, memory)
    counted = _ChannelCount(stored.shape, reading.reach)
    for row, many, start, stop in spans(stored.shape, piece):
        part = as_float(stored.read(start, stop, raw), floats).view(many, -1)
        if not reading.counts.whole:
            tensor.add(part.view(-1))
        channels.add(row, part)
        counted.add(row, part)
        advance((stop - start) / stored.size)
    signal = stored.size * (reading.moments.std**2 + reading.moments.mean**2)
    noise = {TENSOR: tensor.noise(), CHANNEL: channels.noise()}
    sqnr = {
        granularity: {rule: {bits: decibels(signal, n) for bits, n in of_bits.items()} for rule, of_bits in own.items()}
        for granularity, own in noise.items()
    }
    return Losses(sqnr, tensor.empty(), counted.bins())


class _TensorGrids:
    """One grid for all weights, for every number of bits: the min-max grid, and the best one by the counts."""

    def __init__(self, reading: Reading, memory: Pair) -> None:
        self._memory, self._index = memory, Scratch()
        assert reading.moments is not None
        self.mean_abs = reading.moments.mean_abs
        low, high, mean_abs = (torch.tensor(v) for v in (reading.low, reading.high, reading.moments.mean_abs))
        self.scales: dict[int, tuple[Tensor, Tensor]] = {}
        for bits in BITS:
            widest = tables.usable(tables.min_max_scale(low, high, mean_abs, bits).float().reshape(1))[0]
            best = widest if bits == 1 else torch.tensor(tables.best_scale(reading.counts, float(widest), bits))
            self.scales[bits] = widest, best
        self._noise = {bits: [0.0, 0.0] for bits in BITS}
        self._used = {bits: torch.zeros(1 << bits, dtype=torch.bool) for bits in BITS}
        # If both ends of a bucket have the same code, that level is used. With exact counts every bucket is like that.
        self._open = dict.fromkeys(BITS, False)
        for bits, (widest, best) in self.scales.items():
            lowest, highest = (
                tables.rounded(end.float(), widest, bits)[1].to(torch.int32).sub_(_lowest(bits))
                for end in (reading.counts.low, reading.counts.high)
            )
            self._used[bits][lowest[lowest == highest]] = True
            # A bucket is at most as wide as a level, so it touches three levels at most.
            touched = torch.cat([lowest, torch.minimum(lowest + 1, highest), highest])
            self._open[bits] = not bool(self._used[bits][touched].all())
            if reading.counts.whole:
                self._noise[bits] = [tables.noise(reading.counts, scale, bits) for scale in (widest, best)]

    def add(self, x: Tensor) -> None:
        """Add float32 values (n,). Only needed where the counts are not exact."""
        for bits, (widest, best) in self.scales.items():
            error, codes = tables.rounded(x, widest, bits, self._memory)
            if self._open[bits]:
                index = self._index.like(codes, torch.int32).copy_(codes).sub_(_lowest(bits))
                self._used[bits] |= torch.bincount(index, minlength=1 << bits) > 0
            self._noise[bits][0] += _energy(error, widest)
            if best != widest:
                error, _ = tables.rounded(x, best, bits, self._memory)
            self._noise[bits][1] += _energy(error, best)

    def noise(self) -> dict[str, dict[int, float]]:
        """Return the losses. The best range is the better of the two: the search may do worse than min-max."""
        return {
            MIN_MAX: {bits: n[0] for bits, n in self._noise.items()},
            BEST: {bits: min(n) for bits, n in self._noise.items()},
        }

    def empty(self) -> dict[int, float]:
        return {bits: float((~used).double().mean()) for bits, used in self._used.items()}


def _lowest(bits: int) -> int:
    return 0 if bits == 1 else -(1 << (bits - 1))


def _energy(error: Tensor, scale: Tensor) -> float:
    return float(torch.linalg.vector_norm(error)) ** 2 * float(scale) ** 2


class _ChannelGrids:
    """One grid for every channel, for every number of bits, each with several scales."""

    def __init__(self, channels: Ranges, tensor: _TensorGrids, memory: Pair) -> None:
        self._memory = memory
        self._scales: dict[int, Tensor] = {}  # (candidates, channels), the min-max scale first
        for bits in BITS:
            widest = tables.usable(tables.min_max_scale(channels.low, channels.high, channels.mean_abs, bits))
            tried = [widest]
            if bits > 1:
                like = channels.mean_abs * (float(tensor.scales[bits][1]) / (tensor.mean_abs or 1.0))
                tried += [tables.usable(torch.minimum(widest, like * factor)) for factor in AROUND]
            self._scales[bits] = torch.stack(tried)
        self._squares = {bits: torch.zeros_like(scales, dtype=torch.float64) for bits, scales in self._scales.items()}

    def add(self, row: int, part: Tensor) -> None:
        """Add `part`, float32 (channels, some of their weights), which begins at the channel `row`."""
        own = slice(row, row + len(part))
        for bits, scales in self._scales.items():
            for candidate, scale in enumerate(scales):
                error, _ = tables.rounded(part, scale[own, None], bits, self._memory)
                self._squares[bits][candidate, own] += torch.linalg.vector_norm(error, dim=1).double().square()

    def noise(self) -> dict[str, dict[int, float]]:
        """Return the losses summed over the channels. Each channel chooses its own best range."""
        both = {bits: self._scales[bits].double().square() * squares for bits, squares in self._squares.items()}
        return {
            MIN_MAX: {bits: float(n[0].sum()) for bits, n in both.items()},
            BEST: {bits: float(n.amin(0).sum()) for bits, n in both.items()},
        }


class _ChannelCount:
    """Return the histograms of the channels."""

    def __init__(self, shape: tuple[int, ...], reach: float) -> None:
        rows, _ = matrix(shape)
        self._group, self._memory = -(-rows // MAPPED), pair()
        self._step = tables.bin_step(reach, MAP_BINS)
        self._table = torch.zeros(-(-rows // self._group), 2 * MAP_BINS, dtype=torch.int64)

    def add(self, row: int, part: Tensor) -> None:
        index = tables.bin_index(part, self._step, self._memory)
        group = torch.arange(row, row + len(part), dtype=torch.int32) // self._group
        index += (group * 2 * MAP_BINS + MAP_BINS)[:, None]
        self._table += torch.bincount(index.view(-1), minlength=self._table.numel()).view_as(self._table)

    def bins(self) -> ChannelBins:
        used = (self._table.sum(0) > 0).nonzero().squeeze(1)
        first, last = int(used[0]), int(used[-1])
        content = tuple(tuple(line) for line in self._table[:, first : last + 1].tolist())
        return ChannelBins(self._group, self._step, first - MAP_BINS, content)
