"""Networks that people brought: each kind of layer, weight and file through every command, and what the file is."""

import argparse
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from conftest import R2
from r2cli import models
from r2cli.api import data_notes
from r2cli.calibration import deployed
from r2cli.calibration.biases import with_raised_scale
from r2cli.config import machine
from r2cli.data import Batch
from r2cli.deploy import onnx_export, parity, runtime, verify
from r2cli.errors import InputError, R2Error
from r2cli.graph import structure
from r2cli.graph.read import trace
from r2cli.graph.transposed import TransposedConv, exchanged
from r2cli.palettes import compression
from r2cli.ptq import adaround, post_training
from r2cli.qat import finetune, lsq, prepare, qat_method, quantizer_placement
from r2cli.quantized import grid_search
from r2cli.quantized.coded import Coded
from r2cli.quantized.palette import Palette
from r2cli.registry import LsqOptions
from r2cli.storage import foreign, pth, stream
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec

CPU = torch.device("cpu")
Factory = Callable[[], nn.Module]


def images(seed: int, count: int = 16, size: int = 12) -> Tensor:
    """Each of its own contrast and colour: white noise all looks alike to a network."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    contrast = 2 * torch.rand(count, 3, 1, 1, generator=generator)
    return pixels * contrast + torch.randn(count, 3, 1, 1, generator=generator)


def batches() -> Iterator[Batch]:
    return ((images(seed), torch.zeros(16, dtype=torch.long)) for seed in (2, 3))


@torch.no_grad()
def made(factory: Factory, change: Callable[[nn.Module], None] | None = None) -> Checkpoint:
    """A network of random weights whose BatchNorms have seen images; `change` is applied to it at the end."""
    torch.manual_seed(0)
    spec = ModelSpec("cases.py:factory", 4, factory=factory)
    model = models.build(spec)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.bias.fill_(0.5)
    model.train()
    for given, _ in batches():
        model(given)
    if change is not None:
        change(model)
    state = {name: tensor.detach().contiguous() for name, tensor in model.eval().state_dict().items()}
    return Checkpoint(spec, InputSpec(3, 12, 12, (0.0,) * 3, (1.0,) * 3), tuple("0123"), state)


def ptq(
    one: Checkpoint, *, bits: int = 8, acts: int | None = 8, method: str = "none", form: str = "channel"
) -> Checkpoint:
    settings = post_training.PtqSettings(method, bits, acts, form, {})
    return post_training.quantize(one, settings, [x for x, _ in batches()], CPU)[0]


def palettize(one: Checkpoint, *, bits: int = 6, dim: int = 1, lut_bits: int = 8, acts: int | None = 8) -> Checkpoint:
    settings = compression.PaletteSettings("kmeans", bits, dim, None, lut_bits, acts, {})
    work = compression.PaletteTask(one, settings, batches, CPU, 0)
    return compression.by_kmeans(work, weigh=False, advance=lambda layers: None)[0]


def qat(one: Checkpoint, *, method: str = "lsq", bits: int = 8, start: str = "fitted") -> Checkpoint:
    """Without any training step: the quantizers as they start, with BatchNorm's statistics as they were."""
    work = prepare.QatTask(one, prepare.QatSettings(method, bits, 8, {}, start=start), batches, CPU)
    return prepare.finish(work, prepare.prepare(work))[0]


COMMANDS: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "w8a8": ptq,
    "w8": lambda one: ptq(one, acts=None),
    "w4a8 unfolded": lambda one: ptq(one, bits=4, form="unfolded"),
    "palette": palettize,
    "palette of pairs": lambda one: palettize(one, dim=2),
    "palette of floats": lambda one: palettize(one, lut_bits=32, acts=None),
    "lsq": qat,
}


def proof_of(coded: Checkpoint, one: Checkpoint, tmp_path: Path) -> verify.Proof:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(coded))
    return verify.prove(path, coded, deployed.network(coded), batches(), deployed.network(one))


def require_proved(coded: Checkpoint, one: Checkpoint, tmp_path: Path, decibels: float) -> verify.Proof:
    proof = proof_of(coded, one, tmp_path)
    assert proof.passed, [check for check in proof.checks if not check.passed]
    assert proof.measures["float_sqnr_db"] >= decibels
    return proof


# --- transposed convolutions, and those of three axes -----------------------------------------------------------------


