"""Grids that follow each other are one, or more than a level apart."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import r2cli
from r2cli.calibration import calibrate
from r2cli.calibration.apart import HALF, LEVEL, Affine, apart
from r2cli.data import own
from r2cli.deploy import engines, likeness
from r2cli.graph.read import trace
from r2cli.quantized.grid import Grid

needs_openvino = pytest.mark.skipif(not engines.ENGINES["openvino"].installed, reason="openvino is not installed")


class Numbers(nn.Module):
    """Products and sums with numbers, a clip, and values side by side."""

    def __init__(self, factor: float, shift: float) -> None:
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.factor + self.shift
        return torch.cat([y.flatten(1), torch.clamp(y, 0, 5).flatten(1)], 1)


def grid(scale: float, zero: int, bits: int = 8) -> Grid:
    return Grid(torch.tensor(scale), torch.tensor(zero, dtype=torch.int32), bits, signed=False)


def far(step: Affine, grids: dict[str, Grid], name: str) -> float:
    return max(map(abs, step.ends(grids, grids[name])))


@pytest.mark.parametrize("start", [0, 3, 200])
def test_no_grid_is_between_half_a_level_and_one_from_the_one_before(start: int) -> None:
    """Whatever a sum shifts codes by, and wherever the range of its result begins."""
    touched = 0
    for shift in (0.06 * levels / 7 for levels in range(-25, 26, 3)):
        net, step = trace(Numbers(0.6, shift), torch.ones(2, 3)), Affine("mul", shift=shift)
        for zero in range(max(0, start - 5), start + 6):
            given = {"mul": grid(0.06, start), "add": grid(0.06, zero), "x": grid(0.1, start)}
            found, bad = apart(net, given), HALF < far(step, given, "add") <= LEVEL
            assert not HALF < far(step, found, "add") <= LEVEL
            assert (found["add"] is not given["add"]) == bad, "what is right stays as it is"
            assert found["x"] is given["x"] and found["mul"] is given["mul"]
            wide = apart(net, given, symmetric=True)
            assert wide["add"].zero_point == zero and not HALF < far(step, wide, "add") <= LEVEL
            touched += bad
    assert touched > 3


def test_codes_are_taken_over_where_zero_is_among_them() -> None:
    net = trace(Numbers(0.6, -0.0645), torch.ones(2, 3))
    found = apart(net, {"mul": grid(0.06, 0), "add": grid(0.06, 2)})
    assert float(found["add"].scale) == pytest.approx(0.06) and found["add"].zero_point == 1
    net = trace(Numbers(0.6, 0.048), torch.ones(2, 3))  # 0 would have the code -1
    found = apart(net, {"mul": grid(0.06, 0), "add": grid(0.06 * 255.8 / 255, 0)})
    assert float(found["add"].scale) == pytest.approx(0.06 * 255.8 / 255 * 257.5 / 255) and found["add"].zero_point == 0


def test_clips_and_values_side_by_side_count_and_other_widths_do_not() -> None:
    net = trace(Numbers(0.6, 0.5), torch.ones(2, 3))
    names = [node.name for node in net.graph.nodes]
    clip, both = (next(name for name in names if name.startswith(what)) for what in ("clamp", "cat"))
    given = {"add": grid(0.02, 1), clip: grid(0.02 * 254.9 / 255, 0, 8), both: grid(0.02 * 255.7 / 255, 1)}
    given[clip] = grid(0.02, 1)
    found = apart(net, given)
    assert found[clip] is given[clip] and float(found[both].scale) > float(given[both].scale)
    assert not HALF < far(Affine("add"), found, both) <= LEVEL
    given[clip] = grid(0.02 * 254.3 / 255, 1)
    found = apart(net, given)
    assert float(found[clip].scale) == pytest.approx(0.02) and found[clip].zero_point == 1
    few = {name: grid(float(one.scale), int(one.zero_point), 4) for name, one in given.items()}
    assert apart(net, few) == few


class Shifted(nn.Module):
    """A convolution whose values a number shifts, and one that hears the sum of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.by = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 4, 1), 0.0
        with torch.no_grad():
            self.first.weight.copy_(torch.linspace(0.1, 1, 8).view(8, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(F.relu(self.first(x)) + self.by)
        return found


@needs_openvino
def test_openvino_keeps_a_shift_of_most_of_a_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network, data = Shifted().eval(), own.to_data("f", ([x], [x]))
    network.by = 0.8 * float(network.first(x).detach().max()) / 255

    def likeness_of(name: str) -> float:
        made = r2cli.quantize(network, data, r2cli.PtqConfig(weight_bits=4))
        r2cli.export(made, tmp_path / name)
        given = {"input": x.numpy()}
        found, usual = (
            engines.ENGINES[each].load(tmp_path / name, 1, False)(given) for each in ("openvino", "onnxruntime")
        )
        return likeness.least(likeness.compared(found, usual, noise_db=30))

    assert likeness_of("apart.onnx") > 60
    monkeypatch.setattr(calibrate, "apart", lambda net, grids, symmetric: dict(grids))
    assert likeness_of("near.onnx") < 50, "else OpenVINO rounds it now, and nothing is to be mended"
