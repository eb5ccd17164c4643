"""Faults planted in healthy files: each fails the proof, by the name of the check that is for it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import ModelProto, TensorProto, helper, numpy_helper

from r2cli import data, models
from r2cli.calibration import deployed
from r2cli.deploy import onnx_export, parity, runtime, verify, weight_roles
from r2cli.palettes import compression
from r2cli.ptq import post_training
from r2cli.quantized import decibels
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec

CPU = torch.device("cpu")
Fault = Callable[[ModelProto], None]


@dataclass(frozen=True)
class Subject:
    """A checkpoint, its file, the network that it was made from, and images."""

    made: Checkpoint
    file: bytes
    original: Checkpoint
    batches: tuple[data.Batch, ...]

    def prove(self, path: Path, fault: Fault | None = None) -> verify.Proof:
        file = onnx.load_from_string(self.file)
        if fault is not None:
            fault(file)
        path.write_bytes(file.SerializeToString())
        network = deployed.network(self.made)
        return verify.prove(path, self.made, network, self.batches, deployed.network(self.original))


def _float(name: str, source: data.Data) -> Checkpoint:
    """Random weights, BatchNorms that have seen digits, and classes that are told apart a little."""
    torch.manual_seed(0)
    width = 0.25 if name == "mobilenet_v1" else None
    spec = models.spec(name, classes=10, channels=source.input.channels, size=8, width=width)
    network, batches = models.build(spec).train(), iter(source.train.batches(64, CPU))
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for images, labels in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    return Checkpoint(spec, source.input, source.class_names, state).then("pretrain", {}, {})


@pytest.fixture(scope="module", params=["resnet8", "mobilenet_v1", "palette"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    source = data.load("digits", size=8)
    original = _float("resnet8" if request.param == "palette" else request.param, source)
    shown = [batch for batch, _ in data.calibration(source, 128, CPU, 0)]
    if request.param == "palette":
        settings = compression.PaletteSettings("kmeans", 4, 1, None, 8, 8, {})
        work = compression.PaletteTask(original, settings, lambda: data.calibration(source, 128, CPU, 0), CPU, 0)
        made = compression.by_kmeans(work, weigh=False, advance=lambda layers: None)[0]
    else:
        made = post_training.quantize(original, post_training.PtqSettings("none", 8, 8, "channel", {}), shown, CPU)[0]
    images, labels = next(iter(source.test.batches(128, CPU)))
    yield Subject(made, onnx_export.to_bytes(made), original, ((images, labels),))


def _vit() -> torch.nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 1, 2, 24, 48, num_classes=10)


def _untrained(name: str) -> tuple[Checkpoint, list[torch.Tensor]]:
    """Random weights, in which roundings add up layer by layer, and images of many contrasts."""
    torch.manual_seed(0)
    spec = ModelSpec("faults.py:vit", 10, factory=_vit) if name == "vit" else ModelSpec(name, 10)
    size = 16 if name == "vit" else 32
    images = [torch.randn(16, 3, size, size) * (2 * torch.rand(16, 3, 1, 1)) for _ in range(3)]
    network = models.build(spec)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        for batch in images:
            network.train()(batch)
    state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    return Checkpoint(spec, InputSpec(3, size, size, (0.0,) * 3, (1.0,) * 3), tuple("0123456789"), state), images


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v3_small", "vit"])
def large(request: pytest.FixtureRequest) -> Iterator[Subject]:
    original, images = _untrained(request.param)
    bits = 4 if request.param == "resnet18" else 8
    settings = post_training.PtqSettings("none", bits, bits, "channel", {})
    made = post_training.quantize(original, settings, images[:2], CPU)[0]
    yield Subject(made, onnx_export.to_bytes(made), original, ((images[2], torch.zeros(16, dtype=torch.int64)),))


def _held(file: ModelProto, name: str) -> TensorProto:
    return weight_roles.constants(file)[name]


def _set(tensor: TensorProto, value: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def _scaled(tensor: TensorProto, factor: float) -> None:
    value = numpy_helper.to_array(tensor)
    _set(tensor, np.asarray(value * factor, value.dtype))


def _own_copy(file: ModelProto, node: onnx.NodeProto, place: int, like: str) -> TensorProto:
    """The constant that `node` reads at `place`, as an initializer that nothing else reads."""
    own = file.graph.initializer.add()
    own.CopyFrom(_held(file, like))
    own.name = f"own{place}"
    node.input[place] = own.name
    return own


def _rounding(file: ModelProto, place: int) -> list[onnx.NodeProto]:
    """The QuantizeLinear of a value, and the DequantizeLinear of its codes, which are clipped where they are few."""
    last = quantize = [node for node in file.graph.node if node.op_type == "QuantizeLinear"][place]
    while last.op_type != "DequantizeLinear":
        last = next(node for node in file.graph.node if last.output[0] in node.input)
    return [quantize, last]


def _grid(factor: float, more: int, place: int = 1) -> Fault:
    def plant(file: ModelProto) -> None:
        nodes = _rounding(file, place)
        scale = _own_copy(file, nodes[0], 1, nodes[0].input[1])
        zero = _own_copy(file, nodes[0], 2, nodes[0].input[2])
        _scaled(scale, factor)
        _set(zero, numpy_helper.to_array(zero) + np.uint8(more))
        nodes[1].input[1], nodes[1].input[2] = scale.name, zero.name

    return plant


def _metadata(key: str, old: str | None, new: str) -> Fault:
    def plant(file: ModelProto) -> None:
        entry = next(each for each in file.metadata_props if each.key == key)
        if old is None:
            file.metadata_props.remove(entry)
        else:
            assert old in entry.value
            entry.value = entry.value.replace(old, new)

    return plant


def _no_metadata(file: ModelProto) -> None:
    file.ClearField("metadata_props")


def _bias(operator: str, place: int) -> Fault:
    def plant(file: ModelProto) -> None:
        layer = [node for node in file.graph.node if node.op_type == operator][place]
        codes = _held(file, f"{layer.input[2]}.codes")
        _set(codes, np.rint(numpy_helper.to_array(codes) * 1.01).astype(np.int32))

    return plant


def _without_relu(file: ModelProto) -> None:
    relu = [node for node in file.graph.node if node.op_type == "Relu"][2]
    for node in file.graph.node:
        node.input[:] = [relu.input[0] if name == relu.output[0] else name for name in node.input]
    file.graph.node.remove(relu)


def _shifted(file: ModelProto) -> None:
    last = file.graph.node[-1]
    last.output[0] = "before"
    file.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "shift"))
    file.graph.node.append(helper.make_node("Add", ["before", "shift"], [file.graph.output[0].name]))


def _nan(file: ModelProto) -> None:
    """Every number of the result is none: comparisons with it are false, whichever way they are asked."""
    last = file.graph.node[-1]
    last.output[0] = "before"
    file.graph.initializer.append(numpy_helper.from_array(np.array(np.nan, np.float32), "nothing"))
    file.graph.node.append(helper.make_node("Mul", ["before", "nothing"], [file.graph.output[0].name]))


def _code(file: ModelProto) -> None:
    name = next(name for node in file.graph.node if node.op_type == "Conv" for name in node.input[1:2])
    (codes,) = weight_roles.codes(file, name)
    changed = bytearray(codes.raw_data)
    changed[0] ^= 1
    codes.raw_data = bytes(changed)


def _weight_scale(file: ModelProto) -> None:
    scale = next(each for each in file.graph.initializer if each.name.endswith(".weight.scale") and each.dims)
    value = numpy_helper.to_array(scale).copy()
    value[0] = np.nextafter(value[0], np.float32(np.inf))
    _set(scale, value)


def _dead(file: ModelProto) -> None:
    file.graph.initializer.append(numpy_helper.from_array(np.ones((64, 64), np.float32), "beside"))


def _hidden(make: Callable[[str, str, str], list[onnx.NodeProto]], shape: tuple[int, ...]) -> Fault:
    """The logits through an identity in float, by operators that no layer of r2's is."""

    def plant(file: ModelProto) -> None:
        last = file.graph.node[-1]
        last.output[0] = "before"
        identity = np.broadcast_to(np.eye(10, dtype=np.float32), shape) if shape else np.eye(10, dtype=np.float32)
        identity = identity + np.arange(100, dtype=np.float32).reshape(10, 10) * np.float32(1e-9)
        file.graph.initializer.append(numpy_helper.from_array(identity.astype(np.float32), "hidden"))
        file.graph.node.extend(make("before", "hidden", file.graph.output[0].name))

    return plant


