"""Grids of weights: the numeric cases, and every rule per channel and per tensor, with and without zero points."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from r2cli.errors import InputError
from r2cli.ptq import weight_grids

# One outlier takes the range of all others.
OUTLIER = [-0.9, -0.5, -0.4, -0.35, -0.3, -0.2, -0.1, 0, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 3]
WEIGHT = 0.02 * torch.randn(6, 500, generator=torch.Generator().manual_seed(4))
WEIGHT[2] *= 7
WEIGHT[3, 5] = 1.0
WEIGHT[4] += 0.05


def lost(w: Tensor, bits: int, **how: Any) -> Tensor:
    """Mean squared error of each row on its own grid; of all on one, where not per channel."""
    grid = weight_grids.weight_grid(w, bits, **{"per_channel": True, **how})
    return (grid.decode(grid.encode(w)) - w).double().square().mean(1)


def test_one_outlier_of_sixteen() -> None:
    """Scale 1.0 loses 0.08109375 on average; the best of 0.01 to 1.01 in hundredths is 0.91 with 0.07479375."""
    w = torch.tensor([OUTLIER])
    assert float(lost(w, 3)) == pytest.approx(0.08109375, rel=1e-6)
    assert 0.07479375 - 1e-6 <= float(lost(w, 3, rule="mse")) < 0.0755
    assert float(lost(w[:, :-1], 3, rule="mse")) <= 0.0037029 * 1.02


def test_percentiles_of_weights_are_numpys_on_each_side() -> None:
    w = torch.tensor([OUTLIER])
    low, high = np.percentile(OUTLIER, [10, 90])
    grid = weight_grids.weight_grid(w, 3, per_channel=False, rule="percentile:90")
    assert float(grid.scale) == pytest.approx(max(high / 3, -low / 4), rel=1e-6)
    # Of |w| it would be 0.7 / 3.
    assert float(grid.scale) < 0.2
    assert weight_grids.weight_grid(w, 3, per_channel=False, rule="percentile:100").scale == 1.0


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_least_error_is_no_more_than_minmax_and_as_little_as_a_search_finds(bits: int, symmetric: bool) -> None:
    found = lost(WEIGHT, bits, rule="mse", symmetric=symmetric)
    assert bool((found <= lost(WEIGHT, bits, symmetric=symmetric) * (1 + 1e-4)).all())
    if not symmetric:
        assert bool((found <= lost(WEIGHT, bits, rule="mse") * 1.1).all()), "a zero point only helps"
        return
    start = weight_grids.weight_grid(WEIGHT, bits, per_channel=True).scale.double()
    lowest, best = -(2 ** (bits - 1)), torch.full((6,), torch.inf, dtype=torch.float64)
    for share in np.geomspace(0.01, 1, 1000):
        scale = (start * share)[:, None]
        codes = torch.round(WEIGHT / scale).clamp(lowest, -lowest - 1)
        best = torch.minimum(best, (codes * scale - WEIGHT).square().mean(1))
    assert bool((found <= best * 10**0.02).all())  # 0.2 dB: few weights make a rough curve


@pytest.mark.parametrize("rule", ["minmax", "percentile:99", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_channels_know_nothing_of_each_other_and_zero_is_on_every_grid(rule: str, symmetric: bool, bits: int) -> None:
    grid = weight_grids.weight_grid(WEIGHT, bits, per_channel=True, rule=rule, symmetric=symmetric)
    alone = [
        weight_grids.weight_grid(row[None], bits, per_channel=False, rule=rule, symmetric=symmetric) for row in WEIGHT
    ]
    assert torch.allclose(grid.scale, torch.stack([own.scale for own in alone]), rtol=1e-6)
    assert grid.zero_point.tolist() == [int(own.zero_point) for own in alone]
    assert bool((grid.scale > 0).all()) and grid.scale.dtype == torch.float32 and grid.zero_point.dtype == torch.int32
    if bits > 1:
        zeros = torch.zeros(6, 1)
        assert torch.equal(grid.decode(grid.encode(zeros)), zeros)
    codes = grid.encode(WEIGHT)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_channels_have_a_scale(rule: str, symmetric: bool) -> None:
    w = torch.tensor([[0.7, -0.1], [0.0, 0.0], [1e-30, 0.0]])
    grid = weight_grids.weight_grid(w, 4, per_channel=True, rule=rule, symmetric=symmetric)
    assert float(grid.scale.min()) == pytest.approx(float(grid.scale[0]) * 2**-16)
    assert torch.equal(grid.decode(grid.encode(w))[1], w[1])
    nothing = weight_grids.weight_grid(torch.zeros(2, 3), 4, per_channel=True, rule=rule, symmetric=symmetric)
    assert nothing.scale.tolist() == [2**-64, 2**-64]  # next to nothing, whatever the codes are


def test_an_asymmetric_grid_wastes_no_level_on_what_is_not_there() -> None:
    w = torch.rand(4, 50, generator=torch.Generator().manual_seed(1))
    assert bool((lost(w, 4, symmetric=False) < 0.3 * lost(w, 4)).all())


@pytest.mark.parametrize("rule", ["entropy", "percentile:50", "mse:2", "minmx"])
def test_an_unknown_rule_is_refused(rule: str) -> None:
    with pytest.raises(InputError, match="percentile|minmax"):
        weight_grids.weight_range(rule)
