"""Post-training quantization: ranges, granularities, biases, exceptions, dead channels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r2cli import data
from r2cli.calibration import calibrate, deployed, observers
from r2cli.errors import InputError, R2Error
from r2cli.graph import batchnorm, edit, placement, structure
from r2cli.graph.read import trace
from r2cli.ptq import post_training, weight_grids
from r2cli.quantized.grid import Grid
from r2cli.storage import checkpoint
from r2cli.train import evaluation

CPU = torch.device("cpu")
# 16 weights: one outlier takes the range of all others.
OUTLIER = [-0.9, -0.5, -0.4, -0.35, -0.3, -0.2, -0.1, 0, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 3]


def _settings(
    bits: int, granularity: str = "channel", act_bits: int | None = 8, **keep: int
) -> post_training.PtqSettings:
    return post_training.PtqSettings("none", bits, act_bits, granularity, keep)


def _quantize(
    made: checkpoint.Checkpoint, settings: post_training.PtqSettings
) -> tuple[checkpoint.Checkpoint, list[post_training.QuantizedLayer]]:
    source = data.load("digits", spec=made.input)
    images = [batch for batch, _ in data.calibration(source, 256, CPU, 0)]
    return post_training.quantize(made, settings, images, CPU)


@pytest.fixture(scope="module")
def float_one(trained: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(trained)


@pytest.mark.parametrize(
    ("weights", "bits", "scale"),
    [
        ([0.5, -1.25, 0.25, 1.0], 4, max(1.0 / 7, 1.25 / 8)),
        ([0.5, -1.25, 0.25, 1.0], 2, max(1.0 / 1, 1.25 / 2)),
        ([0.5, -1.25, 0.25, 1.0], 8, max(1.0 / 127, 1.25 / 128)),
        ([0.5, -1.25, 0.25, 1.0], 1, 0.75),
        (OUTLIER, 3, 1.0),
        (OUTLIER[:-1], 3, 0.225),
        ([0.0, 0.0], 4, 2.0**-64),
    ],
)
def test_the_scale_rule(weights: list[float], bits: int, scale: float) -> None:
    grid = weight_grids.weight_grid(torch.tensor([weights]), bits, per_channel=False)
    assert float(grid.scale) == pytest.approx(scale, rel=1e-6)
    assert grid.midrise == (bits == 1)


def test_one_outlier_costs_a_factor_of_twenty() -> None:
    # The MSE at scale 1.0; without the outlier its max|w|/3 gives 0.0058333.
    w = torch.tensor([OUTLIER])
    grid = weight_grids.weight_grid(w, 3, per_channel=False)
    assert float((grid.decode(grid.encode(w)) - w).square().mean()) == pytest.approx(0.08109375, rel=1e-5)


def test_a_dead_channel_has_a_scale_that_its_bias_survives() -> None:
    w = torch.tensor([[0.7, -0.1], [0.0, 0.0], [1e-30, 0.0]])
    scale = weight_grids.weight_grid(w, 4, per_channel=True).scale
    assert scale[1] == scale[2] == scale[0] * 2**-16


@pytest.mark.parametrize(
    ("low", "high", "zero"), [(0.0, 6.0, 0), (-1.0, 1.0, 128), (-3.0, -1.0, 255), (2.0, 4.0, 0), (0.0, 0.0, 0)]
)
def test_activation_grids_hold_zero_exactly_and_reach_both_ends(low: float, high: float, zero: int) -> None:
    grid = calibrate.activation_grid(low, high, 8)
    assert int(grid.zero_point) == zero
    ends = torch.tensor([0.0, low, high])
    decoded = grid.decode(grid.encode(ends))
    assert decoded[0] == 0.0
    # Half a step, and as much again for the zero point's own rounding.
    assert float((decoded - ends).abs().max()) <= float(grid.scale)


def test_no_pixel_from_minus_one_to_one_lies_in_the_middle_of_two_levels() -> None:
    pixels = torch.arange(256, dtype=torch.float64) / 255 * 2 - 1
    grid = calibrate.activation_grid(-1.0, 1.0, 8)
    away = (pixels / float(grid.scale)) % 1 - 0.5
    assert float(away.abs().min()) > 1e-3  # 0 of each, where the step is 2/255
    assert float((grid.decode(grid.encode(pixels.float())) - pixels).abs().max()) < float(grid.scale) / 2


@pytest.mark.slow
@pytest.mark.parametrize("granularity", post_training.GRANULARITIES)
def test_eight_bits_cost_next_to_nothing(float_one: checkpoint.Checkpoint, granularity: str) -> None:
    coded, rows = _quantize(float_one, _settings(8, granularity))
    source = data.load("digits", spec=float_one.input)
    before = evaluation.evaluate(deployed.network(float_one), source.test, CPU)
    assert abs(evaluation.evaluate(deployed.network(coded), source.test, CPU) - before) <= 1.0
    assert len(rows) == 10 and all(row.sqnr > 25 for row in rows)


def test_every_weight_is_coded_and_every_edge_has_a_grid(float_one: checkpoint.Checkpoint) -> None:
    coded, rows = _quantize(float_one, _settings(4))
    net = deployed.network(replace(coded, activations={}))
    assert isinstance(net, torch.fx.GraphModule)
    assert (
        set(coded.coded) == {layer.weight for layer in structure.layers(net)} == {f"{row.layer}.weight" for row in rows}
    )
    assert set(coded.activations) == set(placement.values(net, coded.input.shape))
    assert not any("norm" in name or "running" in name for name in coded.floats)


@pytest.mark.slow
def test_the_unfolded_grid_is_one_per_tensor_and_exact(float_one: checkpoint.Checkpoint) -> None:
    # Where BatchNorm's factor is negative its sign is in the integers: some are, in every layer.
    floats = {name: tensor.clone() for name, tensor in float_one.floats.items()}
    net = trace(deployed.network(float_one), float_one.input.blank(2))
    norms = {layer.weight: layer.norm for layer in structure.layers(net)}
    for norm in norms.values():
        if norm is not None:
            floats[f"{norm}.weight"][::3] *= -1
    float_one = replace(float_one, floats=floats)
    coded, _ = _quantize(float_one, _settings(3, "unfolded", act_bits=None))
    assert sum(norm is not None for norm in norms.values()) == 9 and coded.coded.keys() == norms.keys()
    rounded = {}
    for name, norm in norms.items():
        sign = torch.tensor(1.0) if norm is None else floats[f"{norm}.weight"].sign().reshape(-1, 1, 1, 1)
        raw = floats[name] * sign
        grid = weight_grids.weight_grid(raw, 3, per_channel=False)
        assert torch.equal(coded.coded[name].codes, grid.encode(raw)), name
        rounded[name] = grid.decode(grid.encode(raw)) * sign
    # Quantizing the raw weights in the float network is the same function.
    float_net = deployed.network(float_one)
    with torch.no_grad():
        float_net.load_state_dict(rounded, strict=False)
        images, _ = next(data.load("digits", spec=float_one.input).test.batches(64, CPU))
        expected, found = float_net(images), deployed.network(coded)(images)
    assert torch.allclose(expected, found, atol=1e-4 * float(expected.abs().max()))


def test_biases_are_on_the_grid_of_the_products(float_one: checkpoint.Checkpoint) -> None:
    coded, _ = _quantize(float_one, _settings(4))
    net = deployed.network(coded)
    assert isinstance(net, torch.fx.GraphModule)
    for layer, module in structure.named_layers(net):
        where = edit.source(net, structure.node_of(net, layer))
        assert where is not None
        scale = coded.activations[where].scale.double() * coded.coded[layer.weight].codec.scale.double()
        bias = structure.bias_of(module)
        assert bias is not None
        codes = bias.double() / scale
        # A float32 holds 24 bits: the quotient is an integer to that precision.
        assert torch.allclose(codes, codes.round(), rtol=1e-6, atol=1e-3)


def test_keep_gives_named_layers_their_own_bits(float_one: checkpoint.Checkpoint) -> None:
    settings = replace(_settings(2), keep={"classifier": 8, "stages.0.*": 4})
    _, rows = _quantize(float_one, settings)
    bits = {row.layer: row.bits for row in rows}
    assert bits["classifier"] == 8 and bits["stages.0.0.conv1"] == 4 and bits["conv"] == 2
    with pytest.raises(InputError, match="classifer.*did you mean 'classifier'"):
        _quantize(float_one, replace(_settings(2), keep={"classifer": 8}))


def test_a_coded_checkpoint_is_not_quantized_again(float_one: checkpoint.Checkpoint) -> None:
    coded, _ = _quantize(float_one, _settings(8))
    with pytest.raises(InputError, match="quantized already"):
        _quantize(coded, _settings(8))


@pytest.mark.slow
@pytest.mark.parametrize("variance", [1e-30, 1e-10, 2e-9, 1e-8, 1e-7, 5e-6])
def test_a_channel_without_variance_does_not_take_the_grid(float_one: checkpoint.Checkpoint, variance: float) -> None:
    # The filter's output is a constant: its weights see a value that is always zero, as behind a dead ReLU.
    floats = {name: tensor.clone() for name, tensor in float_one.floats.items()}
    floats["stages.1.0.norm1.bias"][3], floats["stages.1.0.norm1.weight"][3] = -50.0, 1.0
    floats["stages.1.0.conv2.weight"][7] = 0.0
    floats["stages.1.0.conv2.weight"][7, 3] = 0.5
    floats["stages.1.0.norm2.running_mean"][7], floats["stages.1.0.norm2.running_var"][7] = 0.0, variance
    damaged = replace(float_one, floats=floats)
    coded, rows = _quantize(damaged, _settings(4, "tensor"))
    row = next(row for row in rows if row.layer == "stages.1.0.conv2")
    assert row.note in ("1 dead channels made constant", "1 quiet channels lowered")
    healthy = _quantize(float_one, _settings(4, "tensor"))[0].coded["stages.1.0.conv2.weight"].codec
    own = coded.coded["stages.1.0.conv2.weight"].codec
    # The lowered channel may be as large as the largest other, on the side of the grid that holds one level less.
    assert isinstance(own, Grid) and float(own.scale) <= 8 / 7 * float(healthy.scale)
    source = data.load("digits", spec=float_one.input)
    before = evaluation.evaluate(deployed.network(damaged), source.test, CPU)
    assert evaluation.evaluate(deployed.network(coded), source.test, CPU) > before - 5


@pytest.mark.slow
@pytest.mark.parametrize("rule", sorted(observers.OBSERVERS))
@pytest.mark.parametrize("act_bits", [8, 6, 4])
def test_every_range_of_activations_keeps_the_network_working(
    float_one: checkpoint.Checkpoint, rule: str, act_bits: int
) -> None:
    coded, _ = _quantize(float_one, replace(_settings(8), act_bits=act_bits, act_range=rule))
    assert {grid.bits for grid in coded.activations.values()} == {act_bits}
    source = data.load("digits", spec=float_one.input)
    before = evaluation.evaluate(deployed.network(float_one), source.test, CPU)
    assert evaluation.evaluate(deployed.network(coded), source.test, CPU) > before - {8: 1, 6: 2, 4: 15}[act_bits]


@pytest.mark.slow
def test_activations_that_are_not_finite_are_named(float_one: checkpoint.Checkpoint) -> None:
    net = trace(deployed.network(float_one), float_one.input.blank(2))
    images = torch.randn(4, 1, 8, 8)
    images[1, 0, 2, 2] = torch.nan
    with pytest.raises(R2Error, match="holds NaN or infinite values in 'x'"):
        calibrate.calibrate(net, (1, 8, 8), 8, [images], "mse")


def test_ranges_need_images_and_say_so(float_one: checkpoint.Checkpoint) -> None:
    for method, act_bits, way_out in (("none", 8, "--act-bits none"), ("adaround", None, "--method none")):
        with pytest.raises(InputError, match=f"there are none: give .*{way_out}"):
            post_training.quantize(float_one, replace(_settings(4), method=method, act_bits=act_bits), [], CPU)
    assert post_training.quantize(float_one, _settings(4, act_bits=None), [], CPU)[0].coded


@pytest.mark.slow
def test_calibration_keeps_no_activations(float_one: checkpoint.Checkpoint) -> None:
    net = trace(deployed.network(float_one), float_one.input.blank(2))
    batchnorm.remove_norms(net)
    images = torch.randn(8, 1, 8, 8)
    seen = deployed.observe(net, ["x", "relu"], [images, 2 * images])
    assert seen["x"].range(8) == (2 * float(images.min()), 2 * float(images.max()))
    assert seen["relu"].low == 0.0
