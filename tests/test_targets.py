"""Targets: what the file of each is like, that it is proved as it is, and what is refused before any work."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import r2cli
from conftest import R2
from r2cli import ExportForm, data
from r2cli.calibration.result import Result
from r2cli.config import targets
from r2cli.deploy import runtime
from r2cli.deploy.retarget import retarget
from r2cli.errors import InputError
from r2cli.storage import checkpoint


class Tiny(nn.Module):
    """A convolution, a gate, a sum, a pool and a linear layer: 16 pixels to ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        y = self.body(x)
        x = F.relu(x + y * F.hardsigmoid(y))
        return self.head(x.mean((2, 3)))


@cache
def _data() -> data.Data:
    return data.with_test_images(data.load("digits"), 24)


@cache
def _made(target: str, bits: int) -> Result:
    torch.manual_seed(0)
    return r2cli.quantize(Tiny().eval(), _data(), r2cli.PtqConfig(weight_bits=bits, target=target, calibration=32))


def _kinds(file: onnx.ModelProto, operator: str, place: int) -> set[int]:
    """The types of the constants that the nodes of `operator` read at `place`."""
    held = {each.name: each for each in file.graph.initializer}
    read = [node.input[place] for node in file.graph.node if node.op_type == operator and len(node.input) > place]
    return {held[name].data_type for name in read if name in held}


