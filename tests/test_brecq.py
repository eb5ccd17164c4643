"""BRECQ: a network is its blocks; learning starts at the float weights, and ends on a grid that does better."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_adaround import folded
from torch import Tensor, fx, nn

import r2cli
from r2cli import data
from r2cli.calibration.deployed import network
from r2cli.errors import InputError
from r2cli.graph import structure
from r2cli.graph.read import trace
from r2cli.ptq import brecq, pace, post_training, weight_grids
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage import checkpoint
from r2cli.storage.input_spec import Given
from r2cli.train import evaluation

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net(trained: Path) -> fx.GraphModule:
    return folded(checkpoint.load(trained))


def images(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def nearest(net: fx.GraphModule, bits: int, **options: Any) -> dict[str, Coded]:
    found = {}
    for layer, module in structure.named_layers(net):
        weight = module.weight
        assert isinstance(weight, Tensor)
        grid = weight_grids.weight_grid(weight, bits, **{"per_channel": True, **options})
        found[layer.weight] = Coded(grid, grid.encode(weight))
    return found


@pytest.mark.slow
def test_blocks_of_a_residual_network_end_where_one_value_is_left(net: fx.GraphModule) -> None:
    found = brecq.blocks(net)
    assert [block.layers for block in found] == [
        ("conv", "stages.0.0.conv1", "stages.0.0.conv2"),
        ("stages.1.0.conv1", "stages.1.0.conv2", "stages.1.0.shortcut.0"),
        ("stages.2.0.conv1", "stages.2.0.conv2", "stages.2.0.shortcut.0"),
        ("classifier",),
    ]
    for before, after in zip(found, found[1:], strict=False):
        assert after.entries == (before.nodes[-1],)
    # A cut within the residual block would leave two values.
    assert [block.layers for block in brecq.blocks(net, least=1)][0] == ("conv",)


class Twice(nn.Module):
    """A layer that runs in two blocks, and a factor of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.factor = nn.Parameter(torch.full((4, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shared(self.first(x))) * self.factor
        return self.last((self.shared(x) * self.factor).mean([2, 3]))


@torch.no_grad()
@pytest.mark.parametrize("least", [1, 2])
def test_a_layer_of_two_blocks_has_one_set_of_codes(least: int) -> None:
    torch.manual_seed(0)
    net = trace(Twice().eval(), images(2))
    found = brecq.blocks(net, least)
    assert len(found) == (4 if least == 1 else 2)
    x: Given = images(3)
    for block in found:
        x = brecq.run(net, block, x, {})
    assert isinstance(x, Tensor) and torch.equal(x, net(images(3)))
    counted: list[None] = []
    quick = brecq.BrecqSettings(steps=3, batch=2, least=least)
    coded, biases, _ = brecq.round_network(
        net, images(3), nearest(net, 3), lambda: counted.append(None), settings=quick
    )
    assert set(coded) == {"first.weight", "shared.weight", "last.weight"} and set(biases) == {"first", "shared", "last"}
    assert len(counted) == 3


@pytest.mark.parametrize(("side", "images_a_step"), [(96, 2), (40, 8), (8, 32)], ids=str)
def test_a_step_uses_fewer_images_where_they_are_large(side: int, images_a_step: int) -> None:
    # The second convolution, of stride 2, has a quarter of the first one's outputs, and the last block one a picture.
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 1), nn.Flatten()
    net = trace(nn.Sequential(*layers, nn.Linear(side * side, 2)).eval(), torch.zeros(2, 1, side, side))
    structure.propagate(net, (1, side, side))
    first, last = brecq.blocks(net)
    for block, wanted in ((first, images_a_step), (last, 32)):
        nodes = [node for node in block.nodes if str(node.target) in block.layers]
        assert pace.images_of_a_step(net, nodes, 32, 3200) == wanted


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_learning_starts_at_the_float_layer(bits: int, symmetric: bool, per_channel: bool) -> None:
    if bits == 1 and not symmetric:
        pytest.skip("one bit has no zero point")
    torch.manual_seed(1)
    module = nn.Conv2d(3, 5, 3)
    grid = weight_grids.weight_grid(module.weight.detach(), bits, per_channel=per_channel, symmetric=symmetric)
    one = brecq.learned(module, Coded(grid, grid.encode(module.weight.detach())))
    low, high = (grid.decode(torch.full((5, 1, 1, 1), code)) for code in (grid.lowest, grid.highest))
    soft = one.soft()
    torch.testing.assert_close(soft["weight"], module.weight.clamp(low, high), rtol=0, atol=1e-5)
    assert soft["bias"].equal(module.get_parameter("bias").detach())
    # Nothing learned yet: the nearest codes, but for ties.
    assert one.hard().codes.equal(grid.encode(module.weight.detach()))
    assert one.hard().codec.scale.equal(grid.scale)


def test_a_soft_weight_s_gradients_are_those_of_its_formula() -> None:
    torch.manual_seed(2)
    grid = Grid(torch.tensor([0.25, 0.5]), torch.tensor([0, 0], dtype=torch.int32), 3, signed=True, axis=0)
    module = nn.Linear(4, 2)
    one = brecq.learned(module, Coded(grid, grid.encode(module.weight.detach())))
    seen = torch.randn(2, 4)
    (one.soft()["weight"] * seen).sum().backward()
    h = torch.sigmoid(one.v.detach()) * 1.2 - 0.1
    step = grid.scale.reshape(2, 1)
    slope = 1.2 * torch.sigmoid(one.v.detach()) * (1 - torch.sigmoid(one.v.detach()))
    assert one.v.grad is not None and one.size.grad is not None
    torch.testing.assert_close(one.v.grad, seen * step * slope * ((h > 0) & (h < 1)))
    torch.testing.assert_close(one.size.grad, (seen * one.soft()["weight"].detach()).sum(1))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_blocks_come_nearer_to_the_float_network(net: fx.GraphModule, bits: int) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain, shown = nearest(net, bits), images(64)
    quick = brecq.BrecqSettings(steps=60)
    coded, biases, _ = brecq.round_network(net, shown, plain, settings=quick)
    again, *_ = brecq.round_network(net, shown, plain, settings=quick)
    assert all(coded[name].codes.equal(again[name].codes) for name in coded), "the same seed, the same codes"
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items()), "the float network stays"
    assert list(biases) == [layer.name for layer in structure.layers(net)]

    def error(codes: dict[str, Coded], own: dict[str, Tensor]) -> float:
        state = {name: one.decode() for name, one in codes.items()}
        state |= {f"{name}.bias": tensor for name, tensor in own.items()}
        return float((torch.func.functional_call(net, state, (shown,)) - net(shown)).square().mean())

    assert error(coded, biases) < 0.5 * error(plain, {})
    for name, one in coded.items():
        grid = one.codec
        assert isinstance(grid, Grid) and int(one.codes.min()) >= grid.lowest and int(one.codes.max()) <= grid.highest
        assert bool((grid.scale > 0).all()) and grid.bits == plain[name].codec.bits