class Up(nn.Module):
    """Down, up by a transposed convolution with a BatchNorm, a skip by concatenation, and a head."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=groups)
        self.norm, self.act, self.conv = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(11, 8, 3, 2, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        up = self.act(self.norm(self.up(torch.relu(self.down(x)))))
        return self.head(torch.relu(self.conv(torch.cat([x, up], 1))).mean((2, 3)))


class Up1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.ConvTranspose1d(36, 6, 4, 2, 1), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.up(x.flatten(1, 2)))).mean(2))


class Clip3d(nn.Module):
    """Three colours as three frames of a clip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(1, 6, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(6)
        self.second, self.head = nn.Conv3d(6, 8, 3, (1, 2, 2), 1, groups=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x.unsqueeze(1))))))
        return self.head(x.mean((2, 3, 4)))


KINDS: dict[str, Factory] = {
    "up": lambda: Up(1),
    "up in groups": lambda: Up(2),
    "up by channel": lambda: Up(8),
    "up along one axis": Up1d,
    "three axes": Clip3d,
}
DECIBELS = {"w8a8": 28, "w8": 40, "palette": 24, "lsq": 20}  # of the others 12: a healthy file, on random weights
FULL = [("w8a8", kind) for kind in KINDS] + [(command, "up in groups") for command in COMMANDS if command != "w8a8"]
FULL += [("palette", "up"), ("lsq", "three axes")]
SOME = (("w8a8", "up"), ("lsq", "up in groups"), ("palette of pairs", "up in groups"), ("w8a8", "three axes"))
EACH = [pytest.param(*pair, marks=() if pair in SOME else pytest.mark.slow) for pair in FULL]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "kind"), EACH)
def test_every_weight_is_codes_and_every_norm_is_folded(command: str, kind: str, tmp_path: Path) -> None:
    one = made(KINDS[kind])
    coded = COMMANDS[command](one)
    weights = {name for name, tensor in one.floats.items() if tensor.ndim > 1}
    assert set(coded.coded) == weights and not any(name.startswith("norm.") for name in coded.floats)
    require_proved(coded, one, tmp_path, DECIBELS.get(command, 12))


@pytest.mark.slow
def test_the_codes_of_a_transposed_convolution_lie_along_its_second_axis(tmp_path: Path) -> None:
    """Its own order in ONNX too: what reads the codes decodes them along axis 1, one scale an output channel."""
    one = made(KINDS["up"])
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(ptq(one)))
    file = onnx.load(path)
    made_by = {name: node for node in file.graph.node for name in node.output}
    layer = next(node for node in file.graph.node if node.op_type == "ConvTranspose")
    decoded = made_by[layer.input[1]]
    assert decoded.op_type == "DequantizeLinear" and onnx.helper.get_node_attr_value(decoded, "axis") == 1
    assert runtime.node_counts(path)["ConvTranspose"] == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_a_transposed_convolution_is_read_with_its_outputs_first(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, (3, 2), (2, 3), 1, (1, 2), groups, dilation=(2, 1)))
    x = torch.randn(2, 4, 5, 6)
    net = trace(model, x)
    ((name, layer),) = [(name, each) for name, each in net.named_modules() if isinstance(each, TransposedConv)]
    assert name == "0" and layer.weight.shape == (8, 4 // groups, 3, 2)
    assert torch.equal(exchanged(layer.weight, groups), model.get_parameter("0.weight"))
    assert torch.allclose(net(x), model(x), atol=1e-6)


LAYERS: dict[str, tuple[Factory, tuple[int, ...]]] = {
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2), (4, 5, 6)),
    "one axis": (lambda: nn.Conv1d(4, 6, 3, 2, 1), (4, 9)),
    "three axes": (lambda: nn.Conv3d(4, 6, (1, 2, 3), (1, 2, 1), (0, 1, 2), groups=2), (4, 3, 5, 6)),
}


