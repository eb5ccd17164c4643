"""Networks that come as an ONNX file: every operator against ONNX Runtime, exporters' files, and files that are odd."""

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from packaging.version import Version
from torch import Tensor, nn

import r2cli
from conftest import R2
from r2cli import models
from r2cli.api import inputs
from r2cli.data import Data
from r2cli.errors import InputError
from r2cli.graph.equivalence import Misread
from r2cli.models import onnx as onnx_in
from r2cli.models.onnx_network import OnnxNetwork
from r2cli.models.onnx_program import OPERATORS, HeldTensor, OnnxNode, OnnxProgram
from r2cli.models.onnx_reading import read
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import Checkpoint, ModelSpec
from r2cli.storage.input_spec import InputSpec

LONG = 2**63 - 1


@dataclass
class Case:
    """One operator on an input x of `shape`, with constants behind it (or around it, where `at` is not 0).

    `before` and `after` are nodes that make x of another kind and a float of the result. `opset` is the file's.
    """

    operator: str
    constants: Sequence[Any] = ()
    shape: Sequence[int] = (2, 4, 6, 6)
    opset: int = 18
    at: int = 0
    outputs: int = 1
    positive: bool = False
    before: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        told = "-".join(f"{key}={value}" for key, value in self.attributes.items())
        return f"{self.operator}{self.opset}-{told}".replace(" ", "")


