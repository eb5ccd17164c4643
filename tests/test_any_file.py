"""`r2 verify` on anybody's files: what users of other tools report (files of floats, larger than float32, results that
depend on the optimisation level, custom operators), each in a network of two layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import r2cli
from conftest import R2
from r2cli import errors
from r2cli.deploy import any_file, engines, likeness, runtime
from r2cli.deploy.engines import Arrays, Run
from r2cli.deploy.verify import Proof
from r2cli.quantized import decibels

WIDE = 48
ONLY_ORT = r2cli.VerifyConfig(runtime=["onnxruntime"])


def _weights() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    found = [(generator.standard_normal((WIDE, WIDE)) / WIDE**0.5).astype(np.float32) for _ in range(2)]
    return found[0], found[1]


def _model(nodes: list[onnx.NodeProto], held: list[TensorProto], opset: int = 13, *domains: str) -> ModelProto:
    shape: list[str | int | None] = ["n", WIDE]
    graph = helper.make_graph(
        nodes,
        "two_layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        held,
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _layers(first: str = "a", second: str = "b") -> list[onnx.NodeProto]:
    return [
        helper.make_node("MatMul", ["x", first], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", second], ["y"]),
    ]


def _float() -> ModelProto:
    a, b = _weights()
    return _model(_layers(), [numpy_helper.from_array(a, "a"), numpy_helper.from_array(b, "b")])


def _codes(weight: np.ndarray) -> tuple[np.ndarray, np.float32]:
    scale = np.float32(np.abs(weight).max() / 127)
    return np.rint(weight / scale).astype(np.int8), scale


def _held(name: str, weight: np.ndarray) -> list[TensorProto]:
    codes, scale = _codes(weight)
    return [numpy_helper.from_array(codes, f"{name}q"), numpy_helper.from_array(np.asarray(scale), f"{name}s")]


def _decoded() -> ModelProto:
    """Both weights as INT8 behind DequantizeLinear."""
    a, b = _weights()
    decode = [helper.make_node("DequantizeLinear", [f"{name}q", f"{name}s"], [name]) for name in "ab"]
    return _model([*decode, *_layers()], [*_held("a", a), *_held("b", b)])


def _grid() -> list[TensorProto]:
    return [
        numpy_helper.from_array(np.array(0.05, np.float32), "s"),
        numpy_helper.from_array(np.array(128, np.uint8), "z"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]


def _rounded_inputs(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The first layer reads a value behind QuantizeLinear and DequantizeLinear."""
    nodes[0].input[0] = "xd"
    quantize = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"])
    return [quantize, helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]), *nodes]


def _rounded_at_load() -> ModelProto:
    """Float weights behind QuantizeLinear, as tools leave them that simulate."""
    a, b = _weights()
    nodes = []
    for name in "ab":
        nodes.append(helper.make_node("QuantizeLinear", [f"{name}f", f"{name}s", "zero"], [f"{name}q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}q", f"{name}s", "zero"], [name]))
    scales = [numpy_helper.from_array(np.asarray(_codes(w)[1]), f"{n}s") for n, w in zip("ab", (a, b), strict=True)]
    held = [numpy_helper.from_array(a, "af"), numpy_helper.from_array(b, "bf"), *scales, *_grid()]
    return _model([*nodes, *_rounded_inputs(_layers())], held)


