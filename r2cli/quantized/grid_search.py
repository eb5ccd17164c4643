"""The grid with the least squared error, for many sets of values at once (such as the channels of a weight).

Values are sorted and summed up once. The error of a grid then needs one look-up for each edge between its levels,
whatever the number of values:

    sum (x - scale * v)^2 over the values = sum x^2 - 2 scale * sum(x v) + scale^2 * sum(v^2)

Here v = code - zero_point of the level nearest to a value, and v is constant between two edges.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 1 << 21  # how many look-ups are in memory together
OCTAVES = 16  # how many times the scale is halved in the search
# For an asymmetric range: the shares of each end that are tried first, and the factors that refine them.
SHARES = tuple(2.0 ** (-step / 4) for step in range(17))
FINER = (2**0.125, 2**0.0625, 2**0.03125)
SAME = 1e-9  # a gain that is a smaller share of the sum of squares than this is rounding, and changes nothing


@dataclass(frozen=True)
class Spread:
    """Sets of values, ascending, with sums over the values below each of them. All are float64."""

    values: Tensor  # (sets, n)
    running: Tensor  # (sets, n + 1): how many values are below, from 0
    moment: Tensor  # (sets, n + 1): their sum, from 0
    square: Tensor  # (sets,): the sum of all squares

    @property
    def reach(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest value of each set and 0, (sets,) each."""
        return self.values[:, 0].clamp_max(0), self.values[:, -1].clamp_min(0)


def spread(values: Tensor, number: Tensor | None = None) -> Spread:
    """Return the `Spread` of `values` (sets, n) in any order; or ascending, with each `number` (sets, n) times."""
    if number is None:
        values = values.double().contiguous().sort(1).values  # torch.searchsorted warns of other layouts
        number = torch.ones_like(values)
    zero = values.new_zeros(len(values), 1)
    weighed = number * values
    running, moment = torch.cat([zero, number.cumsum(1)], 1), torch.cat([zero, weighed.cumsum(1)], 1)
    return Spread(values, running, moment, (weighed * values).sum(1))


def loss(x: Spread, scale: Tensor, zero: Tensor, lowest: int, highest: int) -> Tensor:
    """Return the summed squared error of grids with the codes `lowest` to `highest`, (sets, candidates).

    `scale` and `zero` (zero points) are (sets, candidates) too.
    """
    level = torch.arange(lowest, highest, dtype=torch.float64, device=scale.device)
    parts = []
    step = max(1, AT_ONCE // (len(level) * len(scale)))
    for s, z in zip(torch.split(scale, step, 1), torch.split(zero, step, 1), strict=True):
        below = level - z[:, :, None]  # (sets, candidates, levels): the level beneath each edge
        edge = (s[:, :, None] * (below + 0.5)).flatten(1)
        index = torch.searchsorted(x.values, edge)
        moment, running = (part.gather(1, index).view_as(below) for part in (x.moment, x.running))
        top = highest - z
        # Every value counts v times. Let all have the v of the top level; then take 1 off at each edge for those below.
        linear = top * x.moment[:, -1:] - moment.sum(2)
        square = top.square() * x.running[:, -1:] - ((2 * below + 1) * running).sum(2)
        parts.append(x.square[:, None] - 2 * s * linear + s.square() * square)
    return torch.cat(parts, 1)


def symmetric_scale(x: Spread, start: Tensor, bits: int, octaves: int = OCTAVES) -> Tensor:
    """Return the scale (sets,) of the signed grid with the least error, to 2 %.

    The search goes from `start` (sets,) down, and halves it `octaves` times.
    """
    highest = 2 ** (bits - 1) - 1

    def best(octave: Tensor) -> Tensor:  # of (sets, candidates)
        scale = start.double()[:, None] * 2.0**-octave
        lost = loss(x, scale, torch.zeros_like(scale), -highest - 1, highest)
        return octave.expand(len(start), -1).gather(1, lost.argmin(1, keepdim=True))

    # The error has several minima, so all octaves are tried in steps of a quarter, and only the best one is refined.
    octave = best(torch.arange(0, octaves + 0.1, 0.25, dtype=torch.float64, device=start.device).expand(1, -1))
    for width in (1 / 8, 1 / 16, 1 / 32):
        octave = best(torch.cat([octave - width, octave, octave + width], 1).clamp_min(0))
    return start.double() * 2.0 ** -octave.squeeze(1)


def asymmetric_range(x: Spread, bits: int) -> tuple[Tensor, Tensor]:
    """Return the range (least, greatest), (sets,) each, of the grid with a zero point that has the least error.

    The range contains 0. Both ends are drawn in together, and then each alone, in smaller and smaller steps.
    """
    highest = 2**bits - 1
    ends = torch.stack(x.reach)  # (2, sets)
    kept = torch.ones_like(ends)
    gain = SAME * x.square[:, None]

    def lost(share: Tensor) -> Tensor:  # of (2, sets, candidates)
        low, high = ends[:, :, None] * share
        scale, zero = to_grid(low, high, highest)
        return loss(x, scale, zero, 0, highest)

    def improve(factors: Tensor, which: Tensor) -> None:  # (candidates,), the first 1; (2, 1, 1): ends that move
        share = (kept[:, :, None] * torch.where(which, factors, 1.0)).clamp_max(1)
        error = lost(share)
        error[:, 0] -= gain.squeeze(1)  # the range as it is stays, unless another is really better
        best = error.argmin(1)[None, :, None].expand(2, -1, 1)
        kept.copy_(share.gather(2, best).squeeze(2))

    for factors in (SHARES, *((1.0, 1 / step, step) for step in FINER)):
        tried = torch.tensor(factors, dtype=torch.float64, device=ends.device)
        for which in ((True, True), (True, False), (False, True)):
            improve(tried, torch.tensor(which, device=ends.device)[:, None, None])
    low, high = ends * kept
    return low, high


def to_grid(low: Tensor, high: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the grid with codes 0 to `highest` from `low` <= 0 to `high` >= 0.

    All four have one shape. The value 0 is a level. A range without width has the scale 1.
    """
    scale = (high - low) / highest
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, torch.round(-low / scale).clamp(0, highest)
