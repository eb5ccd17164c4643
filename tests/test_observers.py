"""What watches activations: ranges from streams, whatever their order and pieces, and no value kept."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r2cli.calibration import calibrate, observers
from r2cli.calibration.observers import OBSERVERS, Observer, observer
from r2cli.errors import InputError
from r2cli.quantized import grid_search

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
BATCHES = st.lists(st.lists(FLOATS, min_size=1, max_size=6), min_size=1, max_size=3)
SPREAD = torch.randn(4000, generator=torch.Generator().manual_seed(2))


def watched(rule: str, *batches: Tensor) -> Observer:
    watch = observer(rule)()
    for batch in batches:
        assert watch(batch) is batch
    return watch


def noise(x: Tensor, low: float, high: float, bits: int) -> float:
    grid = calibrate.activation_grid(low, high, bits)
    return float((grid.decode(grid.encode(x)) - x).double().square().sum())


@pytest.mark.slow
@settings(max_examples=30)
@given(BATCHES)
def test_a_histogram_that_grew_is_the_one_that_knew_its_range(batches: list[list[float]]) -> None:
    """However small the first values were: merging bins in pairs loses and spreads nothing."""
    parts = [torch.tensor(batch) for batch in batches]
    grown, at_once = watched("mse", *parts), watched("mse", torch.cat(parts))
    assert isinstance(grown, observers.Histogram) and isinstance(at_once, observers.Histogram)
    assert grown.step == at_once.step and math.log2(grown.step).is_integer()
    assert int(grown.counts.sum()) == sum(map(len, parts))
    # A value that float32 cannot tell from the edge of a bin may lie on either side of it.
    moved = (grown.counts - at_once.counts).flatten().cumsum(0)
    edges = (torch.arange(-observers.BINS, observers.BINS) + 1)[moved != 0].double() * grown.step
    for edge in edges:
        assert float((torch.cat(parts).double() - edge).abs().min()) <= 1e-6 * grown.step * observers.BINS


@pytest.mark.slow
@settings(max_examples=30)
@given(BATCHES, st.sampled_from(sorted(OBSERVERS)), st.sampled_from([8, 6, 4]))
def test_every_range_makes_a_grid_within_what_was_seen(batches: list[list[float]], rule: str, bits: int) -> None:
    parts = [torch.tensor(batch) for batch in batches]
    low, high = watched(rule, *parts).range(bits)
    every = torch.cat(parts)
    assert min(0.0, float(every.min())) * (1 + 1e-6) <= min(low, 0.0)
    assert max(0.0, float(every.max())) * (1 + 1e-6) >= max(high, 0.0)
    assert float(calibrate.activation_grid(low, high, bits).scale) > 0


def test_minmax_is_the_extremes_and_a_moving_average_lags_behind() -> None:
    batches = [torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 2.0])]
    assert watched("minmax", *batches).range(8) == (-1.0, 2.0)
    # 0.9 times the first batch's ends and 0.1 times the second's.
    assert watched("moving-average", *batches).range(8) == pytest.approx((-0.1, 1.1))


@pytest.mark.parametrize("percent", [99.9, 99, 90, 60])
def test_percentiles_leave_their_share_at_each_end(percent: float) -> None:
    low, high = watched(f"percentile:{percent}", *SPREAD.split(999)).range(8)
    left_out, bin_, ordered = round(len(SPREAD) * (100 - percent) / 100), 8 / observers.BINS, SPREAD.sort().values
    for end, values in ((low, ordered), (-high, -ordered.flip(0))):
        assert values[left_out - 1] - bin_ <= end <= values[left_out] + bin_
    # Two-sided: of |x| it is another number.
    assert abs(high - np.percentile(SPREAD.abs().numpy(), percent)) > 0.1


def test_the_hundredth_percentile_is_minmax() -> None:
    assert watched("percentile:100", SPREAD).range(8) == watched("minmax", SPREAD).range(8)


@pytest.mark.parametrize("rule", ["percentile:50", "percentile:101", "percentile:x", "percentile:nan", "mse:3", "mean"])
def test_a_rule_that_is_none_is_refused_before_any_work(rule: str) -> None:
    with pytest.raises(InputError, match="percentile"):
        observer(rule)()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", ["relu", "signed", "outlier", "lopsided"])
def test_least_error_is_as_small_as_a_thousand_ranges_find(kind: str, bits: int) -> None:
    x = {
        "relu": SPREAD.relu(),
        "signed": SPREAD,
        "outlier": torch.cat([SPREAD.relu(), torch.tensor([40.0])]),
        "lopsided": torch.where(SPREAD < 0, 0.1 * SPREAD, SPREAD),
    }[kind]
    low, high = watched("mse", *x.split(700)).range(bits)
    ends = float(x.min()), float(x.max())
    shares = np.linspace(0.05, 1, 20)
    tried = min(noise(x, a * ends[0], b * ends[1], bits) for a in shares for b in shares)
    assert 10 * math.log10(noise(x, low, high, bits) / tried) < 0.15  # dB


def test_entropy_keeps_the_bulk_and_drops_the_tail() -> None:
    x = torch.cat([SPREAD.relu(), torch.full((2,), 60.0)])
    low, high = watched("entropy", *x.split(900)).range(8)
    assert low == 0 and 2.5 < high < 15
    # Of a uniform distribution nothing can be dropped.
    assert watched("entropy", torch.rand(4000)).range(8)[1] > 0.97


SPIKES = {
    "zeros and ones": ((torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.3).float(), (0, 1)),
    "behind a ReLU6": ((4 * SPREAD + 6).clamp(0, 6), (0, 6)),
    "a constant": (torch.full((4000,), 5.0), (0, 5)),
    "mostly ones": (torch.cat([torch.ones(9000), torch.arange(1000) / 1000]), (0, 1)),
    "signs": (SPREAD.sign(), (-1, 1)),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", SPIKES)
def test_entropy_keeps_the_greatest_value_where_many_values_are_it(name: str, bits: int) -> None:
    values, ends = SPIKES[name]
    assert watched("entropy", *values.split(999)).range(bits) == ends


def test_memory_does_not_grow_with_what_was_seen() -> None:
    watch = observer("mse")()
    sizes = set()
    for batch in SPREAD.split(1000):
        watch(batch)
        sizes.add(sum(value.numel() for value in vars(watch).values() if isinstance(value, Tensor)))
    assert sizes == {2 * observers.BINS}


@pytest.mark.parametrize("rule", sorted(OBSERVERS))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_remembered(rule: str, bad: float) -> None:
    watch = watched(rule, torch.tensor([1.0]), torch.tensor([bad, 1.0]), torch.tensor([2.0]))
    assert not watch.finite


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_sorted_error_is_that_of_really_rounding(bits: int) -> None:
    """sum (x - scale * (clip(round(x / scale) + z) - z))^2, for several sets, scales and zero points."""
    x = SPREAD[:600].view(3, 200).double()
    scale = torch.tensor([[0.01, 0.3, 1.7]]).double().repeat(3, 1) * torch.tensor([[1.0], [2.0], [0.5]])
    for lowest, zeros in ((0, [0, 1, 2**bits - 1]), (-(2 ** (bits - 1)), [0, 0, 0])):
        zero = torch.tensor([zeros] * 3).double()
        found = grid_search.loss(grid_search.spread(x), scale, zero, lowest, lowest + 2**bits - 1)
        s, z, v = scale[:, :, None], zero[:, :, None], x[:, None, :]
        codes = (torch.round(v / s) + z).clamp(lowest, lowest + 2**bits - 1) - z
        assert torch.allclose(found, (v - s * codes).square().sum(2), rtol=1e-9)


@pytest.mark.parametrize(("low", "high"), [(-0.5, 254.5), (-254.5, 0.5), (-0.5 - 1e-4, 254.5), (-1.0, 1.0)])
def test_values_in_the_middle_of_two_levels_get_levels_to_both_sides_of_zero(low: float, high: float) -> None:
    grid = calibrate.activation_grid(low, high, 8)
    first, last = (float(grid.decode(torch.tensor(code, dtype=torch.int32))) for code in (0, 255))
    assert first <= low and last >= high and float(grid.scale) < 1.01 * (high - low) / 255
    pixels = torch.linspace(low, high, 256, dtype=torch.float64) / grid.scale
    assert int(((pixels % 1 - 0.5).abs() < calibrate.IN_THE_MIDDLE).sum()) <= 2