def _saved(model: ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _proof(model: ModelProto, against: ModelProto | None = None) -> Proof:
    path = _saved(model, Path("model.onnx"))
    beside = None if against is None else _saved(against, Path("float.onnx"))
    return r2cli.verify(path, beside, config=ONLY_ORT)


def _failed(proof: Proof) -> dict[str, str]:
    return {check.name: check.detail for check in proof.checks if not check.passed}


def _detail(proof: Proof, name: str) -> str:
    return next(check.detail for check in proof.checks if check.name == name)


# --- forms of integer weights --------------------------------------------------------------------------------------


def _integer_operators() -> ModelProto:
    """DynamicQuantizeLinear and MatMulInteger, as dynamic quantization writes them."""
    a, b = _weights()
    nodes, value = [], "x"
    for name, out in (("a", "r"), ("b", "y")):
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [value], [f"{name}u", f"{name}us", f"{name}uz"]),
            helper.make_node("MatMulInteger", [f"{name}u", f"{name}q", f"{name}uz"], [f"{name}i"]),
            helper.make_node("Cast", [f"{name}i"], [f"{name}c"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}us", f"{name}s"], [f"{name}m"]),
            helper.make_node("Mul", [f"{name}c", f"{name}m"], [out]),
        ]
        value = out
    return _model(nodes, [*_held("a", a), *_held("b", b)])


def _linear_operators() -> ModelProto:
    """QLinearMatMul, which takes codes and gives codes."""
    a, b = _weights()
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("QLinearMatMul", ["xq", "s", "z", "aq", "as", "zero", "s", "z"], ["hq"]),
        helper.make_node("QLinearMatMul", ["hq", "s", "z", "bq", "bs", "zero", "s", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    return _model(nodes, [*_held("a", a), *_held("b", b), *_grid()])


def _blocks() -> ModelProto:
    """MatMulNBits of ONNX Runtime's own: two codes of 4 bits a byte."""
    packed = np.random.default_rng(1).integers(0, 256, (WIDE, 3, 8), dtype=np.uint8)
    scales = np.full((WIDE, 3), 0.02, np.float32)
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "p", "ps"], ["y"], domain="com.microsoft", K=WIDE, N=WIDE, bits=4, block_size=16
        )
    ]
    held = [numpy_helper.from_array(packed, "p"), numpy_helper.from_array(scales, "ps")]
    return _model(nodes, held, 13, "com.microsoft")


@pytest.mark.parametrize("make", [_decoded, _integer_operators, _linear_operators, _blocks])
def test_integer_weights_are_found_in_every_form(make: Callable[[], ModelProto], here: Path) -> None:
    proof = _proof(make())
    assert not _failed(proof)
    assert proof.measures["integer_share"] == 100 and not proof.measures["float_weights"]
    count = WIDE * WIDE * (1 if make is _blocks else 2)
    assert proof.measures["weights"] == count and f"100 % of {count:,} weights are codes" in proof.checks[0].detail
    assert f"random inputs x 8x{WIDE} (the file leaves axes open" in proof.measures["inputs"]


def test_operators_that_are_not_standard_are_named(here: Path) -> None:
    assert _detail(_proof(_blocks()), "operators") == "opset 13; not standard: MatMulNBits of com.microsoft"
    assert _detail(_proof(_decoded()), "operators") == "opset 13, all standard"


def test_functions_of_a_file_s_own_are_named(here: Path) -> None:
    model = _decoded()
    relu = helper.make_function("own", "Positive", ["v"], ["w"], [helper.make_node("Relu", ["v"], ["w"])], _opsets())
    model.functions.append(relu)
    model.opset_import.append(helper.make_opsetid("own", 1))
    node = next(each for each in model.graph.node if each.op_type == "Relu")
    node.op_type, node.domain = "Positive", "own"
    proof = _proof(model)
    assert proof.passed and "1 functions of the file's own (Positive)" in _detail(proof, "operators")


def _opsets() -> list[onnx.OperatorSetIdProto]:
    return [helper.make_opsetid("", 13)]


def test_weights_in_a_file_beside_count(here: Path) -> None:
    onnx.save(_decoded(), "beside.onnx", save_as_external_data=True, location="data.bin", size_threshold=0)
    proof = r2cli.verify("beside.onnx", config=ONLY_ORT)
    both = Path("beside.onnx").stat().st_size + Path("data.bin").stat().st_size
    assert proof.passed and proof.measures["bytes"] == both > 2 * WIDE * WIDE


# --- what users report ---------------------------------------------------------------------------------------------


