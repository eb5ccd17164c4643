"""Data-free quantization: numbers worked by hand, the same function, and a network that was spread on purpose."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_graph import _warm
from torch import Tensor, nn

from conftest import R2
from r2cli import data, models
from r2cli.calibration import biases, deployed
from r2cli.deploy import onnx_export, verify
from r2cli.errors import InputError
from r2cli.graph import batchnorm, channel_clip, structure
from r2cli.graph.read import trace
from r2cli.ptq import batchnorm_statistics, bias_correction, equalize, post_training, weight_grids
from r2cli.ptq.batchnorm_statistics import Normal
from r2cli.ptq.layer_sweep import LayerSample
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage import checkpoint
from r2cli.train import evaluation

CPU = torch.device("cpu")


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def stack(*modules: nn.Module) -> torch.fx.GraphModule:
    first = modules[0]
    shape = (first.in_features,) if isinstance(first, nn.Linear) else (first.in_channels, 8, 8)
    return trace(nn.Sequential(*modules), torch.zeros(2, *shape))


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    made = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
        if bias is not None:
            made.bias.copy_(torch.tensor(bias))
    return made


def pointwise(weight: list[list[float]], bias: list[float]) -> nn.Conv2d:
    made = nn.Conv2d(len(weight[0]), len(weight), 1)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight)[:, :, None, None]), made.get_parameter("bias").copy_(torch.tensor(bias))
    return made


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- equalization ----------------------------------------------------------------------------------------------------

W1, B1, W2 = [[2.0, -4.0], [0.5, 0.25]], [1.0, -0.5], [[1.0, 0.5], [-0.25, 2.0]]


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Identity(), nn.LeakyReLU(), nn.PReLU(2), nn.ReLU6()])
def test_a_pair_of_a_case_worked_by_hand(activation: nn.Module) -> None:
    net = stack(pointwise(W1, B1), activation, pointwise(W2, [0.0, 0.0]))
    images = torch.tensor([[1.0, -2.0], [0.3, 0.7], [-1.0, 2.0]])[:, :, None, None]
    before = net(images).detach()
    equalize.equalize(net, {}, {})
    first, second = net.get_parameter("0.weight"), net.get_parameter("2.weight")
    torch.testing.assert_close(first.flatten(1), torch.tensor([[1.0, -2.0], [1.0, 0.5]]))
    torch.testing.assert_close(net.get_parameter("0.bias"), torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(second.flatten(1), torch.tensor([[2.0, 0.25], [-0.5, 1.0]]))
    torch.testing.assert_close(net(images), before)
    if isinstance(activation, nn.ReLU6):
        torch.testing.assert_close(net.get_submodule("clips._1").high, torch.tensor([3.0, 12.0]))
        plain = stack(net.get_submodule("0"), nn.ReLU6(), net.get_submodule("2"))
        assert float((plain(images).detach() - before).abs().max()) == pytest.approx(5.0)


def test_a_depthwise_layer_between_two_others_shares_their_channels() -> None:
    convs = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, groups=1), nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        for conv, reach in zip(convs, (4.0, 0.5, 2.0), strict=True):
            conv.weight.fill_(reach)
    net = stack(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
    run = equalize.runs(net)
    assert [[link.second.name for link in links] for links in run] == [["2", "4"]]
    scales = [float(s) for s in equalize.scales(run[0], equalize.reaches(net, run, {}))]
    assert scales == pytest.approx([2.5198420998, 0.7937005260], rel=1e-9)
    equalize.equalize(net, {}, {})
    assert [float(conv.weight.abs().max()) for conv in convs] == pytest.approx([1.5874010520] * 3, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mobilenet_v1", 16),
        ("resnet8", 16),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("mobilenet_v2", 16), ("resnet18", 16)]),
        pytest.param("squeezenet1_1", 32, marks=pytest.mark.slow),
    ],
)
def test_equalization_keeps_the_function_and_evens_the_ranges(name: str, size: int) -> None:
    spec = models.spec(name, classes=10, channels=3, size=size)
    net = trace(_warm(models.build(spec), 3, size), torch.zeros(2, 3, size, size))
    normals = batchnorm_statistics.statistics(net)
    graph_factors = batchnorm.remove_norms(net)
    for layer, module in structure.named_layers(net):
        if layer.name in graph_factors:
            with torch.no_grad():
                module.weight.mul_(graph_factors[layer.name].float().reshape(-1, 1, 1, 1))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        before = net(images)
        notes = equalize.equalize(net, {}, normals)
        after = net(images)
    assert notes
    assert torch.allclose(before, after, atol=1e-4 * float(before.abs().max()))
    runs = equalize.runs(net)
    reach = equalize.reaches(net, runs, {})
    assert all(float(s.log().abs().max()) < 0.01 for run in runs for s in equalize.scales(run, reach))
    # Nothing beside the runs was touched, and statistics were scaled as what they describe.
    again = batchnorm_statistics.statistics(trace(_warm(models.build(spec), 3, size), torch.zeros(2, 3, size, size)))
    scaled = {name for name in normals if not torch.allclose(normals[name].std, again[name].std, rtol=1e-3)}
    assert scaled <= set(notes)


class Residual(nn.Module):
    """Two readers, a sum, a concatenation, and a layer that runs twice: none of them may be scaled on one side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.c, self.twice, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.a(x)) + self.b(x)
        y = self.c(torch.cat([x, y], 1))
        return self.head(torch.relu(self.twice(torch.relu(self.twice(y)))))


