"""Networks that people brought: each kind of layer, weight and file through every command, and what the file is."""

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from r2cli import models
from r2cli.calibration import deployed
from r2cli.data import Batch
from r2cli.deploy import onnx_export, runtime, verify
from r2cli.graph.read import trace
from r2cli.graph.transposed import TransposedConv, exchanged
from r2cli.palettes import compression
from r2cli.ptq import adaround, post_training
from r2cli.qat import prepare
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
    for seed in range(2):
        model(images(seed))
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


# --- transposed convolutions, and those of three axes ----------------------------------------------------------------


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


@pytest.mark.parametrize(("command", "kind"), FULL, ids=[" ".join(pair) for pair in FULL])
def test_every_weight_is_codes_and_every_norm_is_folded(command: str, kind: str, tmp_path: Path) -> None:
    one = made(KINDS[kind])
    coded = COMMANDS[command](one)
    weights = {name for name, tensor in one.floats.items() if tensor.ndim > 1}
    assert set(coded.coded) == weights and not any(name.startswith("norm.") for name in coded.floats)
    require_proved(coded, one, tmp_path, DECIBELS.get(command, 12))


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
    assert torch.equal(exchanged(layer.weight, groups), model[0].weight)
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
    out = layer(x)
    index = torch.randperm(out[:, 0].numel())[:50]
    seen = adaround.patches(x, layer, out.shape[2:], index)  # type: ignore[arg-type]
    filters = layer.weight.reshape(layer.groups, -1, seen.shape[2])  # type: ignore[union-attr, operator]
    found = (seen @ filters.transpose(1, 2)).transpose(0, 1).flatten(1) + layer.bias
    assert torch.allclose(found, out.movedim(1, -1).flatten(0, -2)[index], atol=1e-5)