def case(operator: str, *constants: Any, at: int = 0, **given: Any) -> Case:
    own = {key: given.pop(key) for key in ("shape", "opset", "outputs", "positive", "before") if key in given}
    return Case(operator, constants, at=at, attributes=given, **own)


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape) + len(shape)).normal(size=shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


NONE = None
F = np.float32
CASES = [
    case("Conv", floats(5, 4, 3, 3), floats(5), pads=[1, 1, 1, 1], strides=[2, 2]),
    case("Conv", floats(4, 1, 3, 3), group=4, pads=[0, 1, 2, 1], dilations=[2, 1]),
    case("Conv", floats(5, 4, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    case("Conv", floats(5, 4, 2, 2), auto_pad="SAME_LOWER"),
    case("Conv", floats(5, 4, 3, 3), auto_pad="VALID"),
    case("Conv", floats(5, 4, 3), floats(5), shape=(2, 4, 9)),
    case("ConvTranspose", floats(4, 3, 2, 2), floats(3), strides=[2, 2]),
    case("ConvTranspose", floats(4, 2, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1], group=2),
    case("ConvTranspose", floats(4, 3, 3, 3), strides=[2, 2], pads=[0, 1, 1, 0]),
    case("ConvTranspose", floats(4, 3, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    case("ConvTranspose", floats(4, 3, 3, 3), strides=[2, 2], output_shape=[12, 12]),
    case("ConvTranspose", floats(4, 3, 3, 3), floats(3), strides=[2, 2], output_shape=[14, 14]),
    case("ConvTranspose", floats(4, 3, 2, 2), strides=[3, 3], output_shape=[18, 17], auto_pad="SAME_UPPER"),
    case("Gemm", floats(6, 3), floats(3), shape=(2, 6)),
    case("Gemm", floats(3, 6), floats(1, 3), transB=1, shape=(2, 6)),
    case("Gemm", floats(3, 6), floats(3), transB=1, alpha=0.5, beta=2.0, shape=(2, 6)),
    case("Gemm", floats(2, 3), transA=1, shape=(2, 6)),
    case("MatMul", floats(6, 3), shape=(2, 5, 6)),
    case("MatMul", floats(3, 5), at=1, shape=(2, 5, 6)),
    case("BatchNormalization", floats(4), floats(4), floats(4), np.abs(floats(4)), epsilon=1e-3),
    case("BatchNormalization", floats(4), floats(4), floats(4), np.abs(floats(4)), opset=7),
    case("InstanceNormalization", floats(4), floats(4)),
    case("LayerNormalization", floats(6), floats(6)),
    case("LayerNormalization", floats(6, 6), axis=2),
    case("GroupNormalization", floats(4), floats(4), num_groups=2, opset=21),
    case("RMSNormalization", floats(6), opset=23),
    case("LpNormalization", axis=1, p=2),
    case("LRN", size=3, alpha=0.01),
    case("PRelu", floats(4, 1, 1)),
    case("PRelu", floats(1)),
    case("PRelu", floats(6)),
    case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 1, 1], ceil_mode=1, shape=(2, 4, 7, 7)),
    case("MaxPool", kernel_shape=[3, 2], auto_pad="SAME_UPPER"),
    case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER"),
    case("MaxPool", kernel_shape=[3, 3], strides=[2, 3], pads=[1, 2, 2, 0], ceil_mode=1, shape=(2, 4, 9, 5)),
    case("MaxPool", kernel_shape=[4, 1], strides=[3, 1], pads=[3, 0, 3, 0], ceil_mode=1, shape=(2, 4, 9, 7)),
    case("MaxPool", kernel_shape=[2, 2], strides=[2, 1], pads=[0, 0, 1, 1], dilations=[2, 2]),
    case("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    case("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    case("AveragePool", kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
    case("AveragePool", kernel_shape=[2, 2], pads=[0, 0, 1, 1], count_include_pad=1),
    case("AveragePool", kernel_shape=[2, 2], strides=[2, 2], pads=[1, 0, 0, 1], count_include_pad=1, ceil_mode=1),
    case("AveragePool", kernel_shape=[3, 3], strides=[4, 4], pads=[0, 0, 1, 1], ceil_mode=1),
    case("AveragePool", kernel_shape=[3, 3], strides=[2, 3], pads=[0, 2, 1, 1], count_include_pad=1, ceil_mode=1),
    case("GlobalAveragePool"),
    case("GlobalMaxPool"),
    *(
        case("Resize", NONE, np.array(scales, F), mode=mode, coordinate_transformation_mode=at, **more)
        for scales in ([1, 1, 2, 2], [1, 1, 1.5, 0.5])
        for mode, at, more in (
            ("nearest", "asymmetric", {"nearest_mode": "floor"}),
            ("nearest", "half_pixel", {"nearest_mode": "round_prefer_floor"}),
            ("nearest", "half_pixel", {"nearest_mode": "round_prefer_ceil"}),
            ("nearest", "align_corners", {"nearest_mode": "ceil"}),
            ("linear", "half_pixel", {}),
            ("linear", "align_corners", {}),
            ("linear", "asymmetric", {}),
            ("cubic", "half_pixel", {"cubic_coeff_a": -0.75}),
        )
    ),
    case("Resize", NONE, NONE, ints(2, 4, 9, 5), mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
    case("Resize", NONE, NONE, ints(9, 5), mode="nearest", axes=[2, 3]),
    case("Resize", np.array([1, 1, 2, 2], F), opset=10, mode="nearest"),
    case("Upsample", np.array([1, 1, 2, 2], F), opset=9, mode="nearest"),
    case("Upsample", opset=7, mode="linear", scales=[1.0, 1.0, 2.0, 2.0]),
    *(case("Pad", ints(0, 0, 1, 2, 0, 0, 2, 1), mode=mode) for mode in ("constant", "reflect", "edge")),
    case("Pad", ints(0, 0, 1, 2, 0, 0, 2, 1), np.array(1.5, F)),
    case("Pad", ints(1, 2), NONE, ints(3), opset=18),
    case("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1), mode="wrap", opset=19),
    case("Pad", pads=[0, 0, 1, 1, 0, 0, 1, 1], value=2.0, opset=9),
    case("Pad", ints(0, 1, 0, 0, 0, 2, 0, 0)),
    *(case(name) for name in ("Relu", "Sigmoid", "HardSwish", "Mish", "Tanh", "Softplus", "Softsign", "Erf", "Exp")),
    *(case(name) for name in ("Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "Sin", "Cos")),
    *(case(name, positive=True) for name in ("Log", "Sqrt", "Reciprocal")),
    case("LeakyRelu", alpha=0.2),
    case("Elu", alpha=0.7),
    case("Celu", alpha=0.7),
    case("Selu"),
    case("Selu", alpha=1.1, gamma=1.2),
    case("Gelu", opset=20),
    case("Gelu", opset=20, approximate="tanh"),
    case("HardSigmoid"),
    case("HardSigmoid", alpha=1 / 6, beta=0.5),
    case("ThresholdedRelu", alpha=0.3),
    case("Clip", np.array(0, F), np.array(6, F)),
    case("Clip", NONE, np.array(0.5, F)),
    case("Clip", opset=6 + 1, min=-0.5, max=0.5),
    *(case(name, floats(4, 1, 1)) for name in ("Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean")),
    *(case(name, np.array(0.5, F)) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    *(case(name, floats(1), at=1) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Greater", "LessOrEqual")),
    case("Pow", np.array(2, F), at=1),
    case("Div", np.abs(floats(6)) + 1),
    case("Pow", np.array(2, F)),
    case("Pow", np.array(0.5, F), positive=True),
    case("Mod", np.array(0.7, F), fmod=1),
    case("Mod", ints(3), before="int64"),
    case("Div", ints(3), before="int64"),
    *(case(name, np.zeros(1, bool), before="bool") for name in ("And", "Or", "Xor")),
    case("Not", before="bool"),
    *(case(name, floats(6)) for name in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal")),
    case("IsNaN"),
    case("IsInf"),
    case("Where", floats(6), np.array(0, F), before="bool"),
    case("Where", np.array(2, F), np.array(0, F), before="bool"),
    case("Cast", to=TensorProto.INT32),
    case("CastLike", ints(1)),
    *(
        case(f"Reduce{name}", ints(1, -1), keepdims=keep, positive=True)
        for name in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp")
        for keep in (0, 1)
    ),
    case("ReduceMean", axes=[2, 3], opset=13),
    case("ReduceSum"),
    case("ReduceSum", noop_with_empty_axes=1),
    case("Softmax", axis=1),
    case("Softmax", opset=11, shape=(2, 3, 4)),
    case("LogSoftmax"),
    case("ArgMax", axis=1, keepdims=0),
    case("ArgMin", axis=-1),
    case("TopK", ints(3), axis=1, outputs=2),
    case("TopK", ints(2), largest=0, outputs=2),
    case("CumSum", ints(1)),
    case("Identity"),
    case("Shape"),
    case("Size"),
    case("Reshape", ints(0, -1, 12)),
    case("Flatten"),
    case("Flatten", axis=2),
    case("Squeeze", ints(2), shape=(2, 4, 1, 1)),
    case("Squeeze", axes=[3], shape=(2, 4, 1, 1), opset=11),
    case("Unsqueeze", ints(1, -1)),
    case("Unsqueeze", axes=[0], opset=11),
    case("Transpose", perm=[0, 2, 3, 1]),
    case("Transpose", shape=(2, 4)),
    case("Concat", floats(2, 3, 6, 6), axis=1),
    case("Concat", floats(1, 1, 6), axis=1, shape=(1, 5, 6)),
    case("Split", ints(1, 3), axis=1, outputs=2),
    case("Split", axis=1, outputs=2, num_outputs=2),
    case("Split", axis=-1, outputs=3, opset=11),
    case("Slice", ints(1, 0), ints(LONG, -1), ints(1, 3), ints(2, 1)),
    case("Slice", ints(-1), ints(-LONG - 1), ints(2), ints(-2)),
    case("Slice", starts=[1], ends=[3], axes=[1], opset=9),
    case("Gather", ints(2, 0), axis=1),
    case("Gather", np.array(-1, np.int64), axis=1),
    case("Gather", np.array([[0, 1], [3, -1]], np.int64), axis=1),
    case("Gather", floats(7, 3), at=1, shape=(2, 5), before="index"),
    case("GatherElements", np.array([[0, 1], [-1, 2]], np.int64), axis=1, shape=(2, 4)),
    case("GatherND", np.array([[0, 1], [1, 0]], np.int64)),
    case("ScatterND", np.array([[0, 1]], np.int64), floats(1, 6, 6)),
    case("ScatterElements", np.array([[1]], np.int64), floats(1, 1), axis=1, shape=(2, 4)),
    case("Expand", ints(1, 1, 6, 6), shape=(2, 4, 1, 6)),
    case("Tile", ints(1, 2, 1, 1)),
    case("OneHot", np.array(5, np.int64), np.array([0, 2], F), shape=(2, 3), before="index"),
    *(case("DepthToSpace", blocksize=2, mode=mode) for mode in ("DCR", "CRD")),
    case("SpaceToDepth", blocksize=2),
    case("Trilu", np.array(1, np.int64), upper=1),
    case("Trilu", upper=0),
    case("Einsum", floats(6, 3), equation="bchw,wk->bchk"),
    case("ConstantOfShape", shape=(2, 3), value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.5]), before="shape"),
    case("Range", np.array(1, np.int64), at=1, before="last size"),
]
for _kind, _gates, _more in (("LSTM", 4, {}), ("GRU", 3, {"linear_before_reset": 1}), ("RNN", 1, {})):
    for _count, _direction in ((1, "forward"), (1, "reverse"), (2, "bidirectional")):
        _sizes = [(_count, _gates * 4, 3), (_count, _gates * 4, 4), (_count, _gates * 8)]
        CASES.append(
            case(
                _kind,
                *(floats(*size) for size in _sizes),
                *([NONE, floats(_count, 1, 4)] if _direction == "forward" else []),
                shape=(5, 1, 3),
                outputs=2,
                hidden_size=4,
                direction=_direction,
                **_more,
            )
        )
# Of r2's own making, or tested within others.
WITHOUT_CASE = {"Linear"}


def in_file(one: Case, folder: Path) -> tuple[Path, np.ndarray]:
    """A file of the operator alone, and an input for it. What gives no float is cast to one."""
    nodes, name = [], "x"
    x: np.ndarray = np.random.default_rng(0).normal(size=one.shape).astype(np.float32)
    if one.positive:
        x = np.abs(x) + 0.1
    if one.before in ("int64", "index"):
        x *= 3
    if one.before == "bool":
        nodes.append(helper.make_node("Greater", ["x", "zero"], ["given"]))
    elif one.before in ("int64", "index"):
        nodes.append(helper.make_node("Abs", ["x"], ["positive"]))
        nodes.append(helper.make_node("Cast", ["positive"], ["given"], to=TensorProto.INT64))
    elif one.before:
        nodes.append(helper.make_node("Shape", ["x"], ["given"]))
    if one.before == "last size":
        nodes[-1].output[0] = "sizes"
        nodes.append(helper.make_node("Gather", ["sizes", "last"], ["given"]))
    name = "given" if one.before else "x"
    held = {f"c{place}": value for place, value in enumerate(one.constants) if value is not None}
    inputs = [f"c{place}" if value is not None else "" for place, value in enumerate(one.constants)]
    inputs.insert(one.at, name)
    if one.before == "last size":
        inputs = ["first", "given", "c0"]
    outputs = [f"y{place}" for place in range(one.outputs)]
    nodes.append(helper.make_node(one.operator, inputs, outputs, **one.attributes))
    nodes += [helper.make_node("Cast", [own], [f"{own} float"], to=TensorProto.FLOAT) for own in outputs]
    zeros = helper.make_node("Mul", ["x", "zero"], ["nothing"])
    nodes.append(zeros)
    nodes.append(helper.make_node("ReduceMax", ["nothing"], ["none"], keepdims=0))
    # Every output depends on the input, also one that is only its shape.
    nodes += [helper.make_node("Add", [f"{own} float", "none"], [f"{own} out"]) for own in outputs]
    held |= {"zero": np.array(0, F), "last": np.array(-1, np.int64), "first": np.array(0, np.int64)}
    used = {own for node in nodes for own in node.input}
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *one.shape[1:]])],
        [helper.make_tensor_value_info(f"{own} out", TensorProto.FLOAT, None) for own in outputs],
        [numpy_helper.from_array(np.asarray(value), own) for own, value in held.items() if own in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", one.opset)], ir_version=10)
    path = folder / "one.onnx"
    onnx.save(model, path)
    return path, x


def network(path: Path, shape: Sequence[int]) -> nn.Module:
    program, tensors = read(path, {"x": (tuple(shape), "float32")})
    made = OnnxNetwork(program)
    made.load_state_dict(tensors)
    return made.eval()


def run(path: Path, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


@pytest.mark.parametrize("one", CASES, ids=str)
def test_an_operator_computes_what_onnx_runtime_does(one: Case, tmp_path: Path) -> None:
    if "noop_with_empty_axes" in one.attributes and Version(onnxruntime.__version__) < Version("1.30"):
        pytest.skip("ONNX Runtime 1.23 refuses the node")
    path, x = in_file(one, tmp_path)
    expected = run(path, x)
    with torch.no_grad():
        found = network(path, one.shape[1:])(torch.from_numpy(x))
    found = [found] if isinstance(found, Tensor) else found
    for got, wanted in zip(found, expected, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_every_operator_has_a_case() -> None:
    assert set(OPERATORS) - {one.operator for one in CASES} == WITHOUT_CASE


# --- whole networks ---------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """What mobile networks are made of: convolutions, a residual, squeeze and excitation, upsampling, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.relu(self.depthwise(x))
        x = x * nn.functional.hardsigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = self.up(nn.functional.max_pool2d(x, 2)) + x
        b, c, h, w = x.shape
        tokens = x.reshape(b, c, h * w).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(b, h * w, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        seen = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
        tokens = tokens + seen.transpose(1, 2).reshape(b, h * w, c)
        return self.head(nn.functional.gelu(self.norm(tokens)).mean(1))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))  # the BatchNorm sees noise
    return model.eval()


def exported(model: nn.Module, path: Path, opset: int = 17, *, free: bool = True) -> Path:
    """A file of torch's TorchScript exporter, for a batch of any size or of one."""
    axes = {"image": {0: "n"}, "scores": {0: "n"}} if free else None
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["scores"], "dynamic_axes": axes}
    with torch.no_grad():
        torch.onnx.export(model, (torch.randn(1, 3, 8, 8),), path, opset_version=opset, dynamo=False, **names)
    return path


def checkpoint_of(path: Path, classes: int = 5) -> Checkpoint:
    given = InputSpec(3, 8, 8, (0.0,) * 3, (1.0,) * 3)
    spec, _, tensors = onnx_in.read(path, given, classes)
    names = tuple(map(str, range(classes)))
    return Checkpoint(spec, given, names, tensors, origin=path.name, outputs=onnx_in.program(spec).outputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("opset", "free"),
    [
        (11, True),
        (17, False),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(11, False), (13, True), (17, True)]),
    ],
)
def test_an_exported_network_goes_out_as_it_came_in(small: nn.Module, tmp_path: Path, opset: int, free: bool) -> None:
    path = exported(small, tmp_path / "in.onnx", opset, free=free)
    made = checkpoint_of(path)
    assert {"stem.0.weight", "depthwise.bias", "head.weight"} <= set(made.floats)
    assert {"LayerNormalization", "Gelu", "Linear"} <= {node.operator for node in onnx_in.program(made.model).nodes}
    out = tmp_path / "out.onnx"
    r2cli.export(made, out)
    x = np.random.default_rng(1).normal(size=(4, 3, 8, 8)).astype(np.float32)
    expected = np.concatenate([run(path, row[None])[0] for row in x])
    (found,) = run(out, x)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    written = onnx.load(out).graph
    assert [written.input[0].name, written.output[0].name] == ["image", "scores"]


def between(node: onnx.NodeProto, path: Path, *, names: Sequence[str] = ("w", "b", "v"), fill: float = 0.1) -> Path:
    """A file with `node` from a to q between two convolutions of weights `names`; `fill` is in the first bias."""
    weight, bias, last = names
    held = {weight: floats(4, 1, 3, 3), bias: np.full(4, fill, F), last: floats(3, 4, 3, 3)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", weight, bias], ["a"], kernel_shape=[3, 3], pads=[1] * 4),
            node,
            helper.make_node("Conv", ["q", last], ["y"], kernel_shape=[3, 3], pads=[1] * 4),
        ],
        "between",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def noise() -> Data:
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return r2cli.load_data(([(x[:32], None)], [(x[32:], None)]))


@pytest.mark.parametrize(
    "own",
    [
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]},
        {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    ],
)
def test_a_largest_value_beside_uneven_padding_is_on_a_grid(own: dict[str, Any], tmp_path: Path) -> None:
    """TensorFlow's pools with SAME: padding of minus infinity would be on no grid."""
    path = between(helper.make_node("MaxPool", ["a"], ["q"], **own), tmp_path / "pool.onnx")
    found = r2cli.quantize(path, noise())
    r2cli.export(found, tmp_path / "out.onnx")
    assert r2cli.verify(tmp_path / "out.onnx", found, noise()).passed
    x = np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(F)
    ((first,), (then,)) = run(path, x), run(tmp_path / "out.onnx", x)
    assert first.shape == then.shape and np.abs(first - then).max() < 0.05 * np.abs(first).max()


def test_a_file_that_is_read_as_another_function_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = between(helper.make_node("Relu", ["a"], ["q"]), tmp_path / "relu.onnx")
    assert r2cli.quantize(path, noise()).layers
    monkeypatch.setitem(OPERATORS, "Relu", replace(OPERATORS["Relu"], compute=lambda a, x: torch.relu(x + 0.01)))
    with pytest.raises(Misread, match="reads the output 'y' as another function"):
        r2cli.quantize(path, noise())


def test_a_file_of_half_floats_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = between(helper.make_node("Relu", ["a"], ["q"]), tmp_path / "half.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, path)
    told: list[str] = []
    assert inputs.of_onnx(path, noise(), tell=told.append).floats and not told
    monkeypatch.setitem(OPERATORS, "Relu", replace(OPERATORS["Relu"], compute=lambda a, x: torch.abs(x)))
    with pytest.raises(Misread):
        inputs.of_onnx(path, noise())


def test_inputs_in_another_order_than_the_file_s_are_compared_by_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["p"]),
        helper.make_node("MatMul", ["b", "v"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["y"]),
    ]
    taken = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 6]) for name in "ab"]
    given = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])]
    held = [numpy_helper.from_array(floats(6, 3) * factor, name) for name, factor in (("w", F(1)), ("v", F(9)))]
    model = helper.make_model(
        helper.make_graph(nodes, "two", taken, given, held), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, tmp_path / "two.onnx")
    batch = ({"b": torch.randn(4, 6), "a": torch.randn(4, 6)}, None)
    told: list[str] = []
    made = inputs.of_onnx(tmp_path / "two.onnx", r2cli.load_data(([batch], [batch])), tell=told.append)
    assert not told and len(made.floats) == 2


