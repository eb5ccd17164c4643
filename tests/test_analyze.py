"""Every statistic against NumPy in float64 and against really rounding, on random and on hostile tensors."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from r2cli.analysis import layer_table
from r2cli.analysis.advice import advice
from r2cli.analysis.layer_table import AnalyzedLayer, AnalyzeSettings
from r2cli.analysis.rounding_pass import BITS
from r2cli.ptq import weight_grids
from r2cli.storage.stream import from_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)


def row(x: Tensor, **settings: Any) -> AnalyzedLayer:
    return layer_table.row(from_memory("w.weight", x, "memory"), AnalyzeSettings(**settings))


def hostile(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    normal = torch.randn(24, 9, 5, generator=generator, dtype=torch.float64)
    # float64 is read as float32, as it is deployed; eight bits have little room.
    info = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    outlier = 0.02 * normal
    outlier[3, 2, 1] = min(1e20, info.max / 2)
    made = {
        "normal": normal / 5,
        "far from zero": 3 + normal / 100,
        "huge outlier": outlier,
        "subnormal": normal * info.smallest_normal,
        "constant": torch.full((6, 5), 0.3125, dtype=torch.float64),
        "nearly constant": torch.full((600, 5), 1.0, dtype=torch.float64) + (torch.arange(3000).reshape(600, 5) == 7),
        "one channel": normal.reshape(1, -1),
        "one weight each": normal.reshape(-1, 1),
        "zeros": torch.zeros(4, 4, dtype=torch.float64),
        "zeros of both signs": torch.zeros(4, 4, dtype=torch.float64) * torch.where(normal[:4, :4, 0] > 0, 1, -1),
        "a dead channel": normal[:4] * torch.tensor([1.0, 0.0, 2.0, 1.0])[:, None, None],
        "one": torch.full((1, 1), -2.0, dtype=torch.float64),
        "steps": 4 * torch.sign(normal) * (1 + torch.arange(24)[:, None, None] / 8),
    }
    return {name: x.to(dtype) for name, x in made.items()}


QUICK = {"float32 normal", "float32 zeros of both signs", "bfloat16 a dead channel", "float8_e4m3fn one"}


def _case(dtype: torch.dtype, name: str, x: Tensor) -> Any:
    own = f"{str(dtype)[6:]} {name}"
    return pytest.param(x, id=own, marks=() if own in QUICK else pytest.mark.slow)


CASES = [_case(dtype, name, x) for dtype in DTYPES for name, x in hostile(dtype).items()]
PIECES = (1 << 17, 64, 7)


@pytest.mark.slow
@pytest.mark.parametrize("x", CASES)
def test_statistics_are_numpys_whatever_the_pieces(x: Tensor) -> None:
    w = x.float().double().numpy()
    for piece in PIECES:
        found = row(x, piece=piece, sigma=2.5)
        assert (found.count, found.nan, found.inf, found.low, found.high) == (w.size, 0, 0, w.min(), w.max())
        # float64 sums in another order; the spread of what lies far from zero is small against its own size. Of four
        # bytes, torch adds a piece in pairs in float32.
        exact = x.dtype.itemsize <= 2
        noise = (1e-14 if exact else 1e-8) * np.abs(w).max()
        assert found.mean == pytest.approx(w.mean(), rel=1e-12, abs=noise)
        assert found.mean_abs == pytest.approx(np.abs(w).mean(), rel=1e-12 if exact else 1e-6)
        assert found.std == pytest.approx(w.std(), rel=1e-10 if exact else 2e-7, abs=noise if exact else 0)
        if w.min() < w.max():
            outside = np.abs(w - w.mean()) > 2.5 * w.std()
            assert found.outliers == outside.sum() and found.outlier_share == outside.mean()
            assert found.ratio == pytest.approx(np.abs(w).max() / w.std(), rel=1e-9 if exact else 2e-7)
            with np.errstate(under="ignore"):
                kurtosis = (((w - w.mean()) / w.std()) ** 4).mean()
            assert found.kurtosis == pytest.approx(kurtosis, rel=1e-7 if exact else 1e-6)
        else:
            assert (found.std, found.ratio, found.kurtosis, found.outliers) == (0, None, None, 0)
        assert sum(found.histogram.counts) == w.size


@pytest.mark.slow
@pytest.mark.parametrize("x", CASES)
def test_channels_are_numpys_whatever_the_pieces(x: Tensor) -> None:
    w = x.float().reshape(len(x), -1).numpy()
    reach = np.abs(w).max(1)
    for piece in PIECES:
        found = row(x, piece=piece)
        assert found.channels is not None and found.losses is not None
        size = found.channels.group
        assert found.channels.low == tuple(w[at : at + size].min() for at in range(0, len(w), size))
        assert found.channels.high == tuple(w[at : at + size].max() for at in range(0, len(w), size))
        assert [far for _, far in found.channels.drivers] == sorted(reach.tolist(), reverse=True)[:8]
        assert all(reach[channel] == np.float32(far) for channel, far in found.channels.drivers)
        assert found.channels.over_half == (reach > reach.max() / 2).sum()
        lines = found.losses.channels
        assert [sum(line) for line in lines.counts] == [
            w[at : at + lines.group].size for at in range(0, len(w), lines.group)
        ]
        # The channels' bins are unions of the layer's own.
        times = round(lines.step / found.histogram.step)
        merged: dict[int, int] = {}
        for index, number in enumerate(found.histogram.counts):
            bin_ = (found.histogram.first + index) // times
            merged[bin_] = merged.get(bin_, 0) + number
        totals = [sum(column) for column in zip(*lines.counts, strict=True)]
        assert {lines.first + k: n for k, n in enumerate(totals) if n} == {k: n for k, n in merged.items() if n}


def rounded_sqnr(x: Tensor, bits: int, *, per_channel: bool) -> float:
    """Signal to noise in dB of the grid and the codes that `r2 ptq --method none` chooses."""
    grid = weight_grids.weight_grid(x, bits, per_channel=per_channel)
    error = (x.double() - grid.decode(grid.encode(x)).double()).square().sum()
    signal = x.double().square().sum()
    return float(10 * torch.log10(signal / error)) if error > 0 and signal > 0 else math.inf


@pytest.mark.slow
@pytest.mark.parametrize("x", CASES)
def test_sqnr_is_that_of_really_rounding(x: Tensor) -> None:
    w = x.float()
    for piece in (1 << 17, 7):
        found = row(x, piece=piece).losses
        assert found is not None
        for bits in BITS:
            for granularity in ("tensor", "channel"):
                want = rounded_sqnr(w, bits, per_channel=granularity == "channel")
                got = found.sqnr[granularity]["min-max"][bits]
                # Beyond 100 dB what is left is float32's rounding of code * scale, which is not summed here.
                assert min(got, 100) == pytest.approx(min(want, 100), abs=0.01), (granularity, bits)
                assert found.sqnr[granularity]["best"][bits] >= got


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_levels_are_those_without_a_code(dtype: torch.dtype) -> None:
    for name, x in hostile(dtype).items():
        found = row(x, piece=50).losses
        assert found is not None
        for bits in BITS[:-1]:
            grid = weight_grids.weight_grid(x.float(), bits, per_channel=False)
            assert found.empty[bits] == 1 - len(grid.encode(x.float()).unique()) / 2**bits, (name, bits)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_ranges_are_near_the_best_there_are(dtype: torch.dtype) -> None:
    """Against 200 scales for every grid: within 0.1 dB per tensor, and per channel, which tries six, within 1 dB."""
    x = torch.randn(16, 400, generator=torch.Generator().manual_seed(5)) * torch.linspace(0.5, 2, 16)[:, None]
    x[::5, 0] *= 9
    x = x.to(dtype).float()
    found = row(x.to(dtype)).losses
    assert found is not None
    for bits in (8, 4, 3, 2):
        for granularity, slack in (("tensor", 0.1), ("channel", 1.0)):
            grid = weight_grids.weight_grid(x, bits, per_channel=granularity == "channel")
            start = grid.scale.reshape(-1, 1)
            noise = []
            for step in range(200):
                scale = start * 0.98**step
                levels = (x / scale).round().clamp(grid.lowest, grid.highest)
                each = (x - levels * scale).double().square().sum(1)
                noise.append(each if granularity == "channel" else each.sum(0, keepdim=True))
            best = 10 * math.log10(float(x.double().square().sum()) / float(torch.stack(noise).amin(0).sum()))
            assert found.sqnr[granularity]["best"][bits] > best - slack, (granularity, bits)


def test_nan_and_infinities_are_counted_and_nothing_else_is_lost() -> None:
    for dtype in DTYPES[:4]:
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
        x[1, 2], x[3, 4], x[5, 6] = math.nan, math.inf, -math.inf
        found, kept = row(x, piece=50), x.float()[x.float().isfinite()].double().numpy()
        assert (found.nan, found.inf, found.low, found.high) == (1, 2, kept.min(), kept.max())
        assert found.std == pytest.approx(kept.std(), rel=2e-7) and found.losses is None and found.channels is None
        assert sum(found.histogram.counts) == found.count - 3
    lost = row(torch.full((3, 3), math.nan))
    assert (lost.nan, lost.std, lost.ratio, lost.outliers) == (9, None, None, 0)


def test_an_empty_tensor_is_a_row_of_nothing() -> None:
    found = row(torch.zeros(0, 3))
    assert (found.count, found.low, found.std, found.losses, found.channels) == (0, None, None, None, None)


def test_quick_leaves_out_rounding_and_nothing_else() -> None:
    for dtype in DTYPES[:3]:
        x = torch.randn(20, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
        full, quick = row(x), row(x, quick=True)
        assert quick.losses is None and quick.channels is None
        for name in ("low", "high", "mean", "std", "kurtosis", "outliers", "histogram", "saved_bits"):
            assert getattr(full, name) == getattr(quick, name), name


@pytest.mark.slow
def test_outliers_are_exact_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too many values lie far out, or the first piece is no measure of the others, the tensor is read again."""
    x = torch.randn(50, 100, generator=torch.Generator().manual_seed(4))
    x[0] *= 20
    w = x.double().numpy()
    for sigma in (0.5, 2.0, 4.0):
        want = (np.abs(w - w.mean()) > sigma * w.std()).sum()
        for room in (1, 1 << 20):
            monkeypatch.setattr("r2cli.analysis.range_pass.MOST_FAR", room)
            for piece in (100, 1 << 17):
                for order in (x, x.flip(0)):
                    assert row(order, sigma=sigma, piece=piece).outliers == want