def test_where_nothing_is_gained_the_nearest_codes_stay(net: fx.GraphModule) -> None:
    plain = nearest(net, 4)
    hopeless = brecq.BrecqSettings(steps=2, lr=100.0, fine_lr=10.0)
    coded, biases, _ = brecq.round_network(net, images(8), plain, settings=hopeless)
    assert all(coded[name] is plain[name] for name in plain)
    assert all(biases[name].equal(net.get_parameter(f"{name}.bias").detach()) for name in biases)


@pytest.mark.slow
def test_two_bits_give_back_what_rounding_takes(trained: Path) -> None:
    made = checkpoint.load(trained)
    source = data.load("digits", spec=made.input)

    def top1(method: str) -> float:
        shown = [batch for batch, _ in data.calibration(source, 256, CPU, 0)]
        coded, rows = post_training.quantize(made, post_training.PtqSettings(method, 2, 8, "tensor", {}), shown, CPU)
        assert {row.note for row in rows} == ({"bias learned"} if method == "brecq" else {""})
        return evaluation.evaluate(network(coded), source.test, CPU)

    assert top1("brecq") > max(90, top1("none") + 20)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adaround", "brecq"])
def test_more_steps_come_nearer(method: str, trained: Path) -> None:
    made = checkpoint.load(trained)
    source = data.load("digits", spec=made.input)

    def distance(steps: int) -> float:
        config = r2cli.PtqConfig(method=method, weight_bits=2, act_bits="none", steps=steps, calibration=256)
        found = r2cli.quantize(made, source, config)
        assert found.options["steps"] == steps, "it is recorded"
        shown, _ = next(iter(data.calibration(source, 256, CPU, 0)))
        with torch.no_grad():
            return float((found.network(shown) - network(made)(shown)).square().mean())

    assert distance(200) < 0.8 * distance(10)


def test_steps_belong_to_methods_that_learn() -> None:
    with pytest.raises(InputError, match="--steps are those of methods that learn, and dfq only rounds: leave it out"):
        r2cli.PtqConfig(method="dfq", steps=100)


@pytest.mark.parametrize(("numbers", "share"), [(3000, 1.0), (1500, 0.5), (100_000, 1.0), (10, 0.1)], ids=str)
def test_few_outputs_for_many_weights_are_learned_slowly(numbers: int, share: float) -> None:
    assert pace.share_of_rate(numbers, 1000) == pytest.approx(share)