def test_a_file_with_weights_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    path = between(helper.make_node("Relu", ["a"], ["q"]), tmp_path / "nan.onnx", fill=float("nan"))
    with pytest.raises(InputError, match=r"nan.onnx: tensor 'w?.?b(ias)?' has 4 NaN or infinite values of 4"):
        r2cli.quantize(path, noise())


def test_names_of_which_one_begins_another_are_told_apart(tmp_path: Path) -> None:
    names = ("a.weight", "a", "a.weight.weight")
    path = between(helper.make_node("Relu", ["a"], ["q"]), tmp_path / "names.onnx", names=names)
    model = onnx.load(path)
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "r"  # 'a' is the bias
    onnx.save(model, path)
    assert len(r2cli.quantize(path, noise()).layers) == 2


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_says_its_shapes_goes_out_without_data(small: nn.Module, tmp_path: Path, r2: R2) -> None:
    path, out = exported(small, tmp_path / "in.onnx", free=True), tmp_path / "out.onnx"
    assert r2("export", path, "-o", out).code == 0
    x = np.random.default_rng(1).normal(size=(4, 3, 8, 8)).astype(np.float32)
    assert np.abs(run(out, x)[0] - run(path, x)[0]).max() < 1e-4
    trained = r2("qat", path, "-o", tmp_path / "q.safetensors")  # but nobody wants to learn noise
    assert trained.code == 2 and "needs the data it is for" in trained.err
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "w"
    onnx.save(model, path)
    left_open = r2("export", path, "-o", out, "--overwrite")
    assert left_open.code == 2 and "--input-shape" in left_open.err