@pytest.mark.slow
def test_rows_are_in_order_on_any_number_of_threads_and_progress_is_whole() -> None:
    stored = [from_memory(f"layer{i}", torch.randn(i + 1, 700), "memory") for i in range(20)]
    threads = torch.get_num_threads()
    told: list[int] = []
    one = layer_table.rows(stored, AnalyzeSettings(piece=300), threads=1, advance=told.append)
    assert sum(told) == layer_table.total(stored) == sum(4 * 700 * (i + 1) for i in range(20))
    assert layer_table.rows(stored, AnalyzeSettings(piece=300), threads=4, advance=lambda _: None) == one
    assert [each.layer for each in one] == [each.name for each in stored] and torch.get_num_threads() == threads


def test_layers_and_what_is_none() -> None:
    found = [
        from_memory("conv", torch.zeros(2, 2, 3, 3), ""),
        from_memory("bias", torch.zeros(2), ""),
        from_memory("scalar", torch.tensor(1.0), ""),
        from_memory("ids", torch.zeros(2, 2, dtype=torch.int64), ""),
    ]
    layers, others = layer_table.split(found, everything=False)
    assert [each.name for each in layers] == ["conv"]
    assert {each.name: each.reason for each in others} == {"bias": "vector", "scalar": "scalar", "ids": "integers"}
    layers, others = layer_table.split(found, everything=True)
    assert [each.name for each in layers] == ["conv", "bias"] and len(others) == 2