@pytest.mark.parametrize(("factory", "shape"), LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_patches_times_filters_are_what_the_layer_gives(factory: Factory, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    layer = next(iter(trace(nn.Sequential(factory()), x).children()))
    assert isinstance(layer, adaround.Convolution)
    out = layer(x)
    index = torch.randperm(out[:, 0].numel())[:50]
    seen = adaround.patches(x, layer, out.shape[2:], index)
    filters = layer.weight.reshape(layer.groups, -1, seen.shape[2])
    found = (seen @ filters.transpose(1, 2)).transpose(0, 1).flatten(1) + layer.get_parameter("bias")
    assert torch.allclose(found, out.movedim(1, -1).flatten(0, -2)[index], atol=1e-5)


# --- weights of zeros, and biases beside next to nothing --------------------------------------------------------------


class Plain(nn.Module):
    """A residual branch that may be nothing, a depthwise layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.branch, self.gamma = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.head = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.gamma(self.branch(x)))
        return self.head(torch.relu(self.deep(x)).mean((2, 3)))


def _no_gamma(model: nn.Module) -> None:
    model.get_parameter("gamma.weight").zero_()
    model.get_parameter("gamma.bias").copy_(torch.linspace(-0.3, 0.3, 8))


def _no_filter(model: nn.Module) -> None:
    model.get_parameter("deep.weight").zero_()
    model.get_parameter("deep.bias").copy_(torch.linspace(0.003, 0.3, 8))


def _dead_channels(model: nn.Module) -> None:
    model.get_parameter("stem.weight")[3] = 0
    model.get_buffer("norm.running_mean")[3] = model.get_buffer("norm.running_var")[3] = 0
    model.get_parameter("deep.weight")[5] *= 1e-6
    model.get_parameter("deep.weight")[7] = 0


def _next_to_nothing(model: nn.Module) -> None:
    model.get_parameter("deep.weight")[2:4] *= 1e-9
    model.get_parameter("deep.bias")[2:4] = torch.tensor([5.0, -4.5])


CHANGES = {"gammas": _no_gamma, "layer": _no_filter, "channels": _dead_channels, "bias": _next_to_nothing}
METHODS: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "w8a8": ptq,
    "unfolded": lambda one: ptq(one, form="unfolded"),
    "tensor": lambda one: ptq(one, form="tensor"),
    "palette": lambda one: palettize(one, bits=8),
    "palette of pairs": lambda one: palettize(one, bits=8, dim=2),
    **{name: partial(qat, method=name, bits=7) for name in ("lsq", "ewgs", "dorefa", "pact")},
}
# The fewest decibels of methods whose weights, untrained, are far from the float ones.
ROUGH = {"dorefa": -3, "pact": -3, "ewgs": 6, "palette": 24, "palette of pairs": 20, "lsq": 16}
QUICK = (("gammas", "palette"), ("layer", "dorefa"), ("bias", "w8a8"), ("bias", "palette"), ("channels", "w8a8"))
ALL = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in product(CHANGES, METHODS)]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "method"), ALL)
def test_zeros_cost_next_to_nothing(change: str, method: str, tmp_path: Path) -> None:
    one = made(Plain, CHANGES[change])
    require_proved(METHODS[method](one), one, tmp_path, ROUGH.get(method, 28))


def test_a_layer_of_zeros_gives_its_bias_exactly() -> None:
    one = made(Plain, _no_filter)
    coded = ptq(one)
    assert torch.allclose(coded.floats["deep.bias"], one.floats["deep.bias"], rtol=1e-6, atol=0)
    assert not coded.coded["deep.weight"].decode().any()


def test_what_was_raised_is_said() -> None:
    one = made(Plain, _next_to_nothing)
    settings = post_training.PtqSettings("none", 8, 8, "channel", {})
    coded, rows = post_training.quantize(one, settings, [x for x, _ in batches()], CPU)
    told = {row.layer: row.note for row in rows}
    assert told["deep"] == "scale of 2 channels raised for their bias" and not told["stem"]
    before = post_training.quantize(one, replace(settings, act_bits=None), None, CPU)[0].coded["deep.weight"]
    same = coded.coded["deep.weight"].codec.scale == before.codec.scale
    assert same.tolist() == [True, True, False, False, True, True, True, True]


@pytest.mark.parametrize("dim", [1, 2])
def test_a_raised_scale_leaves_the_codes_of_other_channels(dim: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 2, 3)
    lut = torch.arange(-8, 8, dtype=torch.int8).reshape(1, 16, 1).expand(1, 16, dim)
    palette = Palette(lut, torch.full((6,), 0.3), 4, (6, 2, 3), axis=0)
    coded = Coded(palette, palette.encode(weight))
    by = torch.tensor([1.0, 0.5, 1.0, 1.0, 4.0, 1.0])
    raised = with_raised_scale(coded, by)
    moved = (raised.decode() != coded.decode()).flatten(1).any(1)
    assert raised.codec.scale.tolist() == pytest.approx([0.3, 0.3, 0.3, 0.3, 1.2, 0.3])
    assert moved[4] and not moved[:4].any() and (dim == 2 or not moved[5])


def test_equal_logits_are_decided_as_torch_decides_them() -> None:
    """Two classes of equal logits: which one is greatest is chance, and no loss of the file."""
    run = parity.Decisions()
    reference, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    run.add(torch.tensor([[0.0, 1e-9, 0.0]]).expand(4, 3), reference, labels)
    assert run.correct == 0 and run.resolved == 4 and run.decided == 4


@pytest.mark.slow
def test_kernels_that_overflow_are_measured_in_batches_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "has_vnni", lambda: False)
    one, path = made(Plain), tmp_path / "model.onnx"
    coded = ptq(one)
    path.write_bytes(onnx_export.to_bytes(coded))
    for count in (parity.OFF_SAMPLES // 2, parity.OFF_SAMPLES):
        shown = [(images(5, count), torch.zeros(count, dtype=torch.long))] * 2
        proof = verify.prove(path, coded, deployed.network(coded), shown, deployed.network(one))
        assert proof.measures["overflow_db"] is not None and proof.measures["float_sqnr_db"] > 20


# --- quantizers of weights that are 0 everywhere ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("method", ["lsq", "seq", "ewgs", "dorefa", "pact"])
def test_a_weight_of_zeros_has_finite_gradients(method: str, bits: int) -> None:
    kind = qat_method.method(method)
    weight = torch.zeros(4, 3, requires_grad=True)
    learner = kind.weight(weight.detach(), bits, True)
    learner.keep_scale(weight.detach())
    learner(weight).mul(torch.randn(4, 3)).sum().backward()
    parameters = [weight, *learner.parameters()]
    assert all(each.grad is None or bool(each.grad.isfinite().all()) for each in parameters)
    assert bool(learner.freeze(weight.detach()).decode().isfinite().all())
    assert learner.freeze(weight.detach()).codec.scale.item() > 0


def test_a_step_falls_no_further_than_a_share_of_its_start() -> None:
    learner = lsq.LsqWeight(torch.randn(64), 4, True)
    first = learner.step.item()
    with torch.no_grad():
        learner.step.fill_(-1.0)
    assert learner.freeze(torch.randn(64)).codec.scale.item() == pytest.approx(first * lsq.SMALLEST)


def _prepared() -> tuple[prepare.QatTask, quantizer_placement.Prepared]:
    work = prepare.QatTask(made(Plain), prepare.QatSettings("lsq", 4, 4, {}), batches, CPU)
    return work, prepare.prepare(work)


def test_a_gradient_moves_a_step_by_no_more_than_its_size() -> None:
    _, prepared = _prepared()
    weight, activation = prepared.weights["deep"], prepared.activations[0]
    assert isinstance(weight, lsq.LsqWeight) and isinstance(activation, lsq.LsqActivation)
    weight.step.grad, activation.parameter.grad = torch.tensor(-1e3), activation.parameter.detach() / 3
    lsq.METHOD.add_gradients(prepared, qat_method.EpochStart(1, 1, 0, batches, LsqOptions()))
    assert torch.equal(weight.step.grad, -weight.step)
    assert torch.equal(activation.parameter.grad, activation.parameter / 3)


def test_steps_at_their_least_and_an_accuracy_of_chance_are_a_diverged_training() -> None:
    work, prepared = _prepared()
    finetune.require_learned(work, prepared, 25.0)
    with torch.no_grad():
        prepared.weights["deep"].get_parameter("step").fill_(-1.0)
    finetune.require_learned(work, prepared, 25.1)
    with pytest.raises(R2Error, match="training diverged: 1 steps fell to their least .'deep'.*use a lower --lr"):
        finetune.require_learned(work, prepared, 25.0)


# --- padding ----------------------------------------------------------------------------------------------------------


Mode = Literal["circular", "reflect", "replicate"]


class Padded(nn.Module):
    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False, padding_mode=mode), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, (3, 5), 1, (1, 2), padding_mode=mode), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("command", ["w8a8", pytest.param("lsq", marks=pytest.mark.slow)])
def test_convolutions_behind_any_padding_run_on_integers(command: str, mode: Mode, tmp_path: Path) -> None:
    one = made(lambda: Padded(mode))
    proof = require_proved(COMMANDS[command](one), one, tmp_path, 20)
    nodes = proof.measures["nodes"]
    assert nodes["QLinearConv"] == 2 and not {"Conv", "FusedConv", "NhwcFusedConv"} & set(nodes)
    assert not proof.measures["float_operations"]


# --- one weight for several layers ------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One convolution and one head at two scales, with one ReLU for all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 1, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(self.conv(self.act(self.stem(x))))
        second = self.act(self.conv(self.pool(first)))
        return self.head(first.mean((2, 3))) + self.head(second.mean((2, 3)))


class Recurrent(nn.Module):
    """A convolution and its BatchNorm that run three times: one fold for all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 4)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for _ in range(3):
            x = self.block(x)
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """Two layers whose weight is one parameter, each with a BatchNorm of its own, which gets a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 4)
        self.one, self.two = (nn.Conv2d(8, 8, 3, 1, 1, bias=False) for _ in range(2))
        self.two.weight = self.one.weight
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(self.one(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.second(self.two(x))).mean((2, 3)))


SHARED = {"twice": (Twice, "conv"), "recurrent": (Recurrent, "block.0"), "tied": (Tied, "one")}
ALONE = {"first_alone.weight", "second_alone.weight"}
RUNS = [pytest.param("w8a8", name) for name in SHARED]
RUNS += [pytest.param(command, name, marks=pytest.mark.slow) for command in ("palette", "lsq", "w8") for name in SHARED]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), RUNS)
def test_a_weight_of_several_layers_has_one_set_of_codes(command: str, name: str, tmp_path: Path) -> None:
    factory, layer = SHARED[name]
    one = made(factory)
    coded = COMMANDS[command](one)
    assert set(coded.coded) - ALONE == {"stem.weight", f"{layer}.weight", "head.weight"}
    proof = require_proved(coded, one, tmp_path, 28)
    file = onnx.load(tmp_path / "model.onnx")
    assert [each.name for each in file.graph.initializer if list(each.dims) == [8, 8, 3, 3]] == [
        f"{layer}.weight.codes"
    ]
    if command != "w8":
        assert proof.measures["nodes"]["QLinearConv"] == {"twice": 3, "recurrent": 4, "tied": 5}[name]
        assert "BatchNormalization" not in proof.measures["nodes"]
        told = [each["node"] for each in proof.measures["float_operations"] if each["kind"] == "second use of a layer"]
        # Between its uses a value is on another grid, and a bias has one unit.
        assert told == {"twice": ["conv_1", "head_1"], "recurrent": ["block_0_1", "block_0_2"], "tied": []}[name]


class Often(nn.Module):
    """A linear layer and a convolution that run nine times each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1, bias=False)
        self.turn, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for _ in range(9):
            x = torch.relu(self.conv(x)) + x
        x = x.mean((2, 3))
        for _ in range(9):
            x = torch.relu(self.turn(x)) + x
        return self.head(x)


