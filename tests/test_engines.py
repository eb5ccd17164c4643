"""A file in another runtime than ONNX Runtime."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import r2cli
from conftest import R2
from r2cli.api import proof_inputs
from r2cli.deploy import engines, runtime, second_engine
from r2cli.deploy.engines import ENGINES, Arrays, Run
from r2cli.storage.atomic import scratch_folder

needs_openvino = pytest.mark.skipif(not ENGINES["openvino"].installed, reason="openvino is not installed")


@pytest.fixture(scope="module")
def trained_once(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a ResNet-8 at several widths, by name."""
    folder, found = tmp_path_factory.mktemp("widths"), {}
    for name, config in (
        ("w8a8", r2cli.PtqConfig(calibration=64)),
        ("w2a8", r2cli.PtqConfig(calibration=64, weight_bits=2)),
        ("w4a4", r2cli.PtqConfig(calibration=64, weight_bits=4, act_bits="4")),
        ("w4", r2cli.PtqConfig(calibration=64, weight_bits=4, act_bits="none")),
    ):
        found[name] = folder / f"{name}.onnx"
        r2cli.export(r2cli.quantize(trained, "digits:64", config), found[name])
    return found


def _given(path: Path) -> list[Arrays]:
    return proof_inputs.of_data(path, r2cli.load_data("digits:64", size=8)).batches


MEANS = [
    nn.AvgPool2d(*sizes, ceil_mode=True, count_include_pad=counted)
    for sizes in ((3, 3, 1), (2, 2, 0), (3, 2, 1))
    for counted in (True, False)
]
GREATEST = [
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("pool", [*MEANS, *GREATEST], ids=str)
def test_a_pool_whose_last_window_reaches_beyond_is_one_number_everywhere(pool: nn.Module, tmp_path: Path) -> None:
    """torch never counts what is beyond the border; of `ceil_mode` runtimes think differently, so no file has it."""
    torch.manual_seed(0)
    size = 15 if isinstance(pool, nn.AvgPool2d) else 14
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(4, 4, 1), nn.Flatten())
    network.append(nn.LazyLinear(10))
    network(torch.zeros(1, 1, size, size))
    result = r2cli.quantize(network, r2cli.load_data("digits:64", size=size), r2cli.PtqConfig(device="cpu"))
    path = tmp_path / "model.onnx"
    r2cli.export(result, path)
    proof = r2cli.verify(path, result)
    assert proof.passed, proof.checks
    assert "ceil_mode" not in {each.name for node in runtime.read(path).graph.node for each in node.attribute}


@needs_openvino
@pytest.mark.slow
@pytest.mark.usefixtures("every_engine")
@pytest.mark.parametrize("name", ["w8a8", "w2a8", "w4a4", "w4"])
def test_openvino_agrees_at_every_width(name: str, trained_once: dict[str, Path]) -> None:
    proof = r2cli.verify(trained_once[name], data="digits:64")
    last = proof.checks[-1]
    enough = "20 dB are enough" if name == "w4a4" and "by plain kernels" in last.detail else "30 dB are enough"
    assert proof.passed and last.name == "openvino" and enough in last.detail, last
    assert ("by plain kernels" in last.detail) <= (name != "w2a8")  # products of two bits cannot overflow


@needs_openvino
@pytest.mark.slow
def test_a_fault_in_one_runtime_only_is_caught(trained_once: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    two, eight = trained_once["w2a8"], trained_once["w8a8"]
    given = _given(two)
    usual = engines.together(ENGINES["onnxruntime"].load(two, 1, False), given)

    def told(path: Path, change: Change, *, plain: bool, **more: Any) -> tuple[bool, str]:
        """The check of a runtime whose kernels are wrong, the plain ones too or not."""
        reference = usual if path == two else None
        found = second_engine.check(path, _changed(change, plain), given, reference, **more)
        return found.passed, found.detail

    monkeypatch.setattr(runtime, "has_vnni", lambda: False)
    assert not told(two, _reversed, plain=True)[0] and not told(two, _reversed, plain=False)[0]
    passed, detail = told(eight, _reversed, plain=False)
    assert passed and "overflow on this processor without VNNI" in detail
    assert not told(eight, _reversed, plain=True)[0]
    monkeypatch.setattr(runtime, "has_vnni", lambda: True)
    assert not told(eight, _reversed, plain=False)[0]
    passed, detail = told(two, _nearly, plain=False)
    assert passed and "add residuals on grids of their own (26 dB" in detail
    assert not told(two, _nearly, plain=True)[0]
    assert told(two, _nearly, plain=True, usual_db=30.0)[0]


Change = Callable[[engines.Array], engines.Array]


def _reversed(found: engines.Array) -> engines.Array:
    return found[:, ::-1]


def _nearly(found: engines.Array) -> engines.Array:
    return found * np.float32(1.05)  # 26 dB


def _changed(change: Change, plain_too: bool) -> engines.Engine:
    """OpenVINO with other results."""

    def load(path: Path, threads: int, plain: bool) -> Run:
        run = ENGINES["openvino"].load(path, threads, True)
        if plain and not plain_too:
            return run
        return lambda given: {name: change(value) for name, value in run(given).items()}

    return replace(ENGINES["openvino"], load=load)


@needs_openvino
@pytest.mark.slow
@pytest.mark.usefixtures("every_engine")
def test_the_proof_of_a_command_runs_there_too(r2: R2, trained: Path, tmp_path: Path) -> None:
    options = ["--data", "digits:64", "--calibration", 64, "-o", tmp_path / "n.safetensors"]
    ran = r2("ptq", trained, *options)
    assert ran.code == 0 and "✓ openvino: OpenVINO beside ONNX Runtime" in ran.out, ran.err
    only = r2("verify", tmp_path / "n.onnx", "--data", "digits:64", "--runtime", "onnxruntime")
    assert only.code == 0 and "openvino" not in only.out


@needs_openvino
@pytest.mark.slow
@pytest.mark.usefixtures("every_engine")
def test_what_openvino_cannot_load_is_a_failed_check(tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    packed = numpy_helper.from_array(np.ones((16, 1, 8), np.uint8), "p")
    scale = numpy_helper.from_array(np.ones((16, 1), np.float32), "s")
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "p", "s"], ["y"], domain="com.microsoft")
    shape = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 16]) for name in "xy"]
    graph = helper.make_graph([node], "g", shape[:1], shape[1:], [packed, scale])
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    ones = {"x": torch.ones(1, 16).numpy()}
    told = second_engine.check(path, ENGINES["openvino"], [ones], {"y": np.ones((1, 16), np.float32)})
    assert not told.passed and "fails when OpenVINO" in told.detail