@pytest.mark.filterwarnings("ignore")
def test_weights_alone_want_no_data_where_a_file_says_its_shapes(small: nn.Module, tmp_path: Path, r2: R2) -> None:
    path, out = exported(small, tmp_path / "in.onnx", free=True), tmp_path / "out.safetensors"
    weights = ["ptq", path, "--act-bits", "none"]
    for command in (weights, ["palettize", path, "--method", "kmeans", "--lut-bits", 32]):
        ran = r2(*command, "-o", out, "--overwrite")
        assert ran.code == 0 and "BatchNorm" not in ran.out, ran.err
    # What looks at values still wants them.
    for more in (["--act-bits", 8], ["--method", "adaround"], ["--target-bits", 4]):
        ran = r2(*weights, *more, "-o", out, "--overwrite")
        assert ran.code == 2 and "needs the data it is for" in ran.err, more
    ran = r2("palettize", path, "--method", "kmeans", "-o", out, "--overwrite")
    assert ran.code == 2 and "needs the data it is for" in ran.err
    r2cli.quantize(path, None, r2cli.PtqConfig(act_bits="none"))
    r2cli.palettize(path, None, r2cli.PalettizeConfig(method="kmeans", lut_bits=32))


@pytest.mark.filterwarnings("ignore")
def test_a_network_of_a_file_is_quantized_trained_and_read_from_its_checkpoint(
    small: nn.Module, tmp_path: Path
) -> None:
    path = exported(small, tmp_path / "in.onnx")
    source = r2cli.load_data("fake:3x8x8:5")
    result = r2cli.quantize(path, source, r2cli.PtqConfig(calibration=32))
    out = tmp_path / "out.onnx"
    r2cli.export(result, out)
    proof = r2cli.verify(out, result, source)
    assert [check.detail for check in proof.checks if not check.passed] == []
    assert len(result.checkpoint.coded) == 5 and proof.measures["integer_share"] == 100
    path.unlink()  # the checkpoint is enough
    kept = tmp_path / "kept.safetensors"
    checkpoint.save(result.checkpoint, kept)
    assert r2cli.export(kept) == out.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_commands_take_a_file(small: nn.Module, tmp_path: Path, r2: R2) -> None:
    path = exported(small, tmp_path / "net.onnx")
    data = ["--data", "fake:3x8x8:5", "--json"]
    work = {
        "ptq": ["--calibration", "16"],
        "qat": ["--weight-bits", "4", "--epochs", "1", "--batch-size", "512"],
        "palettize": ["--method", "kmeans", "--bits", "4"],
        "export": [],
    }
    for command, options in work.items():
        ran = r2(command, path, *data, *options, "--eval-images", 8)
        assert ran.code == 0, ran.err
        assert all(check["passed"] for check in json.loads(ran.out)["checks"]), command
    assert (tmp_path / "net.float.onnx").exists()
    ran = r2("evaluate", path, *data, "--eval-images", 8)
    assert ran.code == 0 and json.loads(ran.out)["images"] == 8, ran.err