class OnTokens(nn.Module):
    """Layers that run on one value of each image, then on all tokens, and on these again."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.LayerNorm(8)
        self.turn, self.head = nn.Linear(8, 8, bias=bias), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).flatten(2).transpose(1, 2)
        first = torch.relu(self.turn(x[:, 0]))
        for _ in range(3):
            x = self.norm(x + torch.relu(self.turn(x)))
        return self.head(torch.tanh(first) + x.mean(1))


OFTEN: dict[str, Factory] = {"images": Often, "tokens": OnTokens, "no bias": lambda: OnTokens(bias=False)}


@pytest.mark.slow
@pytest.mark.parametrize("network", OFTEN)
@pytest.mark.parametrize("command", ["w8a8", "w4a8 unfolded", "palette"])
def test_a_layer_may_run_many_times(command: str, network: str, tmp_path: Path) -> None:
    """Each time from codes of its own, which ONNX Runtime must not take for the same."""
    one = made(OFTEN[network])
    require_proved(COMMANDS[command](one), one, tmp_path, 8)  # every run adds noise
    file = onnx.load(tmp_path / "model.onnx")
    codes = [each.name for each in file.graph.initializer if ".codes" in each.name and "weight" in each.name]
    assert len(codes) == (4 if network == "images" else 3)


# --- files of other forms ---------------------------------------------------------------------------------------------


MEMBERS = {
    "x/constants.pkl": "a TorchScript file.*torch.jit.load",
    "x/archive_format": "a program of torch.export.*torch.export.load",
    "model.weights.h5": "a Keras file",
}
STARTS = {b"GGUF": "a GGUF file", b"\x89HDF\r\n": "an HDF5 file", b"\x1c\0\0\0TFL3": "a TensorFlow Lite file"}


@pytest.mark.parametrize("reads", [pth.load, stream.tensors_of_model], ids=["weights", "analyze"])
@pytest.mark.parametrize("what", [*MEMBERS, *STARTS], ids=str)
def test_a_file_of_another_form_is_named_with_the_way_out(
    what: str | bytes, reads: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "weights.bin"
    if isinstance(what, str):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(what, b"")
        message = MEMBERS[what]
    else:
        path.write_bytes(what + bytes(64))
        message = STARTS[what]
    with pytest.raises(InputError, match=f"weights.bin is {message}"):
        reads(path)


def test_what_torch_saved_is_read_as_a_model_is(tmp_path: Path) -> None:
    path, weight = tmp_path / "model.pth", torch.randn(4, 3).T  # not contiguous
    torch.save({"model": {"0.weight": weight}, "args": argparse.Namespace(lr=0.1)}, path)
    (stored,) = stream.tensors_of_model(path)
    assert stored.name == "0.weight" and torch.equal(torch.cat(list(stored.pieces())), weight.reshape(-1))
    assert stream.metadata(path) == {}
    torch.save({"model": {"0.weight": weight}, "where": Path("x")}, path)
    with pytest.raises(InputError, match="holds Python objects.*save model.state_dict"):
        stream.tensors_of_model(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("reads", [pth.load, stream.tensors_of_model], ids=["weights", "analyze"])
def test_a_whole_pickled_module_is_named_with_the_way_out(
    reads: Callable[[Path], object], zipped: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.pth"
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"whole pickled module.*torch.save\(model.state_dict\(\), FILE\)"):
        reads(path)


# --- smaller things ---------------------------------------------------------------------------------------------------


class Ends(nn.Module):
    """A head whose value goes into a log-softmax, or into a sum with another."""

    def __init__(self, norm: nn.Module, adds: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.adds = nn.Conv2d(3, 8, 3, 2, 1), norm, adds
        self.head, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x))).mean((2, 3))
        return self.head(x) + self.other(x) if self.adds else torch.log_softmax(self.head(x) + 0.5, 1)


@pytest.mark.slow
@pytest.mark.parametrize("adds", [True, False])
def test_layers_before_a_sum_or_a_log_softmax_run_on_integers(adds: bool, tmp_path: Path) -> None:
    one = made(lambda: Ends(nn.BatchNorm2d(8), adds))
    proof = require_proved(ptq(one), one, tmp_path, 28)
    nodes = proof.measures["nodes"]
    assert nodes["QGemm"] == 1 + adds and not {"Gemm", "FusedGemm", "MatMul"} & set(nodes)


@pytest.mark.slow
def test_a_synchronised_batch_norm_is_folded_as_any() -> None:
    one = made(lambda: Ends(nn.BatchNorm2d(8), True))
    spec = replace(one.model, factory=lambda: Ends(nn.SyncBatchNorm(8), True))
    coded = ptq(replace(one, model=spec))
    assert torch.equal(coded.coded["stem.weight"].codes, ptq(one).coded["stem.weight"].codes)
    assert not any(name.startswith("norm.") for name in coded.floats)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["w8a8", "w8", "palette of floats", "lsq"])
def test_a_batch_norm_without_statistics_is_refused_before_any_work(command: str) -> None:
    one = made(lambda: Ends(nn.BatchNorm2d(8, track_running_stats=False), True))
    with pytest.raises(
        InputError, match="BatchNorm 'norm' uses no running statistics, so its result depends on the batch"
    ):
        COMMANDS[command](one)


@pytest.mark.slow
def test_a_batch_norm_without_statistics_is_said_where_networks_are_float(
    r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    norm = "nn.BatchNorm2d(1, track_running_stats=False)"
    Path("net.py").write_text(
        "from torch import nn\n"
        f"def make(num_classes):\n    return nn.Sequential({norm}, nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    line = ["--model", "net.py:make", "--data", "digits:64", "--size", 8, "--device", "cpu"]
    trained = r2("pretrain", *line, "--epochs", 1, "-o", "m.safetensors")
    for ran in (trained, r2("evaluate", "m.safetensors", "--model", "net.py:make")):
        assert ran.code == 0 and "the BatchNorm '0' uses no running statistics" in " ".join(ran.err.split())


def test_values_in_any_layout_are_searched_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = grid_search.spread(torch.randn(30, 4).T)
    assert found.values.is_contiguous()


def test_no_more_processes_decode_than_there_are_cores() -> None:
    assert 1 <= machine.usable_cores() <= (os.cpu_count() or 1)


def _small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _pruned() -> nn.Sequential:
    model = _small()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


COMPUTED: dict[str, Factory] = {
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 3, 2, 1)), *_small()[1:]),
    "masks": _pruned,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_is_computed_once(kind: str, tmp_path: Path) -> None:
    one = made(COMPUTED[kind])
    coded = ptq(one)
    assert set(coded.coded) == {"0.weight", "4.weight"} and set(coded.floats) == {"0.bias", "4.bias"}
    require_proved(coded, one, tmp_path, 28)
    if kind == "masks":
        assert (coded.coded["0.weight"].decode() == 0).float().mean() >= 0.5


def test_masks_in_a_file_are_applied_and_that_is_said(tmp_path: Path) -> None:
    path, model = tmp_path / "masked.pth", _pruned()
    torch.save(model.state_dict(), path)
    weights, others = foreign.fitted(foreign.read(path), str(path), _small(), "small")
    assert torch.equal(weights["0.weight"], structure.weight_of(model[0])) and others == ["0.weight_mask"]
    assert data_notes.told_of_beside(path, others).endswith(
        "1 masks of pruned weights were applied: the zeros are weights now"
    )
    assert set(foreign.fitted(foreign.read(path), str(path), _pruned(), "pruned")[0]) == set(model.state_dict())
    (stored,) = [each for each in stream.tensors_of_model(path) if each.name == "0.weight"]
    assert torch.equal(torch.cat(list(stored.pieces())), structure.weight_of(model[0]).detach().reshape(-1))


# --- weights of any shape ---------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Weights that no module of torch holds: for each head, over the tokens, and in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.heads, self.tokens = nn.Parameter(torch.randn(2, 4, 6) / 2), nn.Parameter(torch.randn(9, 36) / 6)
        self.pairs = nn.Bilinear(12, 12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(2).transpose(1, 2).unflatten(-1, (2, 4))
        x = torch.einsum("bnhd,hde->bnhe", x, self.heads).flatten(2)
        x = torch.relu(self.tokens @ x)
        return self.pairs(x.mean(1), x.amax(1))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_weight_of_any_shape_is_codes(command: str, tmp_path: Path) -> None:
    one = made(Heads)
    coded = COMMANDS[command](one)
    assert set(coded.coded) == {"conv.weight", "heads.weight", "tokens.weight", "pairs_1.weight"}
    proof = require_proved(coded, one, tmp_path, DECIBELS.get(command, 12))
    assert "100 % of the weights' bytes" in next(c.detail for c in proof.checks if c.name == "integer weights")


# --- recurrent layers -------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """An image's rows through a recurrent layer, all its steps read."""

    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.rows = kind(24, 8, batch_first=True, **options)
        self.head = nn.Linear(48 * (1 + self.rows.bidirectional), 4)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.rows(torch.relu(self.conv(x)).transpose(1, 2).flatten(2))
        return self.head(found.flatten(1))


