"""Weights of linear layers in groups of inputs: `--group-size`, for weights alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import r2cli
from r2cli.calibration import deployed
from r2cli.config.groups import FileForm
from r2cli.data.task import UNLABELLED
from r2cli.deploy import onnx_export, runtime, verify
from r2cli.errors import InputError
from r2cli.ptq import weight_grids
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage import checkpoint


class Mlp(nn.Module):
    """80 inputs are two groups and a half; the second layer reads three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(80, 64), nn.Linear(64, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).unsqueeze(1)).squeeze(1)


def made(**options: Any) -> checkpoint.Checkpoint:
    torch.manual_seed(0)
    drawn = torch.Generator().manual_seed(0)
    source = r2cli.load_data([(torch.randn(8, 80, generator=drawn), None)])
    config = r2cli.PtqConfig(act_bits="none", group_size=32, device="cpu", **options)
    return r2cli.quantize(Mlp(), source, config).checkpoint


def test_each_group_has_its_own_scale() -> None:
    weight = torch.cat([0.01 * torch.ones(3, 32), torch.ones(3, 32), 7 * torch.ones(3, 16)], 1)
    weight[0, 0] = 0.005
    grid = weight_grids.grouped_grid(weight, 4, 32)
    assert grid.scale.shape == (3, 3) and torch.allclose(grid.scale, torch.tensor([0.01, 1, 7]) / 7)
    one = Coded(grid, grid.encode(weight))
    assert torch.allclose(one.decode(), weight, atol=0.001)
    assert one.payload_bytes() == 3 * 80 // 2 + 4 * 9


def test_groups_with_zero_points() -> None:
    weight = torch.rand(4, 80, generator=torch.Generator().manual_seed(0)) + 1
    grid = weight_grids.grouped_grid(weight, 8, 64, symmetric=False)
    assert (grid.decode(grid.encode(weight)) - weight).abs().max() <= grid.scale.max() / 2 + 1e-6


@pytest.mark.parametrize(("bits", "symmetric", "opset"), [(4, True, 13), (3, False, 13), (4, False, 21), (8, True, 21)])
def test_a_file_of_groups_is_proved_and_comes_back(bits: int, symmetric: bool, opset: int, tmp_path: Path) -> None:
    own = made(weight_bits=bits, symmetric=symmetric)
    checkpoint.save(own, tmp_path / "net.safetensors")
    read = checkpoint.load(tmp_path / "net.safetensors")
    assert all(
        isinstance(one.codec, Grid) and one.codec.group == 32 and read.coded[name].decode().equal(one.decode())
        for name, one in own.coded.items()
    )
    path = tmp_path / "net.onnx"
    path.write_bytes(onnx_export.to_bytes(own, FileForm(opset=None if opset == 13 else opset)))
    read = replace(read, model=own.model)  # a file does not run its own code
    network = deployed.network(read)
    proof = verify.prove(path, read, network, [(torch.randn(4, 80), None)], Mlp(), UNLABELLED)
    assert proof.passed, [check for check in proof.checks if not check.passed]
    assert onnx.load(path).opset_import[0].version == opset
    if bits == 4 or Version(runtime.VERSION) >= Version("1.30"):  # ONNX Runtime 1.23 has no such kernel for 8 bits
        assert proof.measures["nodes"].get("MatMulNBits", 0) == (opset == 21)  # the other layer becomes a Gemm


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"act_bits": "8"}, "--act-bits none"),
        ({"act_bits": "none", "method": "adaround"}, "--method adaround"),
        ({"act_bits": "none", "granularity": "tensor"}, "--granularity tensor"),
        ({"act_bits": "none", "group_size": 48}, "32, 64 or 128"),
    ],
)
def test_what_has_no_groups_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        r2cli.PtqConfig(**{"group_size": 32, **options})


def test_a_convolution_has_no_groups() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    source = r2cli.load_data([(torch.randn(8, 1, 8, 8), None)])
    with pytest.raises(InputError, match="'0' is a Conv2d: leave it out"):
        r2cli.quantize(network, source, r2cli.PtqConfig(act_bits="none", group_size=32, device="cpu"))
