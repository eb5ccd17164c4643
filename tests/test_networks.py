"""Networks of every shape through `ptq`: gates, attention, windows, dense blocks; what stays float is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from r2cli import models
from r2cli.calibration import deployed
from r2cli.deploy import engines, float_nodes, onnx_export, runtime, second_engine, verify
from r2cli.errors import InputError
from r2cli.graph import batchnorm, placement, structure
from r2cli.graph.read import trace
from r2cli.ptq import adaround, brecq, layer_sweep, post_training
from r2cli.ptq.ptq_method import PtqMethod
from r2cli.quantized.coded import Coded
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec
from r2cli.storage.input_spec import Given

CPU = torch.device("cpu")


class Mixed(nn.Module):
    """Hard-swish, SiLU, halves that are joined and shuffled, squeeze and excitation, a functional mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.swish = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        self.narrow, self.silu = nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()
        self.squeeze, self.excite, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Hardsigmoid()
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.swish(self.norm(self.stem(x)))
        first, second = x.chunk(2, 1)
        y = torch.cat([self.silu(self.narrow(first)), second], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        gate = self.gate(self.excite(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(y, 1)))))
        return self.head((x + y * gate).mean([2, 3]))


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 1, 2, 24, 48, num_classes=10)


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 16, [2, 1], [2, 2], [3, 3], num_classes=10)


def convnext() -> nn.Module:
    blocks = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)]
    return torchvision.models.ConvNeXt(blocks, layer_scale=0.5, num_classes=10)


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(4, (2, 1), 8, num_classes=10)


def _images(seed: int, count: int, size: int) -> Tensor:
    """Each of its own contrast and colour: white noise all looks alike to a network."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    contrast = 2 * torch.rand(count, 3, 1, 1, generator=generator)
    return pixels * contrast + torch.randn(count, 3, 1, 1, generator=generator)


def _made(factory: Callable[[], nn.Module] | str, size: int, args: dict[str, Any] | None = None) -> Checkpoint:
    """Random weights, BatchNorms that have seen images, and no parameter that is zero all over."""
    torch.manual_seed(0)
    if isinstance(factory, str):
        spec = ModelSpec(factory, 10, args=args or {})
    else:
        spec = ModelSpec("networks.py:factory", 10, factory=factory)
    model = models.build(spec)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(1.0)  # a deep random network is chaotic without
                module.momentum = None
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
        model.train()
        for seed in range(2):
            model(_images(seed, 16, size))
    state = {name: tensor.contiguous() for name, tensor in model.eval().state_dict().items()}
    return Checkpoint(spec, InputSpec(3, size, size, (0.0,) * 3, (1.0,) * 3), tuple("0123456789"), state)


def _quantized(made: Checkpoint, *, bits: int = 8, method: str = "none", act_bits: int | None = 8) -> Checkpoint:
    images = [_images(seed, 16, made.input.size) for seed in (2, 3)]
    return post_training.quantize(
        made, post_training.PtqSettings(method, bits, act_bits, post_training.CHANNEL, {}), images, CPU
    )[0]


def _network(made: Checkpoint) -> torch.fx.GraphModule:
    net = deployed.network(made)
    assert isinstance(net, torch.fx.GraphModule)
    return net


SIZES = {Mixed: 16, vit: 16, swin: 40, convnext: 32, densenet: 32}
# What stays float, by kind and how often.
LEFT: dict[Callable[[], nn.Module], dict[str, int]] = {
    Mixed: {},
    vit: {"concatenation": 1, "sum": 3, "layer norm": 3, "attention": 1, "GELU": 1},
    swin: {
        "layer norm": 9,
        "sum": 10,
        "GELU": 3,
        "concatenation": 1,
        "mean": 1,
        "softmax": 3,
        "product of values": 6,
        "product with a number": 3,
    },
    convnext: {"layer norm": 6, "GELU": 3, "product": 3, "sum": 3, "mean": 1},
    densenet: {},
}


@pytest.mark.slow
@pytest.mark.parametrize("factory", SIZES, ids=lambda factory: factory.__name__)
@torch.no_grad()
def test_every_weight_is_coded_and_what_stays_float_is_said(factory: Callable[[], nn.Module]) -> None:
    made = _made(factory, SIZES[factory])
    coded = _quantized(made)
    weights = {
        name.replace("in_proj_weight", "in_proj.weight")
        for name, module in deployed.network(made).named_parameters()
        if module.ndim > 1 and not any(part in name for part in ("token", "pos_embedding", "bias_table", "layer_scale"))
    }
    assert {name for name in coded.coded if not name.endswith("_alone.weight")} == weights
    net = _network(coded)
    left = placement.float_operations(net, made.input.shape)
    kinds = [each.kind for each in left]
    assert {kind: kinds.count(kind) for kind in kinds} == LEFT[factory]
    assert all(each.reason and each.operators for each in left)
    images = _images(4, 16, made.input.size)
    expected, found = deployed.network(made)(images), net(images)
    noise = (found - expected).square().sum() / expected.square().sum()
    assert float(10 * torch.log10(noise)) < -20  # 8 bits a value, through a few layers


class Long(nn.Module):
    """More operations in a row than Python calls, and more ways through them than can be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for _ in range(600):
            x = x + x.tanh()
        return x