# Codes of activations, integer biases, packed weights, and the batch.
FORMS = {
    "onnxruntime": (TensorProto.UINT8, True, True, 0),
    "openvino": (TensorProto.UINT8, True, True, 0),
    "tensorrt": (TensorProto.INT8, False, False, 0),
    "qnn": (TensorProto.UINT8, True, True, 1),
    "npu": (TensorProto.UINT8, True, False, 1),
    "xnnpack": (TensorProto.INT8, True, True, 0),
    "rknn": (TensorProto.UINT8, True, False, 1),
    "st": (TensorProto.INT8, True, False, 1),
}


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("target", FORMS)
def test_a_file_is_what_its_target_wants_and_passes_its_proof(target: str, bits: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    own = target if targets.get(target).symmetric else targets.DEFAULT  # all others are forms of the same numbers
    r2cli.export(_made(own, bits), path, ExportForm(target=target))
    file = onnx.load(path)
    codes, integer_biases, packed, batch = FORMS[target]
    assert (file.opset_import[0].version, file.ir_version) == (13, 8)
    assert _kinds(file, "QuantizeLinear", 2) == {codes}
    assert _kinds(file, "Conv", 2) == (set() if integer_biases else {TensorProto.FLOAT})
    assert (TensorProto.INT32 in _kinds(file, "DequantizeLinear", 0)) == integer_biases
    assert ("Gather" in {node.op_type for node in file.graph.node}) == (packed and bits == 4)
    assert [each.type.tensor_type.shape.dim[0].dim_value for each in (*file.graph.input, *file.graph.output)] == 2 * [
        batch
    ]
    if targets.get(target).symmetric:
        held = {each.name: numpy_helper.to_array(each) for each in file.graph.initializer}
        assert not any(value.any() for name, value in held.items() if name.endswith("zero_point"))
    proof = r2cli.verify(path, _made(own, bits), _data())
    assert proof.passed, proof.checks


def test_every_target_with_integers_has_its_form_checked_above() -> None:
    assert {name for name, row in targets.TARGETS.items() if row.integers and row.container == "onnx"} == set(FORMS)


def test_codes_of_activations_are_never_clipped_for_tensorrt(tmp_path: Path) -> None:
    """Equalization leaves a bound for each channel: in the codes by default, in the values for TensorRT."""
    found = {}
    for target in ("onnxruntime", "tensorrt"):
        torch.manual_seed(0)
        config = r2cli.PtqConfig(method="dfq", target=target, calibration=32)
        result = r2cli.quantize(Clipped().eval(), _data(), config)
        path = tmp_path / f"{target}.onnx"
        r2cli.export(result, path)
        assert r2cli.verify(path, result, _data()).passed
        types = onnx.shape_inference.infer_shapes(onnx.load(path)).graph.value_info
        kind = {each.name: each.type.tensor_type.elem_type for each in types}
        found[target] = {kind[node.output[0]] for node in onnx.load(path).graph.node if node.op_type == "Min"}
    assert found == {"onnxruntime": {TensorProto.UINT8}, "tensorrt": {TensorProto.FLOAT}}


class Clipped(nn.Module):
    """Two convolutions with a ReLU6 between them, of channels of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 10, 3)
        with torch.no_grad():
            self.first.weight *= torch.tensor([30.0, 10, 3, 1]).reshape(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu6(self.first(x)))).mean((2, 3))


def test_a_checkpoint_with_zero_points_is_refused_by_tensorrt_and_the_way_out_named() -> None:
    with pytest.raises(InputError, match=r"zero point \('\w+'\).*again with --target tensorrt"):
        r2cli.export(_made("onnxruntime", 8), form=ExportForm(target="tensorrt"))
    assert r2cli.export(_made("tensorrt", 8), form=ExportForm(target="onnxruntime"))


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        (r2cli.PtqConfig, {"target": "tensort"}, "did you mean 'tensorrt'"),
        (r2cli.PtqConfig, {"target": "openvino", "act_bits": 4}, "no activations of 4 bits: give --act-bits 8"),
        (r2cli.QatConfig, {"target": "qnn", "act_bits": 2}, "no activations of 2 bits"),
        (r2cli.PtqConfig, {"target": "tensorrt", "act_bits": "none"}, "give --act-bits 8"),
        (r2cli.PtqConfig, {"target": "xnnpack", "symmetric": False}, "give --symmetric"),
        (r2cli.PtqConfig, {"target": "float"}, "r2 export --target float"),
        (r2cli.PalettizeConfig, {"target": "st", "lut_bits": 32}, "give --lut-bits 8"),
        (ExportForm, {"batch": "0"}, "--batch 0 is impossible"),
        (ExportForm, {"opset": 12}, "give 13 or more"),
    ],
)
def test_what_a_target_cannot_hold_is_refused_by_the_options(kind: type, given: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        kind(**given)


def test_zero_points_of_channels_need_a_new_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.26.1")
    with pytest.raises(InputError, match="ONNX Runtime 1.26 cannot run.*--granularity tensor"):
        r2cli.PtqConfig(symmetric=False)
    assert r2cli.PtqConfig(symmetric=False, granularity="unfolded")
    assert r2cli.PtqConfig(symmetric=False, act_bits="none")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.27.0")
    assert r2cli.PtqConfig(symmetric=False)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 2])
def test_palettes_become_int8_weights_where_a_table_cannot_be_read(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = r2cli.PalettizeConfig(bits=bits, dim=2 if bits < 8 else 1, method="kmeans", target="tensorrt")
    result, path = r2cli.palettize(Tiny().eval(), _data(), config), tmp_path / "model.onnx"
    r2cli.export(result, path)
    assert _kinds(onnx.load(path), "DequantizeLinear", 0) <= {TensorProto.INT8}
    assert r2cli.verify(path, result, _data()).passed


def test_tables_of_floats_are_refused_where_weights_are_int8() -> None:
    torch.manual_seed(0)
    result = r2cli.palettize(Tiny().eval(), _data(), r2cli.PalettizeConfig(method="kmeans", lut_bits=32))
    with pytest.raises(InputError, match="float tables.*--lut-bits 8"):
        r2cli.export(result, form=ExportForm(target="st"))


@pytest.mark.slow
def test_training_for_tensorrt_keeps_every_zero_point_in_the_middle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = r2cli.QatConfig(weight_bits=4, target="tensorrt", epochs=1, images=64, calibration=32)
    result, path = r2cli.finetune(Tiny(), _data(), config), tmp_path / "model.onnx"
    assert {int(grid.zero_point) for grid in result.checkpoint.activations.values()} == {128}
    r2cli.export(result, path)
    assert r2cli.verify(path, result, _data()).passed


def test_the_float_network_of_weights_alone_is_written_and_activations_on_grids_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = r2cli.PtqConfig(weight_bits=4, act_bits="none", calibration=0)
    alone, path = r2cli.quantize(Tiny().eval(), _data(), config), tmp_path / "model.onnx"
    r2cli.export(alone, path, ExportForm(target="float"))
    assert _kinds(onnx.load(path), "Conv", 1) == {TensorProto.FLOAT}
    assert r2cli.verify(path, alone, _data()).passed
    with pytest.raises(InputError, match="export the float checkpoint"):
        r2cli.export(_made("onnxruntime", 8), form=ExportForm(target="float"))


def test_a_checkpoint_keeps_its_target_and_an_unknown_one_is_damage(tmp_path: Path) -> None:
    made, path = _made("tensorrt", 8).checkpoint, tmp_path / "model.safetensors"
    checkpoint.save(made, path)
    assert checkpoint.load(path).target == "tensorrt"
    assert runtime.target_of(onnx.load_from_string(r2cli.export(made))) == "tensorrt"
    path.write_bytes(path.read_bytes().replace(b"tensorrt", b"tensorxx"))
    with pytest.raises(InputError, match="'target' is 'tensorxx'"):
        checkpoint.load(path)


def test_a_weight_that_needs_a_zero_point_to_fit_is_refused() -> None:
    torch.manual_seed(0)
    net = Tiny().eval()
    with torch.no_grad():
        net.stem.weight.abs_()
    made = r2cli.quantize(net, _data(), r2cli.PtqConfig(symmetric=False, calibration=32)).checkpoint
    with pytest.raises(InputError, match=r"'stem.weight'.* fits INT8 only with a zero point"):
        retarget(made, "npu")
    four = r2cli.quantize(net, _data(), r2cli.PtqConfig(weight_bits=4, symmetric=False, calibration=32)).checkpoint
    assert retarget(four, "npu").target == "npu"  # its integers fit without one


def test_a_fixed_batch_runs_any_number_of_images(tmp_path: Path) -> None:
    made, images = _made("onnxruntime", 8), torch.rand(5, *_data().input.shape)
    logits = []
    for batch in ("dynamic", "2"):
        path = tmp_path / f"{batch}.onnx"
        r2cli.export(made, path, ExportForm(batch=batch))
        logits.append(runtime.runner(path)(images))
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert torch.equal(*logits) and len(logits[0]) == 5


def test_a_higher_opset_holds_the_same_network_and_a_target_bounds_it(tmp_path: Path) -> None:
    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x.mean(1).amax(1)))

    torch.manual_seed(0)
    made = r2cli.quantize(Means().eval(), _data(), r2cli.PtqConfig(act_bits="none", calibration=0))
    for opset in (17, 21):
        path = tmp_path / f"{opset}.onnx"
        r2cli.export(made, path, ExportForm(opset=opset))
        assert onnx.load(path).opset_import[0].version == opset
        assert r2cli.verify(path, made, _data()).passed
    with pytest.raises(InputError, match="LayerNormalization exists from opset 17 on: give --opset 17"):
        r2cli.export(made, form=ExportForm(opset=13))
    with pytest.raises(InputError, match="the target reads opset 19 at most"):
        r2cli.export(made, form=ExportForm(opset=20, target="rknn"))


def test_relus_that_int8_codes_clip_themselves_are_left_out() -> None:
    """ONNX Runtime fuses no ReLU with INT8 codes, and would run the convolution in float."""

    def relus(target: str) -> list[str]:
        file = onnx.load_from_string(r2cli.export(_made("onnxruntime", 8), form=ExportForm(target=target)))
        return [node.op_type for node in file.graph.node if node.op_type in ("Relu", "Clip")]

    assert relus("xnnpack") == [] and len(relus("onnxruntime")) == 2


def test_the_command_lists_all_targets(r2: R2) -> None:
    ran = r2("targets", "--json")
    rows = json.loads(ran.out)["targets"]
    assert ran.code == 0 and [row["name"] for row in rows] == list(targets.TARGETS)
    assert {row["runs"] for row in rows if row["name"] == "tensorrt"} == {targets.READ}
    shown = r2("targets").out
    assert all(name in shown for name in targets.TARGETS)


@pytest.mark.slow
def test_commands_write_for_a_target_and_name_their_outputs_after_it(r2: R2, tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    made = r2cli.pretrain("resnet8", data.with_fewer(_data(), 64, 0), r2cli.PretrainConfig(epochs=1)).checkpoint
    checkpoint.save(made, source)
    few = ["--eval-images", "8"]
    ran = r2("ptq", source, "--target", "tensorrt", "--calibration", "16", *few)
    assert ran.code == 0, ran.err
    quantized = tmp_path / "model.w8a8-none-tensorrt.safetensors"
    assert checkpoint.load(quantized).target == "tensorrt"
    ran = r2("export", quantized, "--target", "npu", "--batch", "4", *few)
    assert ran.code == 0, ran.err
    file = onnx.load(tmp_path / "model.w8a8-none-tensorrt.npu.onnx")
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4
    assert np.all([kind == TensorProto.UINT8 for kind in _kinds(file, "QuantizeLinear", 2)])
