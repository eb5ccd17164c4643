"""docs/deploy.md: its targets are those of r2, and its examples in Python for ONNX Runtime and OpenVINO run."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import r2cli
from r2cli import data
from r2cli.config import targets

TEXT = (Path(__file__).parent.parent / "docs" / "deploy.md").read_text()


@pytest.mark.parametrize(
    "library",
    [
        "onnxruntime",
        pytest.param("openvino", marks=pytest.mark.skipif(find_spec("openvino") is None, reason="not installed")),
    ],
)
def test_an_example_gives_the_logits(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
    made = r2cli.quantize(net.eval(), data.load("digits"), r2cli.PtqConfig(weight_bits=4, calibration=32))
    r2cli.export(made, "model.onnx")
    images = torch.randn(4, 1, 16, 16)
    (example,) = re.findall(rf"```python\n(import {library}\n.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {"images": images.numpy()}
    exec(compile(example, "deploy.md", "exec"), names)
    assert torch.equal(torch.from_numpy(names["logits"]).argmax(1), made.network(images).argmax(1))


@pytest.mark.skipif(find_spec("ai_edge_litert") is None, reason="not installed")
def test_the_example_of_tensorflow_lite_gives_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))
    made = r2cli.quantize(net.eval(), data.load("digits"), r2cli.PtqConfig(target="tflite", calibration=32))
    r2cli.export(made, "model.tflite")
    images = torch.randn(1, 1, 16, 16)
    (example,) = re.findall(r"```python tflite\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {"images": images.numpy()}
    exec(compile(example, "deploy.md", "exec"), names)
    step = float([*made.checkpoint.activations.values()][-1].scale)  # of the logits
    with torch.no_grad():
        assert float((torch.from_numpy(names["logits"]) - made.network(images)).abs().max()) <= 2.01 * step


def test_every_target_has_its_row_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+(?:-\w+)?)` \|", TEXT, re.MULTILINE)
    assert rows == list(targets.TARGETS)
