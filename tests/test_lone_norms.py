"""BatchNorms in front of their convolutions, as DenseNet and pre-activation networks have them, on integers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import r2cli
from r2cli import data as datasets
from r2cli.calibration.result import Result
from r2cli.deploy import speed


class Dense(nn.Module):
    """Two layers of a DenseNet: norm, ReLU, convolution; and what went in is kept beside what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 6, 3, padding=1)
        self.last, self.head = nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(self.norm1(x).relu())], 1)
        x = torch.cat([x, self.conv2(self.norm2(x).relu())], 1)
        logits: Tensor = self.head(self.last(x).relu().mean((2, 3)))
        return logits


@pytest.fixture
def source() -> datasets.Data:
    return r2cli.load_data("digits:64", size=8)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    net = Dense()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -2, 2)  # some factors are below 0
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.get_buffer("running_var"), 0.01, 4)  # and far apart
    return net.eval()


SHORT: dict[str, Any] = {"epochs": 1, "device": "cpu"}
ROADS: dict[str, Callable[[nn.Module, datasets.Data], Result]] = {
    "W8A8": lambda net, data: r2cli.quantize(net, data, r2cli.PtqConfig(device="cpu")),
    "W2A8 a tensor": lambda net, data: r2cli.quantize(
        net, data, r2cli.PtqConfig(weight_bits=2, granularity="tensor", device="cpu")
    ),
    "qat": lambda net, data: r2cli.finetune(net, data, r2cli.QatConfig(weight_bits=4, **SHORT)),
    "palettes": lambda net, data: r2cli.palettize(net, data, r2cli.PalettizeConfig(method="kmeans", device="cpu")),
}


@pytest.mark.parametrize("road", [pytest.param(road, marks=pytest.mark.slow) for road in ROADS])
def test_a_norm_in_front_of_a_convolution_is_on_integers(
    road: str, network: nn.Module, source: datasets.Data, tmp_path: Path
) -> None:
    result = ROADS[road](network, source)
    path = tmp_path / "model.onnx"
    r2cli.export(result, path)
    proof = r2cli.verify(path, result, source)
    assert proof.passed, [check for check in proof.checks if not check.passed]
    assert not proof.measures["float_operations"]
    nodes = proof.measures["nodes"]
    assert "BatchNormalization" not in nodes and nodes["QLinearConv"] == 6
    assert {"norm1_alone.weight", "norm2_alone.weight", "last_alone.weight"} < set(result.checkpoint.coded)
    for name in ("norm1", "last"):  # a channel's one weight is exact, whatever the bits are
        norm, own = network.get_submodule(name), result.checkpoint.coded[f"{name}_alone.weight"].decode()
        if road not in ("qat", "palettes"):  # which train, or find the statistics again
            assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
            expected = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs()
            assert torch.allclose(own.flatten().abs(), expected, rtol=1e-5)
    if road == "W8A8":
        assert proof.measures["float_sqnr_db"] > 30
        given = {"input": np.zeros((1, 1, 8, 8), np.float32)}
        assert speed.of_checkpoint(path, result.checkpoint, given).float_latency_ms > 0


def test_what_follows_a_layer_gets_none(source: datasets.Data) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    result = r2cli.quantize(net, source, r2cli.PtqConfig(device="cpu"))
    assert set(result.checkpoint.coded) == {"0.weight", "4.weight"}


@pytest.mark.parametrize("road", ["W8A8", pytest.param("qat", marks=pytest.mark.slow)])
def test_a_norm_of_vectors_goes_into_the_linear_layer_behind_it(
    road: str, source: datasets.Data, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    norm, before = nn.BatchNorm1d(6), (nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.uniform_(norm.get_buffer("running_var"), 0.01, 4)
    nn.init.normal_(norm.bias)
    net = nn.Sequential(*before, norm, nn.Linear(6, 10, bias=False))
    result, path = ROADS[road](net.eval(), source), tmp_path / "model.onnx"
    r2cli.export(result, path)
    proof = r2cli.verify(path, result, source)
    assert proof.passed and (road == "qat" or proof.measures["float_sqnr_db"] > 30), proof.checks
    assert "BatchNormalization" not in proof.measures["nodes"] and not proof.measures["float_operations"]
    assert "5.bias" in result.checkpoint.floats and "4.weight" not in result.checkpoint.floats


class Tokens(nn.Module):
    """A BatchNorm of the features of tokens behind a linear layer, as LeViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.norm, self.head = (
            nn.Conv2d(1, 6, 3),
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, 10),
        )
        nn.init.normal_(self.norm.weight)
        nn.init.uniform_(self.norm.get_buffer("running_var"), 0.01, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.stem(x).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(nn.functional.hardswish(self.norm(x.flatten(0, 1)).reshape_as(x)).mean(1))
        return logits


@pytest.mark.parametrize("road", ["W8A8", *(pytest.param(road, marks=pytest.mark.slow) for road in ("brecq", "qat"))])
def test_a_norm_of_tokens_goes_into_the_linear_layer_before_it(
    road: str, source: datasets.Data, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, path = Tokens().eval(), tmp_path / "model.onnx"
    brecq = r2cli.PtqConfig(weight_bits=4, method="brecq", calibration=32, device="cpu")
    result = r2cli.quantize(net, source, brecq) if road == "brecq" else ROADS[road](net, source)
    r2cli.export(result, path)
    proof = r2cli.verify(path, result, source, timed=False)
    assert proof.passed and (road != "W8A8" or proof.measures["float_sqnr_db"] > 25), proof.checks
    assert "BatchNormalization" not in proof.measures["nodes"]
    assert set(result.checkpoint.coded) == {"stem.weight", "mix.weight", "head.weight"}