def test_only_what_one_layer_alone_reads_is_scaled() -> None:
    assert equalize.links(trace(Residual(), torch.zeros(2, 3, 4, 4))) == {}


@pytest.mark.slow
def test_a_flatten_between_is_only_of_whole_channels() -> None:
    def joined(*modules: nn.Module) -> int:
        return len(equalize.links(stack(*modules)))

    conv = nn.Conv2d(3, 4, 3)
    assert joined(conv, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 2)) == 1
    assert joined(conv, nn.ReLU(), nn.Linear(6, 2)) == 0
    assert joined(conv, nn.Flatten(2), nn.Linear(36, 2)) == 0
    assert joined(conv, nn.Sigmoid(), nn.Conv2d(4, 2, 1)) == 0
    net = stack(conv, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    images = torch.randn(2, 3, 8, 8)
    before = net(images)
    equalize.equalize(net, {}, {})
    torch.testing.assert_close(net(images), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("least", [0.0, 1e-9, 5e-4])
def test_a_dead_channel_is_left_as_it_is(least: float) -> None:
    """Dead is too what its weights move by less than a step of its bias, which would otherwise grow with them."""
    net = stack(linear([[least, 0.0], [2.0, 1.0]], [3.0, 1.0]), nn.ReLU(), linear([[1.0, 8.0]], [0.0]))
    equalize.equalize(net, {}, {})
    assert net.get_parameter("2.weight").tolist() == [[1.0, 4.0]]
    assert net.get_parameter("0.bias").tolist() == [3.0, 2.0]


def test_factors_beside_the_weights_are_scaled_instead_of_the_weights() -> None:
    net = stack(linear([[1.0], [1.0]], [1.0, 1.0]), nn.ReLU(), linear([[1.0, 1.0]], [0.0]))
    factors = {"0": column(4.0, 0.25)}
    equalize.equalize(net, factors, {})
    assert net.get_parameter("0.weight").tolist() == [[1.0], [1.0]]
    assert factors["0"].tolist() == [2.0, 0.5]
    assert net.get_parameter("2.weight").tolist() == [[2.0, 0.5]]


def test_relu6_may_be_replaced_instead() -> None:
    net = stack(nn.Conv2d(1, 1, 1), nn.ReLU6(), nn.Conv2d(1, 1, 1))
    assert equalize.without_relu6(net) == 1
    assert float(net.get_submodule("clips._1")(torch.tensor([[[[9.0]]]]))) == 9.0


# --- absorption ------------------------------------------------------------------------------------------------------


def test_high_biases_are_absorbed_of_a_case_worked_by_hand() -> None:
    weight = [[1.0, -2.0, 0.5], [0.25, 1.0, 1.0]]
    net = stack(linear([[0.0], [0.0], [0.0]], [4.0, 1.0, -1.0]), nn.ReLU(), linear(weight, [0.1, -0.1]))
    normals = {"0": Normal(column(4, 1, -1), column(1, 0.5, 0.2))}
    notes = equalize.absorb(net, normals)
    torch.testing.assert_close(net.get_submodule("0").bias, torch.tensor([3.0, 1.0, -1.0]))
    torch.testing.assert_close(net.get_submodule("2").bias, torch.tensor([1.1, 0.15]))
    assert normals["0"].mean.tolist() == [3, 1, -1]
    assert notes == {"0": "1 of 3 high biases absorbed"}


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_absorption_keeps_the_function_where_values_are_high(activation: nn.Module) -> None:
    torch.manual_seed(0)
    net = stack(nn.Conv2d(4, 4, 1, groups=4), activation, nn.Conv2d(4, 6, 1, groups=2))
    with torch.no_grad():
        net.get_parameter("0.weight").fill_(1.0)
        net.get_parameter("0.bias").copy_(torch.tensor([5.0, 9.0, 0.0, -4.0]))
    normals = {"0": Normal(column(5, 9, 0, -4), column(1, 1, 1, 1))}
    equalize.equalize(net, {}, normals)
    images = torch.rand(8, 4, 3, 3) * 2 - 1  # within three deviations
    before = net(images)
    assert equalize.absorb(net, normals) == {"0": "2 of 4 high biases absorbed"}
    torch.testing.assert_close(net(images), before, rtol=1e-4, atol=1e-5)


def test_nothing_is_absorbed_into_a_padded_layer() -> None:
    net = stack(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1))
    assert equalize.absorb(net, {"0": Normal(column(9), column(1))}) == {}


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "gamma", "relu", "relu6"),
    [
        (0.5, 1.0, 0.6977965574, 0.6977965541),
        (-1.0, 0.5, 0.0042453513, 0.0042453513),
        (5.0, 2.0, 5.0040082744, 4.6084151596),
        (3.0, 0.0, 3.0, 3.0),
        (-3.0, 0.0, 0.0, 0.0),
        (9.0, 0.0, 9.0, 6.0),
    ],
)
def test_the_mean_behind_an_activation(beta: float, gamma: float, relu: float, relu6: float) -> None:
    for most, expected in ((torch.inf, relu), (6.0, relu6)):
        mean, _ = batchnorm_statistics.rectified(column(beta), column(gamma), column(most))
        assert float(mean) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("most", [torch.inf, 6.0])