# --- files that are odd -----------------------------------------------------------------------------------------------


def tiny(*nodes: onnx.NodeProto, opset: int = 17, shape: Sequence[Any] = ("n", 3, 8, 8), domain: str = "") -> Any:
    """A model of `nodes` from `x` to `y`, or of one Conv."""
    weight = numpy_helper.from_array(floats(5, 3, 8, 8), "w.weight")
    own = list(nodes) or [helper.make_node("Conv", ["x", "w.weight"], ["c"]), helper.make_node("Flatten", ["c"], ["y"])]
    graph = helper.make_graph(
        own,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [weight],
    )
    domains = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def saved(model: Any, folder: Path) -> Path:
    path = folder / "odd.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def external(location: str, **place: object) -> Any:
    model = tiny()
    _put_elsewhere(model.graph.initializer[0], location, **place)
    return model


def _put_elsewhere(tensor: TensorProto, location: str, **place: object) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=str(value))


def external_constant(location: str) -> Any:
    """A tensor in a node, and not among the initializers, whose data lies elsewhere."""
    weight = numpy_helper.from_array(floats(5, 192), "elsewhere")
    _put_elsewhere(weight, location)
    flat = helper.make_node("Flatten", ["x"], ["flat"])
    return tiny(
        flat,
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("Gemm", ["flat", "w"], ["y"], transB=1),
    )


