"""How well a simulation repeats itself, which bounds what a file can be asked for."""

import torch
from torch import nn

from r2cli.calibration.deployed import FakeQuantize
from r2cli.deploy import comparison
from r2cli.quantized.grid import Grid


def test_a_network_without_grids_repeats_itself_to_rounding() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    images = torch.randn(16, 64)
    assert comparison.own_precision(net, images) > 120  # float32 has 24 bits: 144 dB, less what sums lose


def test_a_code_on_the_edge_of_two_costs_a_whole_step() -> None:
    """0.1 is no float: fifteen steps of it are on the edge in float64 and beyond it, or not, in float32."""
    grid = Grid(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), 4, signed=False)
    net = nn.Sequential(FakeQuantize(grid), nn.Identity()).eval()
    edges = torch.arange(15).float().add(0.5).mul(0.1).repeat(4, 1)
    assert comparison.own_precision(net, edges) < 60
    assert next(net.buffers()).dtype == torch.float32  # the network itself stays as it was