def test_the_deviation_behind_an_activation(most: float) -> None:
    mean, std = column(0.5, -1.0, 5.0, 20.0), column(1.0, 0.5, 2.0, 1.0)
    drawn = torch.randn(1_000_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * std + mean
    found = drawn.clamp(0, most).std(0)
    # A million samples: a thousandth of the deviation before the activation.
    torch.testing.assert_close(
        batchnorm_statistics.rectified(mean, std, column(most).expand(4))[1], found, rtol=0, atol=5e-3
    )


def test_a_negative_gamma_counts_as_its_size() -> None:
    net = stack(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU())
    norm = net.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    with torch.no_grad():
        norm.weight.fill_(-1.0), norm.bias.fill_(0.5), norm.running_var.fill_(4.0)
    own = batchnorm_statistics.statistics(net)["0"]
    assert float(batchnorm_statistics.rectified(own.mean, own.std, column(torch.inf))[0]) == pytest.approx(
        0.6977965574, rel=1e-4
    )


@pytest.mark.slow
def test_statistics_go_on_through_the_graph(float_one: checkpoint.Checkpoint) -> None:
    net = trace(deployed.network(float_one), float_one.input.blank(2))
    normals = batchnorm_statistics.statistics(net)
    for layer, factor in batchnorm.remove_norms(net).items():
        with torch.no_grad():
            structure.weight_of(net.get_submodule(layer)).mul_(factor.float().reshape(-1, 1, 1, 1))
    known = batchnorm_statistics.values(net, normals, float_one.input)
    predicted = batchnorm_statistics.ranges(net, normals, float_one.input)
    seen = deployed.observe(net, list(predicted), [images_of(float_one, 512)])
    for name, (low, high) in predicted.items():
        spare = 0.2 * (high - low)  # digits' values have heavier tails than six deviations of a normal one
        assert low - spare <= seen[name].low and seen[name].high <= high + spare, name
        assert high - low < 12 * (seen[name].high - seen[name].low), name
    assert known["pool"].mean.shape == (64,)
    assert known["stages_1_0_relu2"].low.min() >= 0


def test_what_no_batchnorm_describes_is_refused_by_name() -> None:
    net = stack(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    with pytest.raises(InputError, match="value '_1' is not known without data.*--data"):
        batchnorm_statistics.ranges(net, {}, checkpoint.InputSpec(3, 8, 8, (0.5,) * 3, (0.25,) * 3))


# --- bias correction -------------------------------------------------------------------------------------------------


def test_the_analytic_correction_of_a_case_worked_by_hand() -> None:
    layer = linear([[0.3, -0.7], [1.1, 0.2]], [0.0, 0.0])
    grid = Grid(torch.tensor(1.1 / 7), torch.tensor(0, dtype=torch.int32), 4, signed=True)
    coded = Coded(grid, grid.encode(layer.weight))
    assert coded.codes.tolist() == [[2, -4], [7, 1]]
    mean, _ = batchnorm_statistics.rectified(column(0.5, -1), column(1, 0.5), column(torch.inf, torch.inf))
    shift = bias_correction.mean_shift(layer, coded, mean.float(), (2,))
    assert (-shift).tolist() == pytest.approx([-0.0102717618, 0.0001819436], rel=1e-4)


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), nn.Linear(4, 6)],
)
def test_correction_takes_the_shift_of_the_mean_back(module: nn.Conv2d | nn.Linear) -> None:
    torch.manual_seed(0)
    shape = (64, 4) if isinstance(module, nn.Linear) else (64, 4, 5, 5)
    mean = torch.rand(4)
    images = torch.randn(shape).add_(mean.reshape(1, 4, *[1] * (len(shape) - 2)))
    grid = weight_grids.weight_grid(module.weight, 3, per_channel=False)
    coded = Coded(grid, grid.encode(module.weight))
    layer = structure.Layer("module", "module", None)
    corrected = bias_correction.empirical(LayerSample(layer, module, None, images, images + 0.1), coded)
    assert corrected is not None
    state = {"weight": coded.decode(), "bias": corrected}
    with torch.no_grad():
        gap = torch.func.functional_call(module, state, (images + 0.1,)) - module(images)
        assert float(biases.channel_means(module, gap).abs().max()) < 1e-5
        # The analytic shift is that of an input which has this mean everywhere.
        flat = mean.reshape(1, 4, *[1] * (len(shape) - 2)).expand(shape)
        rounded = torch.func.functional_call(module, {"weight": coded.decode()}, (flat,))
        shift = bias_correction.mean_shift(module, coded, mean, shape[1:])
        torch.testing.assert_close(shift, biases.channel_means(module, rounded - module(flat)), rtol=1e-3, atol=1e-5)


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def float_one(trained: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(trained)


@pytest.fixture(scope="module")
def spreading() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "spread.py"
    found = importlib.util.spec_from_file_location("spread", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def images_of(made: checkpoint.Checkpoint, count: int) -> Tensor:
    return next(iter(data.calibration(data.load("digits", spec=made.input), count, CPU, 0, batch=count)))[0]


def top1(made: checkpoint.Checkpoint) -> float:
    return evaluation.evaluate(deployed.network(made), data.load("digits", spec=made.input).test, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", post_training.GRANULARITIES)
@pytest.mark.parametrize("with_data", [False, True])
def test_dfq_costs_next_to_nothing_at_eight_bits(
    float_one: checkpoint.Checkpoint, granularity: str, with_data: bool
) -> None:
    images = [images_of(float_one, 256)] if with_data else None
    coded, rows = post_training.quantize(
        float_one, post_training.PtqSettings("dfq", 8, 8, granularity, {}), images, CPU
    )
    assert top1(coded) > top1(float_one) - 1
    # The image is taken to have mean 0, so without data the first layer has nothing to correct.
    assert ["bias corrected" in row.note for row in rows] == [with_data, *[True] * 9]
    assert sum("equalized" in row.note for row in rows) == 3


@pytest.mark.slow
def test_dfq_restores_a_network_that_was_spread(
    float_one: checkpoint.Checkpoint, spreading: ModuleType, tmp_path: Path
) -> None:
    spread = spreading.spread(float_one, 0)
    before = top1(float_one)
    assert top1(spread) == pytest.approx(before, abs=0.2)
    images = [images_of(spread, 256)]
    settings = post_training.PtqSettings("none", 4, 8, "tensor", {})
    plain = post_training.quantize(spread, settings, images, CPU)[0]
    restored = post_training.quantize(spread, replace(settings, method="dfq"), None, CPU)[0]
    assert top1(plain) < top1(restored) - 20
    assert top1(restored) > before - 10


def separable() -> nn.Module:
    """A stem and two depthwise-separable blocks with ReLU6, and a linear layer."""
    layers: list[nn.Module] = []
    for channels, made, groups in ((1, 16, 1), (16, 16, 16), (16, 32, 1), (32, 32, 32), (32, 32, 1)):
        layers += [nn.Conv2d(channels, made, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(made), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def mobile() -> checkpoint.Checkpoint:
    torch.manual_seed(0)
    source, model = data.load("digits", size=16), separable()
    batchnorm.reestimate_norms(model, [next(iter(source.train.batches(256, CPU)))[0]])
    spec = checkpoint.ModelSpec("test_dfq.py:separable", 10, 1, factory=separable)
    return checkpoint.Checkpoint(spec, source.input, source.class_names, model.state_dict())


@pytest.mark.slow
def test_relu6_with_bounds_of_its_own_survives_the_file_and_runs_on_integers(
    mobile: checkpoint.Checkpoint, tmp_path: Path
) -> None:
    made = mobile
    parts = (post_training.EQUALIZE, post_training.ABSORB)
    settings = post_training.PtqSettings("none", 8, 8, "channel", {}, parts=parts)
    coded, _ = post_training.quantize(made, settings, [images_of(made, 64)], CPU)
    assert len(channel_clip.stored(coded.floats)) == 5
    path = tmp_path / "coded.safetensors"
    checkpoint.save(coded, path)
    again = replace(checkpoint.load(path), model=made.model)
    images = images_of(made, 32)
    with torch.no_grad():
        assert torch.equal(deployed.network(coded)(images), deployed.network(again)(images))
    onnx = tmp_path / "coded.onnx"
    onnx.write_bytes(onnx_export.to_bytes(again))
    batches = data.load("digits", spec=made.input).test.batches(128, CPU)
    proof = verify.prove(onnx, again, deployed.network(again), batches)
    assert proof.passed, proof.checks
    nodes = proof.measures["nodes"]
    assert nodes["QLinearConv"] == 5 and nodes["QGemm"] == 1 and nodes["Min"] > 0
    assert not {"Conv", "FusedConv", "Relu", "Clip"} & set(nodes)


@pytest.mark.slow
def test_a_float_clip_is_exported_too(mobile: checkpoint.Checkpoint, tmp_path: Path) -> None:
    made = mobile
    settings = post_training.PtqSettings("none", 8, None, "channel", {}, parts=(post_training.EQUALIZE,))
    coded, _ = post_training.quantize(made, settings, None, CPU)
    onnx = tmp_path / "coded.onnx"
    onnx.write_bytes(onnx_export.to_bytes(coded))
    batches = data.load("digits", spec=made.input).test.batches(128, CPU)
    assert verify.prove(onnx, coded, deployed.network(coded), batches).passed


def test_adaround_without_data_is_refused(float_one: checkpoint.Checkpoint) -> None:
    with pytest.raises(InputError, match="adaround needs data.*dfq"):
        post_training.quantize(float_one, post_training.PtqSettings("adaround", 4, 8, "channel", {}), None, CPU)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_needs_no_data_and_says_what_it_did(
    r2: R2, float_one: checkpoint.Checkpoint, tmp_path: Path
) -> None:
    # A folder is not recorded with its path, so that nothing but the checkpoint is there.
    first, *rest = float_one.history
    history = ({**first, "options": {**first["options"], "data": "imagefolder"}}, *rest)
    source = tmp_path / "model.safetensors"
    checkpoint.save(replace(float_one, history=history), source)
    assert r2("ptq", source, "--min-accuracy", 50, "--method", "dfq").code == 2
    told = r2("ptq", source).err
    assert "imagefolder" in told and "--data" in told
    told = r2("ptq", source, "--method", "adaround", "--calibration", 0, "--data", "digits").err
    assert "adaround needs data" in told and "dfq" in told
    ran = r2("ptq", source, "--method", "dfq", "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["ranges"] == "batchnorm" and report["top1"] is None and report["passed"]
    assert report["options"]["calibration"] == 0
    assert sum("equalized" in row["note"] for row in report["layers"]) == 3
    again = checkpoint.load(tmp_path / "model.w8a8-dfq.safetensors")
    assert top1(again) > top1(float_one) - 1


@pytest.mark.slow
def test_the_command_takes_data_where_it_is_given(r2: R2, float_one: checkpoint.Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    checkpoint.save(float_one, source)
    ran = r2("ptq", source, "--method", "dfq", "--data", "digits", "--calibration", 64, "--relu6", "relu", "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["ranges"] == "calibration" and report["options"]["calibration"] == 64
    assert report["relu_top1"] == report["float_top1"]  # it has no ReLU6