def test_a_quantized_file_that_holds_floats_fails(here: Path) -> None:
    a, b = _weights()
    held = [numpy_helper.from_array(a, "a"), numpy_helper.from_array(b, "b"), *_grid()[:2]]
    simulated = _failed(_proof(_model(_rounded_inputs(_layers()), held)))["integer weights"]
    assert "0 % of" in simulated and f"a of MatMul ({4 * a.size:,} bytes)" in simulated
    rounded = _proof(_rounded_at_load())
    assert "2 are floats that a runtime rounds when it loads" in _failed(rounded)["integer weights"]
    assert [each["bytes"] for each in rounded.measures["float_weights"]] == [4 * a.size] * 2


def test_half_of_the_weights_in_float_are_too_many(here: Path) -> None:
    model = _decoded()
    half = _model([model.graph.node[0], *_layers()], [*model.graph.initializer[:2], _float().graph.initializer[1]])
    assert "50 % of" in _failed(_proof(half))["integer weights"]


def test_a_plain_float_file_is_told_as_such(here: Path) -> None:
    failed = _failed(_proof(_float()))
    assert list(failed) == ["integer weights"]
    assert failed["integer weights"].startswith("float file: no weight is integer; float: a of MatMul")


def test_codes_stored_as_numbers_of_varying_length_fail_by_name(here: Path) -> None:
    model = _decoded()
    for each in model.graph.initializer:
        if each.name == "bq":
            values = numpy_helper.to_array(each).reshape(-1).tolist()
            each.CopyFrom(helper.make_tensor("bq", TensorProto.INT8, [WIDE, WIDE], values))
    proof = _proof(model, _float())
    assert proof.measures["bytes"] > 0.7 * proof.measures["float_bytes"]
    assert _failed(proof).keys() == {"size"} and "bq takes" in _failed(proof)["size"]


def test_a_file_larger_than_its_float_one_fails(here: Path) -> None:
    model = _decoded()
    model.doc_string = "x" * (8 * WIDE * WIDE)
    assert " of the float file's " in _failed(_proof(model, _float()))["size"]
    assert "of what float32 weights would take" in _detail(_proof(_decoded()), "size")


def test_another_network_than_the_float_file_s_fails(here: Path) -> None:
    proof = _proof(_decoded(), _float())
    assert proof.passed and proof.measures["outputs"][0]["sqnr_db"] > 30
    assert proof.measures["outputs"][0]["agreement"] > 80
    a, b = _weights()
    turned = _model(_layers(), [numpy_helper.from_array(-a, "a"), numpy_helper.from_array(b, "b")])
    assert _failed(_proof(_decoded(), turned)).keys() == {"like float"}


def test_results_that_depend_on_the_optimisation_level_fail(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = any_file.loaded

    def broken(path: Path, *, optimise: bool = True, exact: bool = True) -> Run:
        run = loaded(path, optimise=optimise, exact=exact)

        def shifted(given: Arrays) -> dict[str, engines.Array]:
            return {name: value + optimise for name, value in run(given).items()}

        return shifted

    monkeypatch.setattr(any_file, "loaded", broken)
    assert "default: -" in _failed(_proof(_decoded()))["optimisation"]
    monkeypatch.setattr(any_file, "loaded", _only_as_written)
    proof = _proof(_decoded())
    assert "it runs only without: no kernel" in _failed(proof)["optimisation"] and "nodes" not in proof.measures


def _only_as_written(path: Path, *, optimise: bool = True, exact: bool = True) -> Run:
    if optimise:
        raise errors.InputError("no kernel")
    return engines.of_session(runtime.session(path, optimise=False), str(path))


def test_dead_initializers_fail_unless_they_are_next_to_nothing(here: Path) -> None:
    model = _decoded()
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "left"))
    proof = _proof(model)
    assert proof.passed and "left (" in _detail(proof, "nothing beside")
    model.graph.initializer.append(numpy_helper.from_array(_weights()[0], "dead"))
    assert "dead and 1 more" in _failed(_proof(model))["nothing beside"]


