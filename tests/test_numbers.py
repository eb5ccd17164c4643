"""Sums and products with numbers, and leaky ReLUs: on integers between layers, in float where they read floats."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import r2cli
from r2cli import data as datasets
from r2cli.deploy import float_nodes


class Numbers(nn.Module):
    """A hard swish by hand, negative numbers, a difference, a leaky ReLU, a sum under a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2)
        self.third, self.head = nn.Conv2d(6, 6, 3), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x * F.relu6(x + 3) * (1 / 6)
        x = F.leaky_relu(self.second(x), 0.1)
        x = F.relu(self.third(x * -0.5 - 0.25) + 0.5)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def source() -> datasets.Data:
    return r2cli.load_data("digits:64", size=8)


def made(network: nn.Module, source: datasets.Data, path: Path) -> Any:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    result = r2cli.quantize(network.eval(), source, r2cli.PtqConfig(device="cpu"))
    r2cli.export(result, path)
    return r2cli.verify(path, result, source)


def test_numbers_run_on_integers(source: datasets.Data, tmp_path: Path) -> None:
    proof = made(Numbers(), source, tmp_path / "numbers.onnx")
    assert proof.passed and not proof.measures["float_operations"] and proof.measures["sqnr_db"] > 50
    nodes = proof.measures["nodes"]
    assert (nodes["QLinearMul"], nodes["QLinearAdd"], nodes["QLinearLeakyRelu"]) == (3, 3, 1)
    assert not {"Mul", "Add", "Sub", "LeakyRelu", "DequantizeLinear"} & nodes.keys()


class Zero(nn.Module):
    """0 is no step of a grid, and the network's result has none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 4, 8), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.flatten(self.first(x) * 0.0 + 1.0, 1)) * 2.0
        return logits


def test_what_has_no_grid_stays_in_float_and_is_said(source: datasets.Data, tmp_path: Path) -> None:
    proof = made(Zero(), source, tmp_path / "zero.onnx")
    assert proof.passed, proof.checks
    assert [each["kind"] for each in proof.measures["float_operations"]] == ["product with 0", "product with a number"]


def test_a_product_with_a_plain_number_counts_as_float(source: datasets.Data, tmp_path: Path) -> None:
    """As other tools write it: the number is a float, and runtimes multiply in float."""
    made(Numbers(), source, tmp_path / "numbers.onnx")
    file = onnx.load(tmp_path / "numbers.onnx")
    assert not float_nodes.operators(file)
    product = next(node for node in file.graph.node if node.op_type == "Mul" and node.input[1].startswith("mul"))
    file.graph.initializer.append(onnx.helper.make_tensor("plain", onnx.TensorProto.FLOAT, [], [1 / 6]))
    product.input[1] = "plain"
    assert float_nodes.operators(file) == {"Mul": 1}


class Head(nn.Module):
    """A convolution that gives the network's result, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 10, 6)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.first(x))).flatten(1)
        return logits


def test_a_convolution_that_gives_the_result_is_said_to_run_in_float(source: datasets.Data, tmp_path: Path) -> None:
    proof = made(Head(), source, tmp_path / "head.onnx")
    assert proof.passed, proof.checks
    assert [each["kind"] for each in proof.measures["float_operations"]] == ["convolution"]
    assert "the network's result" in proof.measures["float_operations"][0]["reason"]
    assert proof.measures["nodes"]["QLinearConv"] == 1