def _einsum(x: str, w: str, y: str) -> list[onnx.NodeProto]:
    return [helper.make_node("Einsum", [x, w], [y], equation="nc,cd->nd")]


def _products(x: str, w: str, y: str) -> list[onnx.NodeProto]:
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    return [
        helper.make_node("Constant", [], ["last"], value=helper.make_tensor("v", TensorProto.INT64, [1], [2])),
        helper.make_node("Unsqueeze", [x, "last"], ["column"]),
        helper.make_node("Mul", ["column", w], ["products"]),
        helper.make_node("Constant", [], ["middle"], value=axes),
        helper.make_node("ReduceSum", ["products", "middle"], [y], keepdims=0),
    ]


FAULTS: dict[str, tuple[Fault, str]] = {
    "mean": (_metadata("r2.input", '"mean":[', '"mean":[0.5,'), "same metadata"),
    "deviation": (_metadata("r2.input", '"std":[', '"std":[0.25,'), "same metadata"),
    "class names": (_metadata("r2.class_names", '"3"', '"three"'), "same metadata"),
    "no history": (_metadata("r2.history", None, ""), "same metadata"),
    "no metadata": (_no_metadata, "same metadata"),
    "activation scale by 5 %": (_grid(1.05, 0), "runs|same grids"),
    "activation scale by 20 %": (_grid(1.2, 0), "runs|same grids"),
    "zero point by one": (_grid(1.0, 1, 0), "same grids"),
    # ONNX Runtime's optimiser makes a graph that does not run of another zero point behind a ReLU.
    "zero point by one behind a ReLU": (_grid(1.0, 1), "runs|same grids"),
    "bias by 1 %": (_bias("Conv", 2), "same biases"),
    "last bias by 1 %": (_bias("Gemm", 0), "same biases"),
    "dropped ReLU": (_without_relu, "same graph"),
    "logits shifted by 0.1": (_shifted, "same graph"),
    "logits that are no numbers": (_nan, "runs"),
    "code or index": (_code, "same codes"),
    "weight scale by one ulp": (_weight_scale, "same codes"),
    "dead initializer": (_dead, "nothing beside"),
    "float weight in an Einsum": (_hidden(_einsum, ()), "integer weights"),
    "float weight in a Mul": (_hidden(_products, ()), "integer weights"),
}


