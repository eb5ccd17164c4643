"""Grids reach no farther than what reads them hears."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import r2cli
from r2cli.data import own
from r2cli.graph import heard
from r2cli.graph.read import trace


class Loud(nn.Module):
    """A convolution far below -3 before a hard swish, whose value another layer may read too."""

    def __init__(self, *, twice: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1), twice
        with torch.no_grad():
            self.first.weight.copy_(torch.linspace(-40, 2, 8).view(8, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        loud = self.first(x)
        return self.second(F.hardswish(loud)) + (self.second(loud) if self.twice else 0)


class Gates(nn.Module):
    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return F.hardsigmoid(a), torch.clamp(b, -1, 5), torch.clamp(c, min=-2), d * F.hardsigmoid(a + c)


def test_what_reads_a_value_says_where_it_is_heard() -> None:
    net = trace(Gates(), tuple(torch.randn(2, 3) for _ in range(4)))
    found = {node.name: heard.ends(net, node) for node in net.graph.nodes}
    assert [found[name] for name in "abcd"] == [
        heard.EVERYTHING,  # the sum reads it too
        (-1, 5),
        heard.EVERYTHING,
        heard.EVERYTHING,  # another value's gate
    ]
    assert found["add"] == (-3.0, 3.0)
    net = trace(Loud(), torch.randn(2, 1, 4, 4))
    assert heard.ends(net, next(node for node in net.graph.nodes if node.name == "first")) == (-3, math.inf)
    net = trace(Loud(twice=True), torch.randn(2, 1, 4, 4))
    assert heard.ends(net, next(node for node in net.graph.nodes if node.name == "first")) == heard.EVERYTHING


def test_a_grid_before_a_hard_swish_begins_at_minus_three(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data, network = own.to_data("f", ([x], [x])), Loud().eval()
    made = r2cli.quantize(network, data)
    grid = made.checkpoint.activations["first"]
    least = float((grid.lowest - grid.zero_point) * grid.scale)
    assert -3 - 2 * float(grid.scale) < least <= -3, "all below gives 0 as it did"
    r2cli.export(made, tmp_path / "model.onnx")
    proof = r2cli.verify(tmp_path / "model.onnx", made, data)
    assert proof.passed and proof.measures["float_sqnr_db"] > 30
    assert made.original is not None
    first = next(value for value in r2cli.compare(made.original, made, data).depth.values if value.name == "first")
    assert first.own > 30 and first.arriving > 30
