"""The exporter and the proof: every width runs in ONNX Runtime with the checkpoint's codes, and the proof can fail."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import r2cli
from r2cli import data
from r2cli.calibration import deployed
from r2cli.deploy import audit, onnx_export, runtime, verify, weight_roles
from r2cli.errors import InputError
from r2cli.ptq import post_training
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage import checkpoint

CPU = torch.device("cpu")


def _batches(made: checkpoint.Checkpoint) -> Iterator[data.Batch]:
    return data.load("digits", spec=made.input).test.batches(256, CPU)


def _coded(
    trained: Path, bits: int, *, granularity: str = "channel", act_bits: int | None = 8, symmetric: bool = True
) -> checkpoint.Checkpoint:
    made = checkpoint.load(trained)
    images = [batch for batch, _ in data.calibration(data.load("digits", spec=made.input), 128, CPU, 0)]
    settings = post_training.PtqSettings("none", bits, act_bits, granularity, {}, symmetric=symmetric)
    return post_training.quantize(made, settings, images, CPU)[0]


def _prove(made: checkpoint.Checkpoint, path: Path, content: bytes) -> verify.Proof:
    path.write_bytes(content)
    return verify.prove(path, made, deployed.network(made), _batches(made))


INTEGER_NODES = {"QLinearConv": 9, "QLinearAdd": 3, "QGemm": 1}
FLOAT_NODES = {"Conv", "FusedConv", "Gemm", "MatMul", "DequantizeLinear", "ReduceMean"}


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "granularity"), [(8, "channel"), (4, "unfolded"), (3, "tensor"), (2, "channel")])
def test_weights_with_zero_points_run_on_integers(bits: int, granularity: str, trained: Path, tmp_path: Path) -> None:
    made = _coded(trained, bits, granularity=granularity, symmetric=False)
    zeros = [one.codec.zero_point for one in made.coded.values() if isinstance(one.codec, Grid)]
    assert sum(bool(zero.any()) for zero in zeros) > 3
    assert any(len(zero.unique()) > 1 for zero in zeros if zero.ndim) == (granularity == "channel")
    proof = _prove(made, tmp_path / "model.onnx", onnx_export.to_bytes(made))
    assert proof.passed, proof.checks
    nodes = proof.measures["nodes"]
    assert nodes.items() >= INTEGER_NODES.items() and not FLOAT_NODES & set(nodes)


@pytest.mark.slow
@pytest.mark.parametrize("act_bits", [6, 4])
def test_activations_of_few_bits_ride_in_uint8(act_bits: int, trained: Path, tmp_path: Path) -> None:
    made = _coded(trained, 4, act_bits=act_bits)
    proof = _prove(made, tmp_path / "model.onnx", onnx_export.to_bytes(made))
    assert proof.passed, proof.checks
    nodes = proof.measures["nodes"]
    assert nodes.items() >= INTEGER_NODES.items() and not FLOAT_NODES & set(nodes)
    file = runtime.read(tmp_path / "model.onnx")
    clips = [node for node in file.graph.node if node.op_type == "Clip"]
    constants = {each.name: numpy_helper.to_array(each) for each in file.graph.initializer}
    assert clips and all(int(constants[node.input[2]]) == 2**act_bits - 1 for node in clips)
    assert all(constants[node.input[2]].dtype == "uint8" for node in clips)


# Codes' container, and the nodes between it and DequantizeLinear.
FORMS = {
    8: (TensorProto.INT8, set()),
    6: (TensorProto.INT8, set()),
    4: (TensorProto.UINT8, {"Cast", "Gather", "Reshape"}),
    3: (TensorProto.UINT8, {"Cast", "Gather", "Reshape", "Add"}),
    2: (TensorProto.UINT8, {"Cast", "Gather", "Reshape"}),
    1: (TensorProto.UINT8, {"Cast", "Gather", "Reshape"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("bits", sorted(FORMS))
def test_every_width_passes_its_proof_and_runs_on_integers(bits: int, trained: Path, tmp_path: Path) -> None:
    made = _coded(trained, bits)
    proof = _prove(made, tmp_path / "model.onnx", onnx_export.to_bytes(made))
    assert proof.passed, proof.checks
    nodes = proof.measures["nodes"]
    assert nodes["QLinearConv"] == 9 and nodes["QLinearAdd"] == 3 and nodes["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "DequantizeLinear", "ReduceMean"} & set(nodes)
    file = runtime.read(tmp_path / "model.onnx")
    assert file.ir_version == 8 and [(o.domain, o.version) for o in file.opset_import] == [("", 13)]
    assert not file.functions
    container, between = FORMS[bits]
    codes = {i.data_type for name in made.coded for i in weight_roles.codes(file, name)}
    tables = {i.data_type for i in file.graph.initializer if i.name.startswith("bytes.")}
    assert codes == {container} and tables == ({TensorProto.INT8} if bits <= 4 else set())
    assert {n.op_type for n in file.graph.node} - {
        *("QuantizeLinear", "DequantizeLinear", "Conv", "Relu", "Add", "GlobalAveragePool", "Gemm"),
        *("Reshape", "Flatten"),
    } == between - {"Add", "Reshape"}


@pytest.mark.slow
def test_every_value_has_the_name_that_it_has_in_the_network(trained: Path) -> None:
    made = _coded(trained, 2)
    file = onnx.load_from_string(onnx_export.to_bytes(made))
    assert set(made.coded) <= {value for node in file.graph.node for value in node.output}
    held = {each.name for each in file.graph.initializer}
    for name in made.coded:
        assert {f"{name}.codes", f"{name}.scale"} <= held
    layers = [node.output[0] for node in file.graph.node if node.op_type == "Conv"]
    assert "stages_1_0_conv1" in layers and not any(node.doc_string for node in file.graph.node)
    biases = [each for each in file.graph.initializer if each.name.endswith(".bias.codes")]
    assert len(biases) == len(made.coded) and {each.data_type for each in biases} == {TensorProto.INT32}
    graph = onnx.load_from_string(onnx_export.to_bytes(checkpoint.load(trained))).graph
    assert "conv.weight" in {each.name for each in graph.initializer}


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "unfolded"])
def test_one_grid_per_tensor_passes_too(granularity: str, trained: Path, tmp_path: Path) -> None:
    made = _coded(trained, 4, granularity=granularity)
    assert _prove(made, tmp_path / "model.onnx", onnx_export.to_bytes(made)).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "symmetric"), [(8, True), (8, False), (4, True), (4, False), (3, True), (3, False), (1, True)]
)
def test_weights_alone_are_folded_when_they_are_loaded(
    bits: int, symmetric: bool, trained: Path, tmp_path: Path
) -> None:
    made = _coded(trained, bits, act_bits=None, symmetric=symmetric)
    proof = _prove(made, tmp_path / "model.onnx", onnx_export.to_bytes(made))
    assert proof.passed, proof.checks
    assert not {"QuantizeLinear", "DequantizeLinear", "Cast", "Sub", "Mul", "Gather"} & set(proof.measures["nodes"])


@pytest.mark.slow
def test_a_float_checkpoint_is_exported_and_compared_as_well(trained: Path, tmp_path: Path) -> None:
    made = checkpoint.load(trained)
    proof = _prove(made, tmp_path / "model.onnx", onnx_export.to_bytes(made))
    assert proof.passed and proof.measures["bits_per_weight"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(1, 8))
def test_odd_grids_of_every_width_decode_in_onnx_runtime(bits: int, trained: Path, tmp_path: Path) -> None:
    made = _coded(trained, 4, act_bits=None)
    midrise = {}
    for name, one in made.coded.items():
        scale = one.codec.scale * 8 / (2**bits - 1)
        grid = Grid(scale, torch.zeros_like(scale, dtype=torch.int32), bits, signed=False, axis=0, midrise=True)
        midrise[name] = Coded(grid, grid.encode(one.decode()))
    made = replace(made, coded=midrise)
    proof = _prove(made, tmp_path / "model.onnx", onnx_export.to_bytes(made))
    assert proof.passed, proof.checks


@pytest.mark.slow
def test_asymmetric_weights_keep_their_zero_point(trained: Path, tmp_path: Path) -> None:
    made = _coded(trained, 4)
    shifted = {}
    for name, one in made.coded.items():
        assert isinstance(one.codec, Grid)
        grid = replace(one.codec, zero_point=torch.full_like(one.codec.zero_point, 2))
        shifted[name] = Coded(grid, grid.encode(one.decode()))
    made = replace(made, coded=shifted)
    proof = _prove(made, tmp_path / "model.onnx", onnx_export.to_bytes(made))
    assert proof.passed, proof.checks
    assert proof.measures["nodes"]["QLinearConv"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("bits", [6, 4, 2])
def test_activations_below_eight_bits_are_clipped_in_their_codes(bits: int, trained: Path, tmp_path: Path) -> None:
    made = _coded(trained, 8)
    narrow = {
        name: replace(g, bits=bits, scale=g.scale * 255 / (2**bits - 1), zero_point=g.zero_point * (2**bits - 1) // 255)
        for name, g in made.activations.items()
    }
    made = replace(made, activations=narrow)
    batch, _ = next(_batches(made))
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(made))
    with torch.no_grad():
        expected = deployed.network(made)(batch)
    # Biases are off their grid here, so only the session without optimisation computes the same function.
    found = runtime.runner(path, optimise=False)(batch)
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())
    assert sum(node.op_type == "Clip" for node in runtime.read(path).graph.node) >= len(narrow)


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes(trained: Path) -> None:
    made = _coded(trained, 3)
    assert onnx_export.to_bytes(made) == onnx_export.to_bytes(made)


@pytest.mark.slow
def test_the_batch_is_dynamic_and_the_file_says_how_to_feed_it(trained: Path, tmp_path: Path) -> None:
    made, path = _coded(trained, 4), tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(made))
    run = runtime.runner(path)
    for count in (1, 5):
        assert run(torch.zeros(count, *made.input.shape)).shape == (count, 10)
    assert runtime.recorded(path).input == made.input
    assert b"/" + b"home" not in path.read_bytes() and b"site-packages" not in path.read_bytes()


class Inverted(nn.Module):
    """A stem with a max pool, as a ResNet's, and a block of MobileNet-V2."""

    def __init__(self) -> None:
        super().__init__()
        wide = (nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        deep = (nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.block = nn.Sequential(*wide, *deep, nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        logits: torch.Tensor = self.head((x + self.block(x)).mean((2, 3)))
        return logits


def test_relu6_and_a_max_pool_stay_integer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, network = r2cli.load_data("digits:64", size=16), Inverted().train()
    with torch.no_grad():
        for images, _ in source.train.batches(32, CPU):
            network(images)
    result = r2cli.quantize(network.eval(), source, r2cli.PtqConfig(weight_bits=4, device="cpu"))
    r2cli.export(result, tmp_path / "model.onnx")
    proof = r2cli.verify(tmp_path / "model.onnx", result, source)
    assert proof.passed, proof.checks
    assert proof.measures["sqnr_db"] >= 30
    assert {"Conv", "FusedConv", "Gemm", "Add", "Clip", "Relu", "DequantizeLinear"}.isdisjoint(proof.measures["nodes"])


def _failed(proof: verify.Proof) -> set[str]:
    return {check.name for check in proof.checks if not check.passed}


@pytest.mark.slow
def test_the_proof_sees_a_code_that_was_changed(trained: Path, tmp_path: Path) -> None:
    made, path = _coded(trained, 8), tmp_path / "model.onnx"
    file = onnx.load_from_string(onnx_export.to_bytes(made))
    (codes,) = weight_roles.codes(file, "conv.weight")
    changed = bytearray(codes.raw_data)
    changed[0] ^= 1
    codes.raw_data = bytes(changed)
    proof = _prove(made, path, file.SerializeToString())
    assert "same codes" in _failed(proof)
    assert "conv.weight" in next(check.detail for check in proof.checks if check.name == "same codes")


def test_the_proof_sees_a_weight_left_in_float(trained: Path, tmp_path: Path) -> None:
    made, path = _coded(trained, 8), tmp_path / "model.onnx"
    file = onnx.load_from_string(onnx_export.to_bytes(made))
    node = next(node for node in file.graph.node if node.output[0] == "stages.1.0.conv1.weight")
    weight = made.coded["stages.1.0.conv1.weight"].decode().numpy()
    file.graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
    file.graph.node.remove(node)
    assert _failed(_prove_audit(made, path, file)) >= {"integer weights"}


def _prove_audit(made: checkpoint.Checkpoint, path: Path, file: onnx.ModelProto) -> verify.Proof:
    onnx.save(file, path)
    return verify.Proof((audit.all_integer(onnx.load(path), made.coded, made.floats),), {})


@pytest.mark.slow
def test_the_proof_sees_codes_that_take_too_many_bytes(trained: Path, tmp_path: Path) -> None:
    made, path = _coded(trained, 4), tmp_path / "model.onnx"
    file = onnx.load_from_string(onnx_export.to_bytes(made))
    (codes,) = weight_roles.codes(file, "conv.weight")
    wide = numpy_helper.from_array(made.coded["conv.weight"].codes.numpy(), codes.name)
    codes.CopyFrom(wide)
    assert "size" in _failed(_prove(made, path, file.SerializeToString()))


@pytest.mark.slow
def test_the_proof_sees_logits_that_are_not_torchs(trained: Path, tmp_path: Path) -> None:
    made, path = _coded(trained, 8), tmp_path / "model.onnx"
    file = onnx.load_from_string(onnx_export.to_bytes(made))
    layer = next(node for node in file.graph.node if "stages.2.0.conv2.weight" in node.input)
    held = weight_roles.constants(file)
    bias, scale = held[f"{layer.input[2]}.codes"], held[f"{layer.input[2]}.scale"]
    noise = np.random.default_rng(0).normal(0, 1, 64) / numpy_helper.to_array(scale)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.rint(noise).astype(np.int32), bias.name))
    assert "parity" in _failed(_prove(made, path, file.SerializeToString()))


def test_unreadable_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    with pytest.raises(InputError, match="broken.onnx does not exist"):
        runtime.read(path)
    path.write_bytes(b"\x08\x0anot a model")
    with pytest.raises(InputError, match="broken.onnx is not a valid ONNX model"):
        runtime.read(path)
    identity = onnx.helper.make_node("Identity", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([identity], "g", value[:1], value[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    with pytest.raises(InputError, match="only files written by r2"):
        runtime.recorded(path)
