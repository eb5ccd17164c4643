"""`r2 verify` on files of r2's: alone, against the checkpoint, and with a fault in the file."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import test_planted_faults as faults
from onnx import helper, numpy_helper

import r2cli
from conftest import R2
from r2cli.deploy import runtime
from r2cli.storage import checkpoint

DATA = ["--data", "digits:64", "--runtime", "onnxruntime"]


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of eight bits; its file is beside it."""
    path = tmp_path_factory.mktemp("made") / "net.safetensors"
    result = r2cli.quantize(trained, "digits:64", r2cli.PtqConfig(calibration=64))
    path.write_bytes(checkpoint.to_bytes(result.checkpoint))
    r2cli.export(result, path.with_suffix(".onnx"))
    return path


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (made, made.with_suffix(".onnx")):
        Path(name.name).write_bytes(name.read_bytes())
    return tmp_path


@pytest.mark.slow
def test_a_file_of_r2_s_is_proved_alone_and_against_its_checkpoint(r2: R2, here: Path) -> None:
    alone = r2("verify", "net.onnx", *DATA)
    assert alone.code == 0 and alone.out.count("✓") == 6 and "next: r2 evaluate net.onnx" in alone.out, alone.err
    assert "on 64 test images of digits" in alone.out
    ran = r2("verify", "net.onnx", "--against", "net.safetensors", "--eval-images", 32, *DATA, "--json")
    told = json.loads(ran.out)
    assert ran.code == 0 and told["ticks"] == "10/10" and told["samples"] == 32 and told["output"] == "net.onnx"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("code flipped", ["same codes", "conv.weight"]),
        ("biases swapped", ["same biases", "conv.bias"]),
        ("zero point by one", ["same grids", "grid that the checkpoint has not"]),
        ("weights in float", ["integer weights", "weights, which Conv reads"]),
    ],
)
def test_a_fault_is_caught_and_named(fault: str, names: list[str], r2: R2, here: Path) -> None:
    file = onnx.load("net.onnx")
    faults.PLANTED[fault][0](file)
    Path("net.onnx").write_bytes(file.SerializeToString())
    ran = r2("verify", "net.onnx", "--against", "net.safetensors", *DATA)
    assert ran.code == 1 and all(name in ran.err for name in ["net.onnx failed its proof", *names]), ran.err


@pytest.mark.slow
def test_a_file_of_another_checkpoint_fails(r2: R2, here: Path) -> None:
    made = checkpoint.load(Path("net.safetensors"))
    name = next(iter(made.coded))
    made.coded[name].codes.neg_()
    Path("other.safetensors").write_bytes(checkpoint.to_bytes(made))
    ran = r2("verify", "net.onnx", "--against", "other.safetensors", *DATA)
    assert ran.code == 1 and f"same codes ({name}" in ran.err


def test_overflow_is_measured_where_the_processor_has_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = r2cli.VerifyConfig(runtime=["onnxruntime"])
    file = made.with_suffix(".onnx")
    for vnni in (True, False):
        monkeypatch.setattr(runtime, "has_vnni", lambda vnni=vnni: vnni)
        proof = r2cli.verify(file, data="digits:64", config=config)
        assert proof.passed and (proof.measures["overflow_db"] is None) == vnni


def test_dry_run_reads_nothing(r2: R2, tmp_path: Path) -> None:
    ran = r2("verify", tmp_path / "none.onnx", "--dry-run")
    assert ran.code == 0 and "would verify" in ran.out


@pytest.mark.slow
def test_a_file_of_data_that_stands_elsewhere_gets_random_inputs(r2: R2, here: Path) -> None:
    file = onnx.load("net.onnx")
    entry = next(each for each in file.metadata_props if each.key == "r2.history")
    assert '"data":"digits"' in entry.value
    for name in ("imagefolder", "mine.py:pictures"):
        changed = onnx.ModelProto()
        changed.CopyFrom(file)
        own = next(each for each in changed.metadata_props if each.key == "r2.history")
        own.value = entry.value.replace('"data":"digits"', f'"data":"{name}"')
        Path("net.onnx").write_bytes(changed.SerializeToString())
        ran = r2("verify", "net.onnx")
        assert ran.code == 0 and "on random inputs input 8x1x8x8" in ran.out, ran.err


def test_the_float_checkpoint_is_not_taken_for_the_file_s_own(r2: R2, trained: Path, here: Path) -> None:
    ran = r2("verify", "net.onnx", "--against", trained, *DATA)
    assert ran.code == 2 and "is float, and the file holds codes that r2 ptq made: give the checkpoint" in ran.err


def test_a_file_made_without_data_says_how_to_go_on(r2: R2, here: Path) -> None:
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32), "w")
    shapes = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 16), ("y", 64))]
    layer = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    graph = helper.make_graph([layer], "g", shapes[:1], shapes[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), "float.onnx")
    made = r2("ptq", "float.onnx", "--act-bits", "none", "-o", "codes.safetensors")
    assert made.code == 0 and "next: r2 verify codes.onnx --against codes.safetensors" in made.out, made.err
    again = r2("verify", "codes.onnx", "--against", "codes.safetensors", "--runtime", "onnxruntime")
    assert again.code == 0 and "next: r2 analyze codes.onnx" in again.out, again.err
    ran = r2("evaluate", "codes.onnx")
    assert ran.code == 2 and "the file was made without data: give --data" in ran.err
    written = r2("export", "float.onnx", "-o", "again.onnx")
    assert written.code == 0 and "next: r2 analyze again.onnx" in written.out, written.err
    beside = r2("verify", "codes.onnx", "--against", "float.onnx", "--runtime", "onnxruntime")
    assert beside.code == 0, beside.err