@pytest.mark.slow
def test_what_a_long_network_leaves_in_float_is_found() -> None:
    left = placement.float_operations(trace(Long(), torch.zeros(2, 4)), (4,))
    assert len(left) == 1200 and {each.kind for each in left} == {"sum", "tanh"}


@pytest.mark.slow
@pytest.mark.parametrize("factory", [vit, swin], ids=lambda factory: factory.__name__)
@torch.no_grad()
def test_attention_as_layers_is_the_same_function(factory: Callable[[], nn.Module]) -> None:
    model = deployed.network(_made(factory, SIZES[factory])).eval()
    images = _images(4, 4, SIZES[factory])
    expected = model(images)
    assert torch.allclose(trace(model, images)(images), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("factory", SIZES, ids=lambda factory: factory.__name__)
def test_adaround_sweeps_every_graph(factory: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    visited = []

    def as_it_is(seen: layer_sweep.LayerSample, nearest: Coded) -> Coded:
        assert seen.inputs.shape == seen.rounded_inputs.shape
        visited.append(seen.layer.weight)
        return nearest

    monkeypatch.setattr(adaround, "METHOD", PtqMethod(as_it_is, with_steps=adaround.with_steps))
    coded = _quantized(_made(factory, SIZES[factory]), bits=4, method="adaround", act_bits=None)
    assert sorted(visited) == sorted(coded.coded)


@pytest.mark.slow
@pytest.mark.parametrize("factory", SIZES, ids=lambda factory: factory.__name__)
@torch.no_grad()
def test_the_blocks_of_every_graph_are_the_graph(factory: Callable[[], nn.Module]) -> None:
    made = _made(factory, SIZES[factory])
    net = trace(deployed.network(made), made.input.blank(2))
    batchnorm.remove_norms(net)
    blocks, images = brecq.blocks(net), _images(4, 2, SIZES[factory])
    x: Given = images
    expected = net(x)
    for block in blocks:
        assert block.layers
        x = brecq.run(net, block, x, {})
    assert isinstance(x, Tensor) and x.equal(expected)
    assert [name for block in blocks for name in block.layers] == [layer.name for layer in structure.layers(net)]
    coded = _quantized(made, bits=3, method="brecq", act_bits=None) if factory is Mixed else None
    assert coded is None or len(coded.coded) == 5


@pytest.mark.slow
@pytest.mark.parametrize("factory", [Mixed, vit, "mobilenet_v3_small"], ids=lambda own: getattr(own, "__name__", own))
def test_the_file_runs_and_holds_no_float_that_was_not_announced(
    factory: Callable[[], nn.Module] | str, tmp_path: Path
) -> None:
    size = 32 if isinstance(factory, str) else SIZES[factory]
    coded = _quantized(_made(factory, size))
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(coded))
    batches = [(_images(seed, 16, size), torch.zeros(16, dtype=torch.int64)) for seed in (5, 6)]
    proof = verify.prove(path, coded, deployed.network(coded), batches)
    assert proof.passed, proof.checks
    nodes = proof.measures["nodes"]
    assert not {"Conv", "FusedConv", "Gemm", "HardSwish", "HardSigmoid", "Sigmoid", "ReduceMean"} & set(nodes)
    if factory is not vit:
        assert not {"Mul", "Add", "MatMul"} & set(nodes)
        assert not float_nodes.operators(runtime.read(path))


# Of each family the smallest; with those above and below they are twenty. benchmarks/networks.py has a hundred.
QUICK = ("test_efficientnet", "test_resnet", "test_vit")
FAMILIES = (
    *("test_byobnet", "test_convnext", "test_convnext2", "test_convnext3", "test_efficientnet_gn", "test_nfnet"),
    *("test_efficientnet_ln", "test_efficientnet_evos", "test_mambaout", "test_vit2"),
    *("tinynet_e", "mobilenetv3_small_050"),
)


@pytest.mark.parametrize(
    "name",
    [
        *(f"timm:{name}" for name in QUICK),
        *(pytest.param(f"timm:{name}", marks=pytest.mark.slow) for name in FAMILIES),
    ],
)
def test_a_network_of_timm_is_read_quantized_and_proved(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    made = _made(name, 32, {"img_size": 32} if "vit" in name else {})
    coded, path = _quantized(made), tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(coded))
    batch = _images(5, 8, 32), torch.zeros(8, dtype=torch.int64)
    proof = verify.prove(path, coded, deployed.network(coded), [batch])
    assert proof.passed, proof.checks
    assert proof.measures["integer_share"] == 100
    assert "BatchNormalization" not in proof.measures["nodes"]


@pytest.mark.slow
def test_the_audit_sees_a_sum_in_float(tmp_path: Path) -> None:
    helper = onnx.helper
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("x", "z")]
    scale = onnx.numpy_helper.from_array(torch.tensor(0.1).numpy(), "s")
    zero = onnx.numpy_helper.from_array(torch.tensor(0, dtype=torch.uint8).numpy(), "o")
    rounding = [
        helper.make_node("QuantizeLinear", ["x", "s", "o"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "o"], ["d"]),
    ]
    back = [
        helper.make_node("QuantizeLinear", ["y", "s", "o"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "s", "o"], ["z"]),
    ]

    def file(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
        own = helper.make_graph(nodes, "g", value[:1], value[1:], [scale, zero])
        return helper.make_model(own, opset_imports=[helper.make_opsetid("", 21)])

    on_grids = helper.make_node("Add", ["d", "d"], ["y"])
    assert not float_nodes.operators(file([*rounding, on_grids, *back]))
    of_a_float = helper.make_node("Add", ["d", "x"], ["y"])
    assert float_nodes.operators(file([*rounding, of_a_float, *back])) == {"Add": 1}
    not_rounded = helper.make_node("Add", ["d", "d"], ["z"])
    assert float_nodes.operators(file([*rounding, not_rounded])) == {"Add": 1}


class Branch(nn.Module):
    """Reads a shape to decide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 4:
            x = nn.functional.avg_pool2d(x, 2)
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class ByValue(Branch):
    """Reads values to decide, which no graph can."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_a_network_without_a_graph_gets_its_weights_quantized_alone() -> None:
    made = _made(ByValue, 16)
    coded = _quantized(made, bits=4, act_bits=None)
    assert set(coded.coded) == {"conv.weight", "head.weight"} and not coded.folded


@pytest.mark.slow
def test_a_network_that_reads_sizes_gets_grids_too(tmp_path: Path) -> None:
    coded = _quantized(_made(Branch, 16))
    assert coded.folded and {"x", "relu"} <= set(coded.activations)
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(coded))
    proof = verify.prove(
        path, coded, deployed.network(coded), [(_images(5, 16, 16), torch.zeros(16, dtype=torch.int64))]
    )
    assert proof.passed, proof.checks