class Started(nn.Module):
    """Steps first, first states of the network's own, and the last state read."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.conv, self.start = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 8)
        self.rows, self.head = kind(24, 8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        first = torch.tanh(self.start(x.mean((2, 3)))).unsqueeze(0).repeat(2, 1, 1)
        is_lstm = isinstance(self.rows, nn.LSTM)
        steps, last = self.rows(x.permute(2, 0, 1, 3).flatten(2), (first, -first) if is_lstm else first)
        return self.head((last[1] if is_lstm else last)[-1] + steps[0])


class Stepped(nn.Module):
    """An image's rows one by one through a cell."""

    def __init__(self, kind: Callable[..., nn.RNNCellBase], **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.rows, self.head = kind(24, 8, **options), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, state = torch.relu(self.conv(x)), None
        for row in x.transpose(1, 2).flatten(2).unbind(1):
            state = self.rows(row, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


RECURRENT: dict[str, Factory] = {
    "lstm": lambda: Rows(nn.LSTM),
    "gru": lambda: Rows(nn.GRU),
    "lstm of two ways": lambda: Rows(nn.LSTM, num_layers=2, bidirectional=True),
    "gru without biases": lambda: Rows(nn.GRU, bidirectional=True, bias=False),
    "rnn": lambda: Rows(nn.RNN, nonlinearity="relu", bidirectional=True),
    "started lstm": lambda: Started(nn.LSTM),
    "started gru": lambda: Started(nn.GRU),
    "lstm cell": lambda: Stepped(nn.LSTMCell),
    "gru cell": lambda: Stepped(nn.GRUCell),
    "rnn cell without biases": lambda: Stepped(nn.RNNCell, bias=False),
}
AT_ONCE = (
    ("w8", "lstm of two ways"),
    ("w8a8", "gru"),
    ("palette", "lstm"),
    ("lsq", "started gru"),
    ("w8", "lstm cell"),
)
EVERY = [pytest.param(*p, marks=() if p in AT_ONCE else pytest.mark.slow) for p in product(COMMANDS, RECURRENT)]


def _own_name(name: str) -> str:
    return name.removesuffix(".weight") if ".weight_" in name else name


@pytest.mark.slow
@pytest.mark.parametrize(("command", "kind"), EVERY)
@torch.no_grad()
def test_each_weight_of_a_recurrent_layer_is_codes(command: str, kind: str, tmp_path: Path) -> None:
    one = made(RECURRENT[kind])
    coded = COMMANDS[command](one)
    assert {_own_name(name) for name in coded.coded} == {n for n, tensor in one.floats.items() if tensor.ndim > 1}
    proof = require_proved(coded, one, tmp_path, DECIBELS.get(command, 12))
    assert "100 % of the weights' bytes" in next(c.detail for c in proof.checks if c.name == "integer weights")
    if coded.activations:
        assert "recurrent layer" in {each["kind"] for each in proof.measures["float_operations"]}
    else:  # torch's own layer with the decoded weights is what the file computes
        state = {**coded.floats, **{_own_name(name): each.decode() for name, each in coded.coded.items()}}
        model = RECURRENT[kind]()
        model.load_state_dict(state)
        found = runtime.runner(tmp_path / "model.onnx")(images(5))
        assert torch.allclose(found, model.eval()(images(5)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adaround", "brecq"])
def test_methods_that_see_layers_at_work_leave_a_recurrent_weight_at_its_nearest_codes(
    method: str, tmp_path: Path
) -> None:
    one = made(RECURRENT["lstm"])
    coded, nearest = ptq(one, method=method, bits=4), ptq(one, bits=4)
    for name in ("rows.weight_ih_l0.weight", "rows.weight_hh_l0.weight"):
        assert torch.equal(coded.coded[name].codes, nearest.coded[name].codes)
    assert not torch.equal(coded.coded["conv.weight"].codes, nearest.coded["conv.weight"].codes)
    require_proved(coded, one, tmp_path, 16)


@pytest.mark.slow
def test_a_float_weight_of_a_recurrent_layer_fails_the_proof(tmp_path: Path) -> None:
    one = made(RECURRENT["lstm"])
    coded = ptq(one)
    name = "rows.weight_hh_l0.weight"
    floats = {**coded.floats, name: coded.coded[name].decode()}
    others = {key: each for key, each in coded.coded.items() if key != name}
    proof = proof_of(replace(coded, floats=floats, coded=others), one, tmp_path)
    (failed,) = [check for check in proof.checks if not check.passed]
    assert failed.name == "integer weights" and failed.detail == f"{name}, which LSTM reads, is float"


def test_weights_of_a_recurrent_layer_without_a_graph_are_refused() -> None:
    with pytest.raises(InputError, match="the weights of the recurrent layer 'rows' need the network's graph"):
        structure.weighted(RECURRENT["lstm"](), embeddings=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_an_lstm_that_projects_its_state_is_refused() -> None:
    with pytest.raises(InputError, match="lstm .* projects its state"):
        ptq(made(lambda: nn.Sequential(nn.Flatten(2), Last(nn.LSTM(144, 8, proj_size=4, batch_first=True)))))


class Last(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]
