"""Biases on the int32 grid: what rounding them does, and what is made up for."""

import pytest
import torch
from torch import Tensor, fx, nn

from r2cli.calibration import biases, calibrate, deployed
from r2cli.graph import edit, structure
from r2cli.graph.read import trace
from r2cli.ptq import weight_grids
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid

SHAPE = (3, 12, 12)


class Narrow(nn.Module):
    """A depthwise layer between two others, as in a MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.point = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(torch.relu(self.deep(torch.relu(self.stem(x))))).mean([2, 3])


Made = tuple[fx.GraphModule, dict[str, Coded], dict[str, Grid]]


@torch.no_grad()
def made(bits: int, images: Tensor, network: type[Narrow] = Narrow) -> Made:
    """The network with 4-bit weights and values of `bits` on their grids, before its biases are rounded."""
    torch.manual_seed(3)
    net, coded = trace(network().eval(), images[:2]), {}
    for layer, module in structure.named_layers(net):
        grid = weight_grids.weight_grid(module.weight, 4, per_channel=True, symmetric=True)
        coded[layer.weight] = Coded(grid, grid.encode(module.weight))
        module.weight.copy_(coded[layer.weight].decode())
    grids = calibrate.calibrate(net, SHAPE, bits, [images])
    deployed.insert_grids(net, grids)
    return net, coded, grids


@torch.no_grad()
def moved(bits: int, *, corrected: bool) -> float:
    """The mean over the outputs of how far the mean of one moves as the biases are rounded."""
    images = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    net, coded, grids = made(bits, images)
    before = net(images)
    assert not biases.round_biases(net, coded, grids, [images] if corrected else None)
    return float((net(images) - before).mean(0).abs().mean())


def test_a_bias_makes_up_for_the_rounding_of_those_before_it() -> None:
    assert 0 < moved(4, corrected=True) < 0.5 * moved(4, corrected=False)


def test_at_eight_bits_nothing_is_corrected() -> None:
    assert moved(8, corrected=True) == moved(8, corrected=False)


class Summed(Narrow):
    """The same with a number added between two layers: a third of a level of its 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.point(torch.relu(self.deep(torch.relu(self.stem(x)) + 0.0036))).mean([2, 3])


@torch.no_grad()
def test_a_bias_makes_up_for_a_sum_with_a_number() -> None:
    """All of whose codes lose the same part of a level."""
    images = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    far = {}
    for name, given, learned in (("corrected", [images], False), ("not", None, False), ("learned", [images], True)):
        net, coded, grids = made(8, images, Summed)
        steps = 0.0036 / float(grids["add"].scale)
        assert 0.2 < steps < 0.45 and grids["add"].zero_point == 0, "else there is nothing to make up for"
        there = net.get_submodule("grids.add")
        net.set_submodule("grids.add", nn.Identity())
        wanted = net(images).mean(0)
        net.set_submodule("grids.add", there)
        biases.round_biases(net, coded, grids, given, learned=learned)
        far[name] = float((net(images).mean(0) - wanted).abs().mean())
    assert far["learned"] == far["not"] and far["corrected"] < 0.1 * far["not"], far


@torch.no_grad()
@pytest.mark.parametrize("corrected", [True, False])
def test_every_bias_is_on_its_grid(corrected: bool) -> None:
    images = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    net, coded, grids = made(4, images)
    biases.round_biases(net, coded, grids, [images] if corrected else None)
    for layer, module in structure.named_layers(net):
        read = edit.source(net, structure.node_of(net, layer))
        assert read is not None and module.bias is not None
        units = module.bias.double() / (grids[read].scale * coded[layer.weight].codec.scale).double()
        assert float((units - units.round()).abs().max()) < 1e-3, layer.name


class Row(nn.Module):
    """Three convolutions in a row, of which only the first may have codes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@torch.no_grad()
def test_a_layer_that_stays_float_is_followed_as_it_is_after_its_correction() -> None:
    torch.manual_seed(0)
    images = torch.randn(32, *SHAPE)
    net = trace(Row().eval(), images[:2])
    module = structure.layer_module(net, "a")
    grid = weight_grids.weight_grid(module.weight, 4, per_channel=True, symmetric=True)
    coded = {"a.weight": Coded(grid, grid.encode(module.weight))}
    module.weight.copy_(coded["a.weight"].decode())
    grids = calibrate.calibrate(net, SHAPE, 2, [images])
    deployed.insert_grids(net, grids)
    wanted = net(images).mean((0, 2, 3))
    biases.round_biases(net, coded, grids, [images])
    torch.testing.assert_close(net(images).mean((0, 2, 3)), wanted, rtol=0, atol=1e-6)