@pytest.mark.slow
def test_the_healthy_file_passes(subject: Subject, tmp_path: Path) -> None:
    proof = subject.prove(tmp_path / "model.onnx")
    assert proof.passed, [check for check in proof.checks if not check.passed]
    assert proof.measures["integer_share"] == 100 and not proof.measures["float_weights"]
    assert 5 < proof.measures["float_sqnr_db"] < 80  # four bits a weight, eight
    assert "dB from your float network" in proof.checks[-1].detail


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "check"), FAULTS.values(), ids=FAULTS)
def test_a_fault_fails_the_check_that_is_for_it(subject: Subject, fault: Fault, check: str, tmp_path: Path) -> None:
    failed = {each.name for each in subject.prove(tmp_path / "model.onnx", fault).checks if not each.passed}
    assert failed & set(check.split("|"))


def test_no_numbers_are_near_no_reference() -> None:
    """Nor is noise near a reference of zeros, or a number near an infinity. Equal infinities are: networks mask so."""
    zeros, nothing, masked = torch.zeros(2, 3), torch.full((2, 3), torch.nan), torch.tensor([[1.0, -torch.inf]])
    for output, reference in ((nothing, zeros + 1), (zeros + 1, nothing), (zeros - torch.inf, zeros + 1)):
        run = parity.OutputRun()
        run.add(zeros, zeros)
        run.add(output, reference)
        assert run.sqnr == -decibels.MOST and run.worst == torch.inf
    run = parity.OutputRun()
    run.add(zeros + 5, zeros)
    assert run.sqnr == -decibels.MOST and run.worst == 5
    for same in (zeros, masked):
        run = parity.OutputRun()
        run.add(same, same)
        assert run.sqnr == decibels.MOST and run.worst == 0
    run.add(masked, masked + torch.tensor([0.1, 0.0]))
    assert 0 < run.sqnr < decibels.MOST and run.worst == pytest.approx(0.1 / 1.1)


def _swapped_biases(file: ModelProto) -> None:
    made = {node.output[0]: node for node in file.graph.node}
    for node in file.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            name = node.input[2]
            bias = _held(file, made[name].input[0] if name in made else name)
            value = numpy_helper.to_array(bias).copy()
            if value[0] != value[1]:
                value[[0, 1]] = value[[1, 0]]
                return _set(bias, value)
    raise AssertionError("no layer has two biases")


def _without_grid(file: ModelProto) -> None:
    quantize, dequantize = _rounding(file, 1)
    copies = {node.output[0] for node in file.graph.node if node.input[:1] == dequantize.input[:1]}  # one a reader
    for node in file.graph.node:
        node.input[:] = [quantize.input[0] if name in copies else name for name in node.input]


def _float_weights(file: ModelProto) -> None:
    layer = next(node for node in file.graph.node if node.op_type == "Conv")
    (value,) = runtime.run_constants(file, {layer.input[1]: None})
    file.graph.initializer.append(numpy_helper.from_array(value, "weights"))
    layer.input[1] = "weights"


PLANTED: dict[str, tuple[Fault, str]] = {
    "code flipped": (_code, "same codes"),
    "scale by 1 %": (_grid(1.01, 0), "runs|same grids"),
    "biases swapped": (_swapped_biases, "same biases"),
    "quantizer dropped": (_without_grid, "runs|same grids|same graph"),
    "weights in float": (_float_weights, "integer weights"),
    "zero point by one": (_grid(1.0, 1), "runs|same grids"),
}


@pytest.mark.slow
def test_roundings_that_add_up_are_no_fault(large: Subject, tmp_path: Path) -> None:
    proof = large.prove(tmp_path / "model.onnx")
    assert proof.passed, [check for check in proof.checks if not check.passed]
    near = proof.measures["sqnr_db"] >= parity.SQNR_DB
    assert near != ("single codes at the edge of two add up" in proof.checks[-1].detail)
    four_bits = any(coded.codec.bits == 4 for coded in large.made.coded.values())
    # ResNet-18 on four bits is too deep for 30 dB where single codes flip, which they do on some processors only.
    assert near or four_bits


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "check"), PLANTED.values(), ids=PLANTED)
def test_a_fault_fails_its_check_in_a_large_network(large: Subject, fault: Fault, check: str, tmp_path: Path) -> None:
    failed = {each.name for each in large.prove(tmp_path / "model.onnx", fault).checks if not each.passed}
    assert failed & set(check.split("|"))