def conditional() -> Any:
    results = [helper.make_tensor_value_info(own, TensorProto.FLOAT, None) for own in ("Relu", "Neg")]
    branches = [
        helper.make_graph([helper.make_node(own.name, ["x"], [own.name])], own.name, [], [own]) for own in results
    ]
    chosen = helper.make_node("If", ["positive"], ["y"], then_branch=branches[0], else_branch=branches[1])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["positive"], to=TensorProto.BOOL),
    ]
    return tiny(*nodes, chosen)


ODD = {
    "truncated": (tiny().SerializeToString()[:300], "not a valid ONNX model"),
    "no model": (b"nothing of the kind", "not a valid ONNX model"),
    "a newer opset": (tiny(opset=25), "opset 25"),
    "an older opset": (tiny(opset=6), "opset 6"),
    "data that is missing": (external("weights.bin"), "weights.bin"),
    "data outside": (external("../weights.bin"), "outside its folder"),
    "data at a path": (external("/etc/passwd"), "outside its folder"),
    "data behind a link": (external("link.bin"), "'link.bin', outside its folder"),
    "data of a node behind a link": (external_constant("link.bin"), "'link.bin', outside its folder"),
    "data behind a folder's link": (external("away/weights.bin"), "outside its folder"),
    "data at no number": (external("plain.bin", offset="here"), "does not say where in"),
    "short data": (external("plain.bin", length=4 * 5 * 192), "too short"),
    "an operator of its own": (
        tiny(helper.make_node("Fancy", ["x"], ["y"], name="f", domain="my.domain"), domain="my.domain"),
        "'f' is a Fancy of my.domain",
    ),
    "an operator that is not read": (tiny(helper.make_node("NonZero", ["x"], ["y"], name="z")), "'z' is a NonZero"),
    "quantized already": (tiny(helper.make_node("QuantizeLinear", ["x", "w.weight"], ["y"])), "quantized already"),
    "another rank": (tiny(shape=("n", 3, 8)), "float32 3x8, not float32 3x8x8"),
    "another size": (tiny(shape=("n", 3, 16, 8)), "3x16x8, not"),
    "a shape of values": (
        tiny(
            helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
            helper.make_node("Reshape", ["x", "i"], ["y"], name="r"),
        ),
        "node 'r' (Reshape)",
    ),
    "a condition of values": (conditional(), "(If)"),
    "two inputs": (None, "2 inputs (x, z)"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_refused_in_one_sentence(name: str, tmp_path: Path, r2: R2) -> None:
    model, told = ODD[name]
    if model is None:
        model = tiny(helper.make_node("Add", ["x", "z"], ["y"]))
        model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 3, 8, 8]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(4 * 5 * 192))  # what the links lead to
    path = saved(model, tmp_path / "folder")
    (path.parent / "plain.bin").write_bytes(bytes(8))
    (path.parent / "link.bin").symlink_to("plain.bin")
    (path.parent / "away").symlink_to("..")
    ran = r2("ptq", path, "--data", "fake:3x8x8:5")
    said = " ".join(ran.err.split())
    assert ran.code == 2 and told in said and str(path) in said, said
    assert {each.name for each in path.parent.iterdir()} == {"odd.onnx", "plain.bin", "link.bin", "away"}