class Tokens(nn.Module):
    """A token of its own before those of the image, and places that layers compute from numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 1, 8))
        self.places = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)
        nn.init.uniform_(self.patches.get_parameter("bias"), -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.norm(x + self.places(torch.linspace(-1, 1, x.shape[1]).unsqueeze(1))).mean(1))


def test_tokens_before_an_image_and_layers_on_numbers_alone(tmp_path: Path) -> None:
    coded = _quantized(_made(Tokens, 16))
    assert set(coded.coded) == {"patches.weight", "head.weight"}  # dropout stands in nobody's way
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(coded))
    assert "Shape" not in {node.op_type for node in runtime.read(path).graph.node}  # OpenVINO moves it to a wrong place
    batches = [(_images(seed, 16, 16), torch.zeros(16, dtype=torch.int64)) for seed in (5, 6)]
    assert verify.prove(path, coded, deployed.network(coded), batches).passed
    assert all(
        second_engine.check(path, each, [{"input": batches[0][0].numpy()}]).passed for each in engines.chosen([])
    )


class Words(nn.Module):
    """Operations that networks of timm have: a scale and a shift at once, rolls, places counted, and pads of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(9, 10)
        self.scale, self.shift = (nn.Parameter(torch.rand(1, 8, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(self.shift, self.scale, self.stem(x), value=0.5)
        x = self.layer(x.roll((1, 2), (2, 3))).mean((2, 3))
        places = (~torch.zeros(x.shape[0], 8, dtype=torch.bool)).cumsum(1, dtype=torch.float32)
        steps = torch.arange(8).expand(x.shape[0], -1)
        new = (
            torch.diff(steps, 2, prepend=steps[:, :1] - 1, append=steps[:, :1]) != 0
        )  # as transformers finds sequences
        places = places + new.cumsum(-1)
        return self.head(nn.functional.pad(x + places / 8, (0, 1), value=1.0))


def test_words_of_a_network_are_read_and_written(tmp_path: Path) -> None:
    coded = _quantized(_made(Words, 16))
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(coded))
    batches = [(_images(seed, 16, 16), torch.zeros(16, dtype=torch.int64)) for seed in (5, 6)]
    proof = verify.prove(path, coded, deployed.network(coded), batches)
    assert proof.passed, proof.checks
    assert {"product", "sum"} <= {each["kind"] for each in proof.measures["float_operations"]}
    assert all(
        second_engine.check(path, each, [{"input": batches[0][0].numpy()}]).passed for each in engines.chosen([])
    )


def test_a_network_that_nobody_can_read_is_refused() -> None:
    with pytest.raises(InputError, match="cannot read ByValue.*at test_networks.py line .*--act-bits none"):
        _quantized(_made(ByValue, 16))


@pytest.mark.slow
def test_attention_between_two_values_is_read() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.cross = nn.Linear(16, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x)
            return self.cross(x, x + 1, x)[0]

    torch.manual_seed(0)
    model, x = Cross().eval(), torch.randn(2, 5, 16)
    net = trace(model, x)
    assert torch.allclose(net(x), model(x), atol=1e-6)
    layers = {layer.name: tuple(module.weight.shape) for layer, module in structure.named_layers(net)}
    assert layers["patches"] == (8, 16) and layers["cross.out_proj"] == (8, 8)
    assert sum(shape[0] for name, shape in layers.items() if "in_proj" in name) == 24
