"""`--keep` says all there is to say of a layer, and activations have 16 bits: in the codes, the file and its proof."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

import r2cli
from r2cli import data
from r2cli.calibration import deployed
from r2cli.config import layer_form, values
from r2cli.deploy import onnx_export
from r2cli.deploy.audit import Check
from r2cli.errors import InputError
from r2cli.graph import left_float
from r2cli.ptq import post_training
from r2cli.qat import prepare
from r2cli.quantized.grid import Grid
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import Checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(trained: Path) -> Checkpoint:
    return checkpoint.load(trained)


def _quantized(
    made: Checkpoint, keep: Mapping[str, int | str], *, acts: int | None = 8, method: str = "none"
) -> tuple[Checkpoint, dict[str, post_training.QuantizedLayer]]:
    settings = post_training.PtqSettings(method, 4, acts, "channel", keep)
    images = [batch for batch, _ in data.calibration(data.load("digits", spec=made.input), 64, CPU, 0)]
    coded, rows = post_training.quantize(made, settings, images, CPU)
    return coded.then("ptq", {"keep": keep}, {}), {row.layer: row for row in rows}


def _proof(coded: Checkpoint, path: Path) -> dict[str, Check]:
    path.write_bytes(onnx_export.to_bytes(coded))
    source = data.with_test_images(data.load("digits", spec=coded.input), 16)
    return {check.name: check for check in r2cli.verify(path, coded, source, timed=False).checks}


@pytest.mark.parametrize(
    ("words", "form", "word"),
    [
        ("4", layer_form.LayerForm(4), 4),
        ("W4A16,tensor", layer_form.LayerForm(4, 16, "tensor"), "W4A16,tensor"),
        ("asymmetric", layer_form.LayerForm(symmetric=False), "asymmetric"),
        ("float", layer_form.LayerForm(is_float=True), "float"),
        ("float,3", layer_form.LayerForm(3), 3),
        ("W4,tensor,mse", layer_form.LayerForm(4, granularity="tensor", weight_range="mse"), "W4,tensor,mse"),
        ("minmax", layer_form.LayerForm(weight_range="minmax"), "minmax"),
        ("a8", layer_form.LayerForm(act_bits=8), "A8"),
    ],
)
def test_words_become_a_form_and_the_form_words(words: str, form: layer_form.LayerForm, word: int | str) -> None:
    assert layer_form.of(words) == form and form.word == word and layer_form.of(word) == form


def test_words_of_one_pattern_and_of_several_add_up() -> None:
    assert values.keep(["a=4", "a=tensor", "b=float"]) == {"a": "W4,tensor", "b": "float"}
    forms = post_training.forms(
        ["conv", "fc"], post_training.PtqSettings("none", 2, 8, "channel", {"*": "tensor", "fc": 8})
    )
    assert [(each.granularity, each.weight_bits) for each in forms.values()] == [("tensor", 2), ("tensor", 8)]
    for bad, told in (("tensr", "'tensor'"), ("W9", "1 to 8"), ("A12", "or 16"), ("", "known are")):
        with pytest.raises(InputError, match=told):
            values.keep([f"conv={bad}"])


def test_each_word_is_in_the_codes_the_table_and_a_file_that_passes_its_proof(made: Checkpoint, tmp_path: Path) -> None:
    keep = {"conv": "W8A16", "classifier": "float", "stages.0.*": "tensor", "stages.1.0.conv1": "W2,asymmetric"}
    keep["stages.2.0.conv1"] = "mse"
    coded, rows = _quantized(made, keep)
    conv, flat, odd = (coded.coded[f"{name}.weight"].codec for name in ("conv", "stages.0.0.conv1", "stages.1.0.conv1"))
    assert isinstance(odd, Grid) and bool(odd.zero_point.any()) and odd.bits == 2 and conv.bits == 8
    assert flat.scale.numel() == 1 and conv.scale.numel() == 16
    assert "classifier.weight" not in coded.coded and rows["classifier"].note == "--keep leaves it float"
    assert torch.equal(coded.floats["classifier.weight"], made.floats["classifier.weight"])
    assert (rows["conv"].act_bits, rows["stages.0.0.conv1"].act_bits) == (16, 8)
    assert rows["stages.0.0.conv1"].grid == "tensor" and rows["stages.1.0.conv1"].note == "asymmetric"
    plain, wide = (_quantized(made, {**keep, "stages.2.0.conv1": own})[1]["stages.2.0.conv1"] for own in (4, "minmax"))
    assert rows["stages.2.0.conv1"].note == "mse range" and plain.sqnr == wide.sqnr < rows["stages.2.0.conv1"].sqnr
    assert checkpoint.to_bytes(_reread(coded, tmp_path)) == checkpoint.to_bytes(coded)
    checks = _proof(coded, tmp_path / "m.onnx")
    assert not [check for check in checks.values() if not check.passed]
    assert "1 as --keep asks" in checks["integer weights"].detail
    file = onnx.load(tmp_path / "m.onnx")
    assert file.opset_import[0].version == 21
    assert {one.name for one in file.graph.initializer if one.data_type == onnx.TensorProto.UINT16}


def _reread(coded: Checkpoint, folder: Path) -> Checkpoint:
    checkpoint.save(coded, folder / "m.safetensors")
    return checkpoint.load(folder / "m.safetensors")


def test_a_layer_that_nobody_asked_to_stay_float_fails_the_audit(made: Checkpoint, tmp_path: Path) -> None:
    coded, _ = _quantized(made, {"classifier": "float"})
    assert left_float.asked(coded) == ["classifier"]
    silent = replace(coded, history=coded.history[:-1])
    assert not _proof(silent, tmp_path / "m.onnx")["integer weights"].passed


@pytest.mark.slow
def test_a_sweep_over_layers_and_onnx_runtime_leave_a_float_layer_alone(made: Checkpoint, tmp_path: Path) -> None:
    """ONNX Runtime would quantize the weights of a layer between two grids itself, if it saw that it is so."""
    coded, rows = _quantized(made, {"stages.1.0.conv1": "float", "conv": "A16"}, method="dfq")
    assert "stages.1.0.conv1.weight" not in coded.coded and rows["conv"].act_bits == 16
    assert not [check for check in _proof(coded, tmp_path / "m.onnx").values() if not check.passed]


@pytest.mark.slow
def test_trained_layers_have_their_form(made: Checkpoint, tmp_path: Path) -> None:
    keep: dict[str, int | str] = {"conv": "W8A16", "stages.1.0.conv2": "W3A4", "stages.2.0.conv1": "float"}
    source = data.load("digits", spec=made.input)
    settings = prepare.QatSettings("lsq", 4, 8, keep)
    work = prepare.QatTask(made, settings, lambda: data.calibration(source, 64, CPU, 0), CPU)
    ready = prepare.prepare(work)
    coded, rows = prepare.finish(work, ready)
    reads = {row.layer: (row.bits, row.act_bits) for row in rows}
    assert reads["conv"] == (8, 16) and reads["stages.1.0.conv2"] == (3, 4) and reads["stages.2.0.conv1"] == (32, None)
    checks = _proof(coded.then("qat", {"keep": keep}, {}), tmp_path / "m.onnx")
    assert not [check for check in checks.values() if not check.passed]


def test_activations_of_16_bits_are_nearly_exact_and_their_codes_are(made: Checkpoint, tmp_path: Path) -> None:
    coded, _ = _quantized(made, {}, acts=16)
    plain, _ = _quantized(made, {}, acts=None)
    assert {grid.bits for grid in coded.activations.values()} == {16}
    image, _ = next(iter(data.calibration(data.load("digits", spec=made.input), 64, CPU, 0)))
    fine, exact = (deployed.network(each)(image).detach() for each in (coded, plain))
    assert float((fine - exact).square().sum() / exact.square().sum()) < 1e-7
    assert not [check for check in _proof(coded, tmp_path / "m.onnx").values() if not check.passed]