def test_tensors_in_a_file_beside_the_network_are_read_as_those_in_it(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(floats(5, 192), "of a node")
    flat = helper.make_node("Flatten", ["x"], ["flat"])
    layer = helper.make_node("Gemm", ["flat", "w"], ["y"], transB=1)
    model = tiny(flat, helper.make_node("Constant", [], ["w"], value=weight), layer)
    for own in (tiny(), model):
        program, tensors = read(saved(own, tmp_path), {"x": ((3, 8, 8), "float32")})
        place: dict[str, Any] = {"save_as_external_data": True, "location": "beside.bin", "convert_attribute": True}
        (tmp_path / "beside.bin").unlink(missing_ok=True)
        onnx.save(own, tmp_path / "apart.onnx", size_threshold=0, **place)
        assert (tmp_path / "beside.bin").exists()
        again, held = read(tmp_path / "apart.onnx", {"x": ((3, 8, 8), "float32")})
        assert again == program and held.keys() == tensors.keys() and tensors
        assert all(torch.equal(held[name], tensors[name]) for name in tensors)


def test_a_file_for_a_batch_of_one_that_cannot_be_read_for_more_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2, 3]), helper.make_node("Softmax", ["t"], ["s"])]
    nodes += [helper.make_node("CumSum", ["s", "one"], ["y"])]
    model = tiny(*nodes, shape=(1, 3, 8, 8))
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "one"))
    with pytest.raises(InputError, match="for a batch of 1 alone"):
        read(saved(model, tmp_path), {"x": ((3, 8, 8), "float32")})