@needs_openvino
@pytest.mark.slow
def test_evaluate_runs_a_file_in_the_runtime_that_is_named(r2: R2, trained_once: dict[str, Path]) -> None:
    line = ["evaluate", trained_once["w4"], "--data", "digits:64"]
    usual, other = (r2(*line, *more) for more in ([], ["--runtime", "openvino"]))
    assert usual.code == other.code == 0 and "(OpenVINO, 1 thread)" in other.out, other.err
    assert usual.out.split(" % of")[0] == other.out.split(" % of")[0]  # the same top-1


@needs_openvino
def test_a_fixed_batch_is_filled_up(tmp_path: Path) -> None:
    shape = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", shape[:1], shape[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path = tmp_path / "relu.onnx"
    path.write_bytes(model.SerializeToString())
    given = torch.randn(6, 3)
    found = engines.runner(ENGINES["openvino"], path)(given)
    assert torch.equal(found, given.relu())


def test_evaluate_refuses_a_runtime_for_a_checkpoint(r2: R2, trained: Path) -> None:
    ran = r2("evaluate", trained, "--runtime", "openvino")
    assert ran.code == 2 and "--runtime openvino is for .onnx files" in ran.err


@pytest.mark.slow
def test_evaluate_names_the_nearest_runtime(r2: R2, trained_once: dict[str, Path]) -> None:
    ran = r2("evaluate", trained_once["w8a8"], "--runtime", "openvin")
    assert ran.code == 2 and "did you mean 'openvino'?" in ran.err


@pytest.mark.slow
def test_onnx_runtime_is_an_engine_among_others(trained_once: dict[str, Path]) -> None:
    path = trained_once["w8a8"]
    ones = {"input": np.ones((2, 1, 8, 8), np.float32)}
    found = ENGINES["onnxruntime"].load(path, 1, False)(ones)
    assert np.array_equal(found["logits"], runtime.runner(path)(torch.ones(2, 1, 8, 8)).numpy())
    assert second_engine.check(path, ENGINES["onnxruntime"], [ones]).passed


@pytest.mark.slow
def test_layers_before_a_relu6_run_on_integers_at_four_bits() -> None:
    def factory() -> torch.nn.Module:
        layers = [torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU6(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU6()]
        return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(128, 10))

    torch.manual_seed(0)
    network = factory()
    with torch.no_grad():  # values up to 6 and beyond
        network.get_parameter("0.weight").mul_(20)
        network.get_parameter("2.weight").mul_(5)
    data = r2cli.load_data("digits:64", size=8)
    result = r2cli.quantize(network, data, r2cli.PtqConfig(weight_bits=4, act_bits="4", calibration=64))
    with scratch_folder() as folder:
        r2cli.export(result, folder / "few.onnx")
        counts = runtime.node_counts(folder / "few.onnx")
        proof = r2cli.verify(folder / "few.onnx", result, data)
    assert proof.passed, proof.checks
    assert counts["QLinearConv"] == 2 and not {"Conv", "FusedConv"} & counts.keys()


@pytest.mark.parametrize(
    ("coded", "wanted", "passed"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_runtime_that_nobody_asked_for_may_refuse_recurrent_layers_of_codes(
    coded: bool, wanted: bool, passed: bool, tmp_path: Path
) -> None:
    """OpenVINO's processor plugin loads no LSTM whose weights are computed. Any other failure to load is a fault."""
    codes = np.ones((1, 16, 4), np.int8)
    held = {
        "r": np.ones((1, 16, 4), np.float32),
        **({"c": codes, "s": np.float32(0.5)} if coded else {"w": codes.astype(np.float32)}),
    }
    nodes = [helper.make_node("DequantizeLinear", ["c", "s"], ["w"])] if coded else []
    nodes.append(helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=4))
    sizes = {"x": (5, 1, 4), "y": (5, 1, 1, 4)}
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size) for name, size in sizes.items()]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)), tmp_path / "m.onnx")

    def refuses(path: Path, threads: int, plain: bool) -> Run:
        raise runtime.UnloadableError("m.onnx fails when it is loaded")

    engine = replace(ENGINES["openvino"], load=refuses)
    found = second_engine.check(tmp_path / "m.onnx", engine, [{}], {"y": np.zeros(1)}, is_wanted=wanted)
    assert found.passed is passed
    assert ("not compared: OpenVINO cannot load" if passed else "fails when it is loaded") in found.detail