def test_what_a_branch_reads_is_not_dead(here: Path) -> None:
    model = _decoded()
    one = [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)]
    then = helper.make_graph([helper.make_node("Add", ["z", "shift"], ["o"])], "then", [], one)
    other = helper.make_graph([helper.make_node("Identity", ["z"], ["o"])], "other", [], one)
    model.graph.node[-1].output[0] = "z"
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.ones(WIDE, np.float32), "shift"), numpy_helper.from_array(np.asarray(True), "c")]
    )
    model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other))
    assert _detail(_proof(model), "nothing beside") == "every initializer goes into the result"


def test_an_output_that_is_not_finite_fails(here: Path) -> None:
    a, b = _weights()
    b[0, 0] = np.inf
    proof = _proof(_model(_layers(), [numpy_helper.from_array(a, "a"), numpy_helper.from_array(b, "b")]))
    assert {"runs", "optimisation"} <= _failed(proof).keys()


# --- likeness ------------------------------------------------------------------------------------------------------


def test_likeness_is_by_hand() -> None:
    reference = {"y": np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)}
    found = {"y": np.array([[1.0, 0.0], [0.0, 1.5]], np.float32)}
    (own,) = likeness.compared(found, reference, noise_db=30)
    assert own.sqnr_db == pytest.approx(10 * np.log10(5 / 0.25)) and own.agreement == 100
    (other,) = likeness.compared({"z": reference["y"][:, ::-1]}, reference, noise_db=30)
    assert other.agreement == 0 and other.differ == 2 and other.output == "y"
    zeros = {"y": np.zeros((2, 2), np.float32)}
    assert likeness.compared(found, zeros, noise_db=30)[0].sqnr_db == -decibels.MOST
    assert likeness.compared(zeros, zeros, noise_db=30)[0].sqnr_db == decibels.MOST


def test_a_row_that_is_nothing_beside_the_others_decides_nothing() -> None:
    # (n, 2, cells), as detectors of boxes give it: one row of sizes in pixels, one of scores that are all nearly 0.
    reference = np.array([[[10.0, 200.0, 50.0], [1e-6, 3e-6, 2e-6]]], np.float32)
    found = reference.copy()
    found[0, 1] = [3e-6, 1e-6, 2e-6]
    assert likeness.compared({"y": found}, {"y": reference}, noise_db=30)[0].differ == 0
    found[0, 0] = [200.0, 10.0, 50.0]
    assert likeness.compared({"y": found}, {"y": reference}, noise_db=30)[0].differ == 1


# --- the command, and bad input ------------------------------------------------------------------------------------


def test_the_command_tells_ticks_and_exits_by_them(r2: R2, here: Path) -> None:
    _saved(_decoded(), Path("good.onnx"))
    _saved(_float(), Path("float.onnx"))
    ran = r2("verify", "good.onnx", "--against", "float.onnx", "--runtime", "onnxruntime", "--json")
    told = json.loads(ran.out)
    assert ran.code == 0 and told["passed"] and told["ticks"] == "7/7" and told["against"] == "float.onnx"
    ran = r2("verify", "float.onnx", "--runtime", "onnxruntime", "--shape", f"x=3x{WIDE}")
    assert ran.code == 1 and "✗ integer weights: float file" in ran.out and f"random inputs x 3x{WIDE}" in ran.out
    assert "next: r2 analyze float.onnx" in ran.out and "failed its proof: integer weights" in ran.err
    gate = r2("verify", "good.onnx", "--runtime", "onnxruntime", "--max-bytes", 10)
    assert gate.code == 1 and "above --max-bytes 10" in gate.err


def _foreign_operator() -> ModelProto:
    model = _float()
    model.graph.node[1].op_type, model.graph.node[1].domain = "Swish", "my.ops"
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    return model


def _external(location: str) -> ModelProto:
    model = _float()
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location, length=4 * WIDE * WIDE)
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    return model


