"""QDrop: steps of activations have LSQ's gradient, and chance 1 and 0 are the rounded and the float network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import r2cli
from r2cli.calibration.calibrate import activation_grid
from r2cli.calibration.deployed import FakeQuantize
from r2cli.errors import InputError
from r2cli.graph.read import trace
from r2cli.ptq import brecq, qdrop, weight_grids
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage.input_spec import Given

X = torch.tensor([-3.0, -0.2, 0.1, 0.26, 0.7, 9.0])  # below the range, inside it, and beyond


def test_the_gradient_of_a_step_is_lsq_s() -> None:
    grid = Grid(torch.tensor(0.5), torch.tensor(1, dtype=torch.int32), 2, signed=False)  # -0.5, 0, 0.5, 1
    x, step = X.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
    found = qdrop.rounded(x, grid, step)
    assert found.tolist() == [-0.5, 0.0, 0.0, 0.5, 0.5, 1.0]
    assert found.equal(FakeQuantize(grid)(X.clone()))
    seen = torch.arange(1.0, 7.0)
    (found * seen).sum().backward()
    by_step = [-1.0, 0.4, -0.2, 1 - 0.52, 1 - 1.4, 2.0]  # the code minus x / s inside, the last code outside
    assert step.grad is not None and x.grad is not None
    assert float(step.grad) == pytest.approx(sum(a * b for a, b in zip(by_step, seen.tolist(), strict=True)), abs=1e-5)
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]


def test_a_learned_step_starts_at_its_grid() -> None:
    grid = activation_grid(-1.0, 3.0, 4)
    one = qdrop.start({"a": grid})["a"]
    assert one.hard().scale.equal(grid.scale) and one.hard().zero_point.equal(grid.zero_point)
    one.size.data.fill_(0.1 / qdrop.SLOWNESS)
    assert float(one.hard().scale) == pytest.approx(float(grid.scale) * 1.1051709)


@pytest.mark.parametrize(("probability", "all_rounded"), [(1.0, True), (0.0, False), (0.5, None)])
def test_chance_decides_for_each_element(
    monkeypatch: pytest.MonkeyPatch, probability: float, all_rounded: bool | None
) -> None:
    monkeypatch.setattr(qdrop, "PROBABILITY", probability)
    graph = fx.Graph()
    node, other = graph.placeholder("a"), graph.placeholder("b")
    grids = {"a": activation_grid(-1.0, 3.0, 2)}
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    change = qdrop.by_chance(qdrop.start(grids), torch.Generator().manual_seed(0))
    found, whole = change(node, x), qdrop.on_grids(grids)(node, x)
    assert change(other, x) is x and qdrop.on_grids(grids)(other, x) is x
    share = float((found == whole).float().mean())
    assert bool((found.eq(whole) | found.eq(x)).all())
    assert share == 1 if all_rounded else found.equal(x) if all_rounded is False else abs(share - 0.5) < 0.03


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "adaround", "act_bits": "4"}, "--qdrop belongs to --method brecq, and adaround learns no blocks"),
        ({"method": "brecq"}, "--qdrop is for activations of fewer than 8 bits: give --act-bits 4"),
    ],
)
def test_where_it_cannot_be_done_it_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        r2cli.PtqConfig(qdrop=True, **options)


@pytest.mark.slow
def test_steps_are_learned_where_it_is_asked_for(trained: Path) -> None:
    given = r2cli.PtqConfig(weight_bits=4, act_bits="4", method="brecq", calibration=32, parts="none")
    plain, learned = (r2cli.quantize(trained, "digits:64", replace(given, qdrop=one)) for one in (False, True))
    grids = plain.checkpoint.activations, learned.checkpoint.activations
    assert grids[0].keys() == grids[1].keys() and learned.settings.qdrop
    assert any(not grids[1][name].scale.equal(grid.scale) for name, grid in grids[0].items())
    assert {grid.bits for grid in grids[1].values()} == {4}


@torch.no_grad()
def test_blocks_with_four_bit_activations_come_nearer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3)).eval()
    shown = torch.rand(32, 1, 8, 8)
    net = trace(model, shown[:2])
    nearest: dict[str, Coded] = {}
    for name in ("0", "2", "4"):
        weight = net.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        grid = weight_grids.weight_grid(weight, 3, per_channel=True)
        nearest[f"{name}.weight"] = Coded(grid, grid.encode(weight))
    readers = [node for node in net.graph.nodes if node.op == "call_module" and str(node.target) in "024"]
    entries = [str(node.all_input_nodes[0]) for node in readers]
    grids = {name: activation_grid(0.0, 1.5, 3) for name in entries}  # too wide: the values end before
    settings = brecq.BrecqSettings(steps=60, batch=16)
    coded, biases, moved = brecq.round_network(net, shown, nearest, grids=grids, settings=settings)
    again = brecq.round_network(net, shown, nearest, grids=grids, settings=settings)
    assert all(coded[name].codes.equal(again[0][name].codes) for name in coded), "the same seed, the same codes"
    assert set(moved) == set(grids)
    assert all(float(moved[name].scale) < float(grids[name].scale) for name in entries[1:])

    def error(codes: dict[str, Coded], own: dict[str, Tensor], acts: dict[str, Grid]) -> float:
        states = {name: brecq.state(codes[f"{name}.weight"].decode(), own.get(name)) for name in ("0", "2", "4")}
        states = {name: {"bias": net.get_parameter(f"{name}.bias"), **one} for name, one in states.items()}
        x: Given = shown
        for block in brecq.blocks(net):
            x = brecq.run(net, block, x, states, qdrop.on_grids(acts))
        assert isinstance(x, Tensor)
        return float((x - net(shown)).square().mean())

    assert error(coded, biases, moved) < 0.8 * error(nearest, {}, grids)
