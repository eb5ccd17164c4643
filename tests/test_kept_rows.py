"""Values of all images: on disk they are, bit for bit, what they are in memory, and BRECQ gives the same codes."""

import pytest
import torch
from torch import Tensor, nn

from r2cli.graph.read import trace
from r2cli.ptq import brecq, kept_rows, weight_grids
from r2cli.quantized.coded import Coded


def batches(last: bool) -> list[Tensor]:
    one = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    one = one.contiguous(memory_format=torch.channels_last) if last else one
    return list(one.split(2))


@pytest.mark.parametrize("last", [False, True])
def test_rows_on_disk_are_those_in_memory(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    given, labels = batches(last), list(torch.arange(5).split(2))
    pairs = list(zip(given, labels, strict=True))
    held = kept_rows.gathered(iter(pairs), 5)
    monkeypatch.setattr(kept_rows, "MOST", 100)  # bytes: fewer than the pictures have, and more than their labels
    found = kept_rows.gathered(iter(pairs), 5)
    assert isinstance(found[0], kept_rows.OnDisk) and isinstance(found[1], Tensor)
    assert len(found[0]) == 5 and found[0].numel() == 5 * 24
    for index in (torch.tensor([4, 0, 4]), torch.tensor([2])):
        for one, other in zip(kept_rows.at(found, index), kept_rows.at(held, index), strict=True):
            assert one.equal(other) and one.stride() == other.stride()
    for part, same in zip(kept_rows.parts(found, 3), kept_rows.parts(held, 3), strict=True):
        assert part[0].equal(same[0]) and part[1].equal(same[1])
    assert [len(part[0]) for part in kept_rows.parts(found, 3)] == [3, 2]


@torch.no_grad()
def test_large_values_change_no_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    shown = torch.randn(6, 1, 8, 8)
    net = trace(model, shown[:2])
    nearest = {}
    for name in ("0", "2", "4"):
        weight = net.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        grid = weight_grids.weight_grid(weight, 2, per_channel=True)
        nearest[f"{name}.weight"] = Coded(grid, grid.encode(weight))
    settings = brecq.BrecqSettings(steps=20, batch=4)
    coded, biases, _ = brecq.round_network(net, shown, nearest, settings=settings)
    assert any(not coded[name].codes.equal(nearest[name].codes) for name in nearest)
    monkeypatch.setattr(kept_rows, "MOST", 0)
    again, others, _ = brecq.round_network(net, shown, nearest, settings=settings)
    assert all(again[name].codes.equal(coded[name].codes) for name in nearest)
    assert all(others[name].equal(biases[name]) for name in biases)
    monkeypatch.setattr(brecq, "AT_ONCE", 1)  # bytes: one image at a time, so sums are of another order
    again, others, _ = brecq.round_network(net, shown, nearest, settings=settings)
    for name in nearest:
        assert float((again[name].codes == coded[name].codes).float().mean()) > 0.9
        torch.testing.assert_close(again[name].codec.scale, coded[name].codec.scale, rtol=5e-2, atol=0)
