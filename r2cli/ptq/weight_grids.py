"""Grids of weights: a rule finds the range, and the range gives the scale and the zero point.

    minmax           from the least to the greatest weight
    percentile[:P]   without (100 - P) % of the weights at each end; P = 99.99 unless given
    mse              the range whose grid has the least squared error

A symmetric grid has zero point 0 and the scale max(greatest / qmax, -least / 2^(b-1)), qmax = 2^(b-1) - 1: measured
better than max|w| / qmax and than max|w| / (qmax + 0.5). At 1 bit the levels are -s and +s with s = mean|w|, the
least-squares pair (Rastegari et al., "XNOR-Net", 2016), whatever the rule.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from r2cli.calibration.observers import PERCENTILE
from r2cli.config import values
from r2cli.quantized import grid_search
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.quantized.value_counts import min_max_scale, usable

Range = tuple[Tensor, Tensor]  # the least and the greatest value of each grid, (grids,)


def _minmax(w: Tensor, bits: int, symmetric: bool) -> Range:
    return w.amin(1), w.amax(1)


def _percentile(percent: float) -> Callable[[Tensor, int, bool], Range]:
    def rule(w: Tensor, bits: int, symmetric: bool) -> Range:
        # So many at each end, and not of |w|: the two tails of a weight may differ.
        ordered = w.sort(1).values
        place = (w.shape[1] - 1) * (100 - percent) / 100
        below, share = int(place), place - int(place)  # interpolated linearly, as NumPy does
        low, high = (x[:, below].lerp(x[:, min(below + 1, w.shape[1] - 1)], share) for x in (ordered, ordered.flip(1)))
        return low, high

    return rule


def _mse(w: Tensor, bits: int, symmetric: bool) -> Range:
    x = grid_search.spread(w)
    if not symmetric:
        return grid_search.asymmetric_range(x, bits)
    scale = grid_search.symmetric_scale(x, min_max_scale(w.amin(1), w.amax(1), w.abs().mean(1), bits), bits)
    return -scale * 2 ** (bits - 1), scale * (2 ** (bits - 1) - 1)


# A rule: takes weights (grids, n), bits, and whether the grid is symmetric, and returns the range of each grid.
RANGES: Mapping[str, Callable[[Tensor, int, bool], Range]] = {
    "minmax": _minmax,
    "percentile": _percentile(PERCENTILE),
    "mse": _mse,
}


def weight_range(rule: str) -> Callable[[Tensor, int, bool], Range]:
    """Return the function of `rule`, such as 'mse' or 'percentile:99.9'. Raises InputError if it is unknown."""
    name, percent = values.range_rule("--weight-range", *RANGES)(rule)
    return RANGES[name] if percent is None else _percentile(percent)


def nearest(w: Tensor, bits: int, *, per_channel: bool, rule: str, symmetric: bool, group: int = 0) -> Coded:
    """The codes of the nearest levels of a weight's grid, or of one for each `group` of inputs."""
    if group:
        grid = grouped_grid(w, bits, group, rule=rule, symmetric=symmetric)
    else:
        grid = weight_grid(w, bits, per_channel=per_channel, rule=rule, symmetric=symmetric)
    return Coded(grid, grid.encode(w))


def grouped_grid(w: Tensor, bits: int, group: int, *, rule: str = "minmax", symmetric: bool = True) -> Grid:
    """Make the grids of a weight (outputs, inputs): one for each `group` neighbouring inputs of each output."""
    outputs, inputs = w.shape
    places = torch.arange(-(-inputs // group) * group).clamp_max(inputs - 1)  # the last one fills up the last group
    rows = w[:, places].reshape(-1, group)
    found = weight_grid(rows, bits, per_channel=True, rule=rule, symmetric=symmetric)
    scale, zero = (each.reshape(outputs, -1) for each in (found.scale, found.zero_point))
    return replace(found, scale=scale, zero_point=zero, group=group, inputs=inputs)


def weight_grid(w: Tensor, bits: int, *, per_channel: bool, rule: str = "minmax", symmetric: bool = True) -> Grid:
    """Make the grid of a weight (channels, ...): one for the tensor, or one per output channel (axis 0)."""
    flat = w.detach().reshape(w.shape[0], -1) if per_channel else w.detach().reshape(1, -1)
    low, high = weight_range(rule)(flat, bits, symmetric)
    if symmetric or bits == 1:
        scale = usable(min_max_scale(low, high, flat.abs().mean(1), bits).float())
        zero = torch.zeros_like(scale, dtype=torch.int32)
    else:
        # The range must hold 0, and 0 must be a level: pruned weights stay pruned.
        low, high = low.double().clamp_max(0), high.double().clamp_min(0)
        scale = usable(((high - low) / (2**bits - 1)).float())
        zero = torch.round(-low / scale).clamp(0, 2**bits - 1).int() - 2 ** (bits - 1)
    if not per_channel:
        scale, zero = scale.squeeze(0), zero.squeeze(0)
    return Grid(scale, zero, bits, signed=True, axis=0 if per_channel else None, midrise=bits == 1)