def _new_opset() -> ModelProto:
    model = _float()
    model.opset_import[0].version = 99
    return model


BAD: dict[str, tuple[Callable[[], ModelProto], list[str]]] = {
    "custom operator": (_foreign_operator, ["Swish of my.ops"]),
    "new opset": (_new_opset, ["opset 99", "ONNX Runtime"]),
    "missing data": (lambda: _external("gone.bin"), ["'a'", "gone.bin", "not there"]),
    "data outside": (lambda: _external("../outside.bin"), ["'a'", "../outside.bin", "outside its folder"]),
    "data by an absolute path": (lambda: _external("/etc/passwd"), ["'a'", "/etc/passwd", "outside its folder"]),
    "short data": (lambda: _external("short.bin"), ["'a'", "short.bin", "too short"]),
    "a link": (lambda: _external("link.bin"), ["'a'", "link.bin", "outside its folder"]),
}


@pytest.mark.parametrize(("make", "names"), BAD.values(), ids=BAD)
def test_bad_files_get_one_sentence(make: Callable[[], ModelProto], names: list[str], r2: R2, here: Path) -> None:
    Path("short.bin").write_bytes(bytes(8))
    Path("link.bin").symlink_to("short.bin")
    _saved(make(), Path("bad.onnx"))
    ran = r2("verify", "bad.onnx")
    assert ran.code == 2 and all(name in ran.err for name in ["bad.onnx", *names]), ran.err


def test_a_tensor_of_a_node_may_lie_in_another_file(here: Path) -> None:
    model = _float()
    weight = model.graph.initializer.pop(0)
    model.graph.node.insert(0, helper.make_node("Constant", [], [weight.name], value=weight))
    onnx.save(model, "whole.onnx")
    place: dict[str, Any] = {"save_as_external_data": True, "location": "data.bin", "convert_attribute": True}
    Path("folder").mkdir()
    onnx.save(model, "folder/apart.onnx", size_threshold=0, **place)
    assert Path("folder/data.bin").exists()
    held = runtime.opened(Path("folder/apart.onnx")).graph.node[0].attribute[0].t
    np.testing.assert_array_equal(numpy_helper.to_array(held), numpy_helper.to_array(weight))


def test_a_truncated_file_and_other_bad_input(r2: R2, here: Path) -> None:
    Path("cut.onnx").write_bytes(_float().SerializeToString()[:-20])
    _saved(_float(), Path("float.onnx"))
    for arguments, name in (
        (["cut.onnx"], "cut.onnx is not a valid ONNX model"),
        (["missing.onnx"], "missing.onnx does not exist"),
        (["float.safetensors"], "is no .onnx or .tflite file"),
        (["float.onnx", "--data", "digits"], "leave out --data"),
        (["float.onnx", "--runtime", "onxruntime"], "did you mean 'onnxruntime'?"),
        (["float.onnx", "--shape", "x=3"], f"wants nx{WIDE}"),
        (["float.onnx", "--shape", "z=3x3"], "unknown input of --shape 'z'"),
        (["float.onnx", "--shape", "3x3"], "is not NAME=SIZES"),
        (["float.onnx", "--against", "cut.onnx"], "cut.onnx is not a valid ONNX model"),
        (["float.onnx", "--model", "net.py:own"], "belong to --against CHECKPOINT"),
    ):
        ran = r2("verify", *arguments)
        assert ran.code == 2 and name in ran.err, ran.err


def test_a_runtime_that_is_not_installed_is_said_with_the_way_to_get_it(here: Path) -> None:
    absent = engines.Engine("other", "Other", "no_such_module", "pip install other", lambda *_: lambda given: {})
    assert not absent.installed
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ENGINES", "USUAL"):
            patch.setattr(engines, name, {"other": absent})
        with pytest.raises(errors.InputError, match="Other is not installed: get it with `pip install other`"):
            engines.chosen(["other"])
        assert engines.chosen([]) == []