def test_orders_put_what_hurts_first() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(10, 100, generator=generator)
    outlier = normal.clone()
    outlier[0, 0] = 60
    broken = normal.clone()
    broken[0, 0] = math.nan
    names = {"normal": normal, "outlier": outlier, "broken": broken, "uniform": torch.rand(40, 100) - 0.5}
    found = [layer_table.row(from_memory(name, x, ""), AnalyzeSettings()) for name, x in names.items()]
    for by in ("sqnr", "range", "kurtosis"):
        order = [each.layer for each in layer_table.ordered(found, by)]
        assert order == ["broken", "outlier", "normal", "uniform"], by
    assert layer_table.ordered(found, "size")[1].layer == "uniform"
    assert [each.layer for each in layer_table.ordered(found, "name")] == list(names)


GROWTH = """
import sys
from pathlib import Path
import torch
from r2cli.analysis import layer_table
from r2cli.storage import stream
def resident(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024
settings = layer_table.AnalyzeSettings()
layer_table.row(stream.from_memory("w", torch.zeros(8, 8), ""), settings)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
layer_table.rows(stream.tensors_of_model(Path(sys.argv[1])), settings, threads=2, advance=lambda _: None)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to see the memory")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A file of 128 MB, in two tensors: under 64 MB more than the interpreter with torch holds."""
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": [1024, 1 << 14], "data_offsets": [n << 26, (n + 1) << 26]}
            for n, name in enumerate("ab")
        }
    ).encode()
    path = tmp_path / "large.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (2 << 26))  # zeros, without the disk
    ran = subprocess.run([sys.executable, "-c", GROWTH, str(path)], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 64


# --- advice --------------------------------------------------------------------------------------------------------


def test_advice_follows_from_the_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(32, 100, generator=generator) / 10
    outlier = normal.clone()
    outlier[0, 0] = 8.0
    told = advice([row(outlier)], 4)
    assert "w: 1 of 3,200 weights (0.031 %) sets the range" in told and "--reg margin" in told
    wide = normal * torch.where(torch.arange(32) == 5, 4.0, 1.0)[:, None]
    told = advice([row(wide, sigma=30.0)], 4)
    assert "channel 5 reaches" in told and "--granularity channel" in told
    flat = torch.rand(32, 100, generator=generator) - 0.5
    assert "no layer's range is set by outliers" in advice([row(flat)], 4)
    broken = normal.clone()
    broken[0, :3] = math.nan
    assert "3 NaN and 0 infinite of 3,200" in advice([row(flat), row(broken)], 4)
    assert advice([], 4)