def test_numbers_that_gather_a_flat_value_in_its_order_are_a_reshape(tmp_path: Path) -> None:
    """As torch's exporter writes as_strided for a batch of one: it is read for any."""
    nodes = [helper.make_node("Reshape", ["x", "flat"], ["f"]), helper.make_node("Gather", ["f", "order"], ["g"])]
    model = tiny(*nodes, helper.make_node("Relu", ["g"], ["y"]), shape=(1, 3, 8, 8))
    order = np.arange(192).reshape(1, 3, 64)
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.array([-1]), "flat"), numpy_helper.from_array(order, "order")]
    )
    program, _ = read(saved(model, tmp_path), {"x": ((3, 8, 8), "float32")})
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(OnnxNetwork(program)(images), images.relu().flatten(2))
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(order[:, ::-1].copy(), "order"))
    with pytest.raises(InputError, match="for a batch of 1 alone"):
        read(saved(model, tmp_path), {"x": ((3, 8, 8), "float32")})


def test_a_weight_times_a_number_keeps_its_name_wherever_it_stands(tmp_path: Path) -> None:
    """Two layers share a constant that is no initializer, as Paddle writes its weights, each times a number."""
    kernel = numpy_helper.from_array(floats(5, 3, 8, 8))
    nodes = [helper.make_node("Constant", [], ["conv2d_3.w_0"], value=kernel)]
    for name in ("a", "b"):
        nodes.append(helper.make_node("Conv", ["x", "conv2d_3.w_0"], [f"{name} conv"]))
        nodes.append(helper.make_node("Mul", [f"{name} conv", name], [f"{name} product"]))
    model = tiny(*nodes, helper.make_node("Sub", ["a product", "b product"], ["y"]))
    factors = {"a": 1.900607, "b": 1.900609}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(at, F), name) for name, at in factors.items())
    program, tensors = read(saved(model, tmp_path), {"x": ((3, 8, 8), "float32")})
    assert set(tensors) == {"conv2d_3.weight", "conv2d_3.weight_1"}
    made = OnnxNetwork(program)
    made.load_state_dict(tensors)
    assert 0 < made(torch.ones(1, 3, 8, 8)).abs().max() < 1e-3


def test_an_output_that_is_the_input_has_a_name_of_its_own_in_the_file_that_is_written(tmp_path: Path) -> None:
    model = tiny()
    model.graph.output.append(model.graph.input[0])
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = r2cli.load_data(([(x, None)], [(x, None)]))
    made = r2cli.quantize(saved(model, tmp_path), data, r2cli.PtqConfig(device="cpu"))
    r2cli.export(made, tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert [one.name for one in written.graph.output] == ["y", "x_output"]


# --- checkpoints of someone else's -----------------------------------------------------------------------------------


def hostile(**changed: Any) -> str:
    """The text of a program in which `changed` stands in the place of what `tiny` has."""
    node = OnnxNode("Relu", "a", ("x",), ("y",), {})
    whole: dict[str, Any] = {"inputs": ("x",), "outputs": ("y",), "results": ("y",), "nodes": (node,)}
    return OnnxProgram(**{**whole, "tensors": {}, "numbers": {}, **changed}).text()


HOSTILE: dict[str, dict[str, Any]] = {
    "an unknown operator": {"nodes": (OnnxNode("System", "a", ("x",), ("y",), {}),)},
    "a cycle": {"nodes": (OnnxNode("Add", "a", ("x", "y"), ("y",), {}),)},
    "a size": {"tensors": {"a.weight": HeldTensor((2**31, 2**20), "float32", True)}},
    "a name of torch's": {"tensors": {"forward": HeldTensor((1,), "float32", True)}},
    "an attribute": {"nodes": (OnnxNode("Relu", "a", ("x",), ("y",), {"deep": {"er": 1}}),)},
    "no output": {"results": ("z",)},
    "a word for a number": {"numbers": {"n": ["a"]}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_network_that_a_checkpoint_describes_badly_is_refused(name: str) -> None:
    spec = ModelSpec("onnx", 5, args={"graph": hostile(**HOSTILE[name])})
    with pytest.raises(InputError):
        models.build(spec, most=10_000)


@pytest.mark.parametrize("text", ["", "nonsense!", "AAAA", base64.b64encode(zlib.compress(b"[" * 100_000)).decode()])
def test_a_text_that_is_no_program_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        models.build(ModelSpec("onnx", 5, args={"graph": text}), most=10_000)


@pytest.mark.parametrize(
    ("operator", "numbers"),
    [
        ("ConstantOfShape", [2**20, 2**20]),
        ("Range", [0, 2**40, 1]),
        ("Tile", [1, 2**20, 2**20, 1]),
        ("Expand", [2**40]),
    ],
)
def test_a_value_that_fits_no_memory_is_refused_before_it_is_made(operator: str, numbers: list[int]) -> None:
    given = {f"n{place}": number for place, number in enumerate(numbers)} if operator == "Range" else {"n": numbers}
    inputs = [*(["x"] if operator in ("Tile", "Expand") else []), *given]
    node = OnnxNode(operator, "a", tuple(inputs), ("y",), {})
    network = OnnxNetwork(OnnxProgram(("x",), ("y",), ("y",), (node,), {}, given))
    with pytest.raises(InputError, match="would make a tensor"):
        network(torch.zeros(1, 3, 8, 1))
