"""AdaRound: numbers worked out beforehand, gradients against autograd, and layers whose best rounding is known."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from r2cli import data
from r2cli.calibration import deployed
from r2cli.graph import batchnorm, structure
from r2cli.graph.operators import LayerModule
from r2cli.graph.read import trace
from r2cli.ptq import adaround, layer_sweep, post_training, ptq_method, weight_grids
from r2cli.ptq.layer_sweep import MEMORY, LayerSample, images_that_fit, sweep
from r2cli.ptq.ptq_method import PtqMethod, Rounded
from r2cli.quantized.channels import per_channel
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage import checkpoint
from r2cli.storage.input_spec import Given, count
from r2cli.train import evaluation

CPU = torch.device("cpu")
Bound = float | str | None
BOUNDS: tuple[Bound, ...] = (None, torch.inf, 6.0, "channels")
# Four weights on a grid of a quarter: floors 1, -2, 0, 3.
WEIGHTS, SCALE = torch.tensor([[0.26, -0.41, 0.05, 0.98]], dtype=torch.float64), 0.25


def rectified(v: Tensor) -> Tensor:
    return adaround.stretched(v)[1].clamp(0, 1)


def pushed(v: Tensor, beta: float) -> Tensor:
    return (1 - (2 * rectified(v) - 1).abs() ** beta).sum()


def test_rounding_starts_where_the_weight_is() -> None:
    fraction = WEIGHTS / SCALE - (WEIGHTS / SCALE).floor()
    v = adaround.start(fraction)
    expected = torch.tensor([[-2.0243817645, -0.4754236967, -1.0986122887, 1.7346010554]], dtype=torch.float64)
    torch.testing.assert_close(v, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(rectified(v), fraction, rtol=1e-9, atol=0)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    h = rectified(zero)
    h.sum().backward()
    assert float(h.detach()) == pytest.approx(0.5)
    assert zero.grad is not None and float(zero.grad) == pytest.approx(0.3)


@pytest.mark.parametrize(("beta", "value"), [(20, 3.7806796694), (8, 3.2220712956), (2, 2.0096)])
def test_the_push_to_whole_numbers(beta: float, value: float) -> None:
    v = adaround.start(WEIGHTS / SCALE - (WEIGHTS / SCALE).floor()).requires_grad_()
    gradient = adaround.push(*adaround.stretched(v.detach()), beta)
    assert float(pushed(v.detach(), beta)) == pytest.approx(value, rel=1e-6)
    pushed(v, beta).backward()
    torch.testing.assert_close(gradient, v.grad, rtol=1e-9, atol=1e-12)
    if beta == 2:
        expected = torch.tensor([[0.4550933333, 0.3177066667, 0.54, -0.51408]], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def test_nothing_pushes_what_is_whole() -> None:
    v = torch.tensor([-5.0, 5.0, 2.39789527 + 1e-6], dtype=torch.float64)  # saturated from ln 11 on
    gradient = adaround.push(*adaround.stretched(v), 4.0)
    assert float(pushed(v, 4.0)) == 0 and gradient.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("steps", "beta"), [(4000, 17.363961), (6000, 11.0), (8000, 4.636039), (10000, 2.0)])
def test_beta_falls_along_half_a_cosine(steps: int, beta: float) -> None:
    assert adaround.beta_at((steps - 2000) / 8000) == pytest.approx(beta, rel=1e-6)


# --- rows and gradients ----------------------------------------------------------------------------------------------

CONVS = [
    *(nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), nn.Conv2d(6, 4, 1)),
    *(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, (3, 1), padding=(2, 0), dilation=(2, 1), groups=2)),
    *(nn.Conv2d(6, 4, 3, padding="same"), nn.Conv1d(6, 4, 3, stride=2, padding=1), nn.Linear(6, 4)),
]


def inputs_of(module: LayerModule) -> Tensor:
    shape = (5, 6) if isinstance(module, nn.Linear) else (5, 6, 9) if isinstance(module, nn.Conv1d) else (5, 6, 9, 8)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def limits(bound: Bound, *shape: int) -> Tensor | None:
    """The bound of a ReLU: none, one number, or one for each channel, of `shape`."""
    if bound == "channels":
        return torch.linspace(0.5, 4, math.prod(shape)).reshape(shape)
    return None if bound is None else torch.tensor(float(bound))


def seen(module: LayerModule, bound: Bound = None) -> LayerSample:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = inputs_of(module)
    layer = structure.Layer("layer", "layer", None)
    channels = module(x).shape[-1 if isinstance(module, nn.Linear) else 1]
    return LayerSample(
        layer,
        module,
        limits(bound, channels),
        x,
        x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)),
    )


@torch.no_grad()
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("module", CONVS, ids=str)
def test_rows_are_the_layer_at_its_places(module: LayerModule, bound: Bound) -> None:
    one = seen(module, bound)
    rows = adaround.sample_rows(one, adaround.AdaroundSettings(rows=10**6))
    weight = module.weight
    assert isinstance(weight, Tensor)
    outputs = rows.inputs @ weight.reshape(rows.inputs.shape[0], -1, rows.inputs.shape[2]).transpose(1, 2)
    outputs = rows.act(outputs if rows.bias is None else outputs + rows.bias)

    def act(y: Tensor) -> Tensor:
        return y if one.bound is None else y.relu().minimum(per_channel(one.bound, y.ndim - 1))

    wanted, reference = act(module(one.rounded_inputs)), act(module(one.inputs))
    # All places once, in a random order: sums agree to float32's rounding, and the pairing through the squared error.
    assert rows.inputs.shape[1] * rows.targets.shape[0] * rows.targets.shape[2] == wanted.numel()
    assert float(outputs.sum()) == pytest.approx(float(wanted.sum()), rel=1e-4)
    assert float(rows.targets.sum()) == pytest.approx(float(reference.sum()), rel=1e-4)
    paired = float((outputs - rows.targets).square().sum())
    assert paired == pytest.approx(float((wanted - reference).square().sum()), rel=1e-4)
    assert adaround.output_error(rows, weight) == pytest.approx(paired / rows.inputs.shape[1], rel=1e-4)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("groups", [1, 3])
def test_the_slope_is_autograd_s(groups: int, bound: Bound) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, targets, bias, weight = (
        torch.randn(shape, generator=draw, dtype=torch.float64) * 3
        for shape in ((groups, 40, 5), (groups, 40, 2), (groups, 1, 2), (groups, 2, 5))
    )
    rows = adaround.Rows(inputs, targets, bias, limits(bound, groups, 1, 2))
    index = torch.arange(0, 40, 2)
    weight.requires_grad_()
    outputs = rows.act(inputs[:, index] @ weight.transpose(1, 2) + bias)
    ((outputs - targets[:, index]).square().sum(2).mean(1)).sum().backward()
    torch.testing.assert_close(adaround.error_slope(rows, index, weight.detach()), weight.grad, rtol=1e-10, atol=1e-10)


# --- layers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def linear(weights: Tensor, inputs: Tensor, bits: int, scale: float) -> tuple[LayerSample, Coded]:
    module = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    module.weight.copy_(weights)
    grid = Grid(torch.tensor(scale), torch.tensor(0, dtype=torch.int32), bits, signed=True)
    return LayerSample(structure.Layer("l", "l", None), module, None, inputs, inputs), Coded(
        grid, grid.encode(module.weight)
    )


@pytest.mark.slow
def test_weights_that_are_read_together_are_rounded_together() -> None:
    # Inputs that move together: each weight is nearest to 0, and only two of four rounded up give the sum.
    weights = torch.tensor([[0.45, 0.42, 0.38, 0.35]])
    inputs = 1 + 0.1 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    one, nearest = linear(weights, inputs, 8, 1.0)

    def error(codes: Tensor) -> float:
        return float((inputs @ (codes.float() - weights).T).square().mean())

    best = min((torch.tensor([ups]) for ups in itertools.product((0, 1), repeat=4)), key=error)
    assert nearest.codes.tolist() == [[0, 0, 0, 0]] and error(best) < 0.1 * error(nearest.codes)
    thorough = adaround.AdaroundSettings(steps=1000, lr=0.02)  # slow: four weights have no others to make up for them
    chosen = adaround.round_layer(one, nearest, thorough)
    # Two of four, though not the very best pair: relaxation is no search. The pairs differ by a fifth, others by half.
    assert int(chosen.codes.sum()) == 2 and error(chosen.codes) < 1.2 * error(best)
    assert adaround.round_layer(one, nearest, thorough).codes.equal(chosen.codes), "the same seed, the same codes"


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_are_floors_or_ceilings_and_never_worse(bits: int, per_channel: bool) -> None:
    module = nn.Conv2d(6, 8, 3, padding=1)
    one = seen(module, torch.inf)
    grid = weight_grids.weight_grid(module.weight, bits, per_channel=per_channel)
    nearest = Coded(grid, grid.encode(module.weight))
    chosen = adaround.round_layer(one, nearest, adaround.AdaroundSettings(steps=300))
    real = grid.unrounded(module.weight.detach())
    low, high = real.floor().clamp(grid.lowest, grid.highest), real.ceil().clamp(grid.lowest, grid.highest)
    codes = chosen.codes.to(real.dtype)
    assert bool(((codes == low) | (codes == high)).all()) and chosen.codec is grid
    assert chosen.codes.dtype == nearest.codes.dtype
    rows = adaround.sample_rows(one, adaround.AdaroundSettings(rows=10**6))
    before, after = (adaround.output_error(rows, c.decode()) for c in (nearest, chosen))
    assert after <= before
    if bits < 8:
        assert after < 0.97 * before


# --- the sweep -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(trained: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(trained)


def folded(made: checkpoint.Checkpoint) -> torch.fx.GraphModule:
    net = trace(deployed.network(made), made.input.blank(2))
    factors = batchnorm.remove_norms(net)
    with torch.no_grad():
        for layer, module in structure.named_layers(net):
            if layer.name in factors:
                module.weight *= factors[layer.name].float().reshape(-1, 1, 1, 1)
    return net


@pytest.mark.slow
@torch.no_grad()
def test_a_sweep_sees_both_networks_inputs_and_changes_nothing(made: checkpoint.Checkpoint) -> None:
    net = folded(made)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    visited: list[LayerSample] = []

    def visit(one: LayerSample) -> tuple[Coded, Tensor | None]:
        visited.append(one)
        weight = one.module.weight
        assert isinstance(weight, Tensor)
        grid = weight_grids.weight_grid(weight, 3, per_channel=True)
        return Coded(grid, grid.encode(weight)), one.module.bias

    coded, biases = sweep(net, images, visit)
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())
    assert [one.layer.name for one in visited] == [layer.name for layer in structure.layers(net)] == list(biases)
    assert visited[0].inputs is visited[0].rounded_inputs is images
    inner = trace(deployed.network(made), made.input.blank(2))
    assert visited[0].bound == torch.inf and visited[2].bound is None, "a ReLU after the stem, none before a sum"
    last = visited[-1]
    classifier = last.module
    assert torch.allclose(classifier(last.inputs), net(images), atol=1e-5)
    for layer, module in structure.named_layers(net):
        module.weight.copy_(coded[layer.weight].decode())
    rounded = classifier(last.rounded_inputs)
    assert torch.allclose(rounded, net(images), atol=1e-5) and len(inner.graph.nodes) > 0


@pytest.mark.slow
def test_fewer_images_are_taken_where_memory_is_short(
    made: checkpoint.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = folded(made)
    plenty = images_that_fit(net, (1, 8, 8))
    monkeypatch.setattr(layer_sweep, "MEMORY", MEMORY // 1024)
    few = images_that_fit(net, (1, 8, 8))
    assert plenty > 50_000 and abs(few - plenty / 1024) <= 1
    # The widest place: the stem's 16 maps of 8x8, the ReLU's, and a convolution's, in float32 and twice.
    assert few == MEMORY // 1024 // (2 * 3 * 4 * 16 * 64)


@pytest.mark.parametrize(("method", "seen"), [("adaround", 10), ("brecq", 64)])
def test_what_a_method_cannot_look_at_is_said(
    method: str, seen: int, made: checkpoint.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method for one layer at a time keeps values in memory; one for the whole network keeps them on disk."""
    given: list[int] = []

    def whole(net: fx.GraphModule, images: Given, nearest: Mapping[str, Coded], *_: object) -> Rounded:
        given.append(count(images))
        return dict(nearest), {}, {}

    def rounds(sample: LayerSample, coded: Coded) -> Coded:
        given.append(count(sample.inputs))
        return coded

    own = PtqMethod(rounds=rounds) if method == "adaround" else PtqMethod(whole=whole)
    monkeypatch.setattr(ptq_method, "method", lambda *_: own)
    monkeypatch.setattr(layer_sweep, "images_that_fit", lambda *_: 10)
    images, told = [torch.randn(32, 1, 8, 8), torch.randn(32, 1, 8, 8)], list[str]()
    settings = post_training.PtqSettings(method, 4, 8, "channel", {})
    post_training.quantize(made, settings, images, CPU, tell=told.append)
    assert set(given) == {seen}
    assert [each.partition(":")[0] for each in told] == ["weights are rounded by 10 of the images"][: seen == 10]
    monkeypatch.setattr(layer_sweep, "MEMORY", 40 * 4 * 64)  # for the inputs of 40 images
    given.clear()
    told.clear()
    post_training.quantize(made, settings, images, CPU, tell=told.append)
    assert set(given) == {min(seen, 40)} and len(told) == 1


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "unfolded"])
def test_adaround_gives_back_what_rounding_takes(made: checkpoint.Checkpoint, granularity: str) -> None:
    source = data.load("digits", spec=made.input)

    def top1(method: str) -> float:
        images = [batch for batch, _ in data.calibration(source, 256, CPU, 0)]
        coded, rows = post_training.quantize(
            made, post_training.PtqSettings(method, 2, 8, granularity, {}), images, CPU
        )
        assert len(rows) == 10 and len(coded.coded) == 10
        return evaluation.evaluate(deployed.network(coded), source.test, CPU)

    plain, better = top1("none"), top1("adaround")
    assert better > 75 and better > plain + 20


def test_a_layer_s_patches_are_unfold_s() -> None:
    conv = nn.Conv2d(3, 2, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 7, 7)
    out = conv(x).shape[2:]
    every = adaround.patches(x, conv, out, torch.arange(2 * out[0] * out[1]))
    unfolded = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(1, -1, 27)
    assert every.equal(unfolded)
