"""The speed of a file beside its float network: that it is measured, and gated. No test says how fast anything is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import r2cli
from conftest import R2
from r2cli.cli import deliver
from r2cli.config.groups import CompressionGates
from r2cli.deploy import any_file, speed
from r2cli.errors import CheckFailed, InputError
from r2cli.storage import checkpoint


def _file(path: Path, batch: int | str = "n") -> Path:
    """A product of float matrices."""
    weight = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 64]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", shape[:1], shape[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.mark.parametrize("step", [1.0, -1.0], ids=["the second file is slower", "the first file is slower"])
def test_the_slower_file_says_what_costs(step: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"time": 0.0, "interval": 1000.0}

    def perf_counter() -> float:
        now["interval"] += step  # of two runs one after the other, one always takes longer
        now["time"] += now["interval"]
        return now["time"]

    monkeypatch.setattr(speed, "perf_counter", perf_counter)
    given = {"x": np.ones((1, 64), np.float32)}
    path = _file(tmp_path / "a.onnx")
    found = speed.of_files(path, path, given, given)
    assert (found.ratio < 1) == (step > 0) and found.costs == ({} if step > 0 else {"MatMul": 100.0})


def test_one_sample_is_timed_where_the_file_takes_one(tmp_path: Path) -> None:
    many = {"x": np.ones((4, 64), np.float32)}
    assert any_file.first_of(many, _file(tmp_path / "open.onnx"))["x"].shape == (1, 64)
    assert any_file.first_of(many, _file(tmp_path / "fixed.onnx", 4))["x"].shape == (4, 64)


def test_the_line_names_what_costs() -> None:
    report = {"checks": [], "embeddings": None, **speed.Speed(3.0, 2.0, {"Conv": 61.2, "Clip": 20.0}).measures()}
    assert deliver.told(report) == [
        "speed: 1.50 of float32 (3.00 ms, float 2.00, one thread; the time goes to Conv 61 %, Clip 20 %)"
    ]
    assert deliver.told({"checks": [], **speed.UNMEASURED}) == []


def test_the_gate_is_on_the_ratio() -> None:
    report = {"output": "m.onnx", "top1": 95.0, "bytes": 2000, "checks": [], **speed.Speed(1.0, 2.0, {}).measures()}
    deliver.judge(report, CompressionGates(max_latency=0.5), None)
    deliver.require(report)
    deliver.judge(report, CompressionGates(max_latency=0.4), None)
    with pytest.raises(CheckFailed, match="0.50 of the float network's time is above --max-latency 0.4"):
        deliver.require(report)
    with pytest.raises(InputError, match="--max-latency -1"):
        CompressionGates(max_latency=-1)


@pytest.mark.parametrize(
    "bound",
    [{"max_latency": 9}, {"min_sqnr": 1}, {"max_drop": 9}, {"min_metric": 1}, {"min_accuracy": 1}],
    ids=lambda one: next(iter(one)),
)
def test_a_bound_on_what_was_not_measured_is_not_met(bound: dict[str, Any]) -> None:
    report = {"output": "m.onnx", "bytes": 2000, "checks": []}
    deliver.judge(report, CompressionGates(**bound), None)
    with pytest.raises(
        CheckFailed, match=f"--{next(iter(bound)).replace('_', '-')} . is a bound on what was not measured: leave"
    ):
        deliver.require(report)


def test_a_bound_that_nothing_can_measure_is_refused_before_any_work(r2: R2, trained: Path, tmp_path: Path) -> None:
    output = ["-o", tmp_path / "net.safetensors", "--data", "digits:64", "--max-latency", 9]
    ran = r2("ptq", trained, *output, "--target", "tflite")
    assert ran.code == 2 and "is not timed here: leave out --max-latency" in ran.err
    ran = r2("export", trained, "-o", tmp_path / "net.onnx", "--data", "digits:64", "--max-latency", 9)
    assert ran.code == 2 and "--max-latency is of an .onnx file of codes" in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("clock")
def test_files_are_timed_without_labels_too(r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("from torch import nn\n\n\ndef net():\n    return nn.Conv2d(1, 4, 3)\n")
    safetensors.torch.save_file(nn.Conv2d(1, 4, 3).state_dict(), "net.safetensors")
    np.savez("images.npz", x=np.random.default_rng(0).normal(size=(16, 1, 8, 8)).astype(np.float32))
    line = ["ptq", "--model", "net.py:net", "--weights", "net.safetensors", "--data", "npz:images.npz", "--json"]
    ran = r2(*line, "--max-latency", 1e-9)
    assert ran.code == 1 and "above --max-latency 1e-09" in ran.err and json.loads(ran.out)["latency_ratio"] > 0


@pytest.mark.parametrize("command", ["ptq", "qat", "palettize"])
def test_few_bits_of_activations_are_said_to_be_slower_before_any_work(command: str, r2: R2, trained: Path) -> None:
    few, eight = (r2(command, trained, "--act-bits", bits, "--dry-run") for bits in (4, 8))
    assert few.code == 0 and "--act-bits 4 runs slower than 8 in ONNX Runtime" in few.err
    assert eight.code == 0 and "slower" not in eight.err


@pytest.mark.slow
@pytest.mark.usefixtures("clock")
def test_a_proof_measures_it_and_an_absurd_gate_fails(
    r2: R2, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = r2cli.quantize(trained, "digits:64", r2cli.PtqConfig(calibration=64))
    Path("net.safetensors").write_bytes(checkpoint.to_bytes(result.checkpoint))
    line = ["export", "net.safetensors", "--data", "digits:64", "--json"]
    ran = r2(*line, "--max-latency", 1000)
    told = json.loads(ran.out)
    assert ran.code == 0 and told["latency_ms"] > 0 and told["float_latency_ms"] > 0, ran.err
    assert told["latency_ratio"] == pytest.approx(told["latency_ms"] / told["float_latency_ms"])
    again = r2("verify", "net.onnx", "--against", "net.safetensors", "--data", "digits:64", "--max-latency", 1e-9)
    assert again.code == 1 and "above --max-latency 1e-09" in again.err and "speed: " in again.out
    made = r2("export", "net.safetensors", "-o", "float.onnx", "--data", "digits:64", "--target", "float")
    assert made.code == 2  # it has activations on grids
    quiet = r2(*line, "-o", "quiet.onnx", "--no-eval")
    assert quiet.code == 0 and json.loads(quiet.out)["latency_ratio"] is None
    both = r2(*line, "-o", "both.onnx", "--no-eval", "--max-latency", 1)
    assert both.code == 2 and "--max-latency" in both.err and "--no-eval" in both.err


@pytest.mark.usefixtures("clock")
def test_files_of_others_are_timed_beside_their_float_file(r2: R2, tmp_path: Path) -> None:
    one, other = _file(tmp_path / "one.onnx"), _file(tmp_path / "other.onnx")
    ran = r2("verify", one, "--against", other, "--runtime", "onnxruntime", "--json")
    assert ran.code == 1 and json.loads(ran.out)["latency_ratio"] > 0  # a float file
    alone = r2("verify", one, "--max-latency", 1)
    assert alone.code == 2 and "--max-latency needs --against" in alone.err
