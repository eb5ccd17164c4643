"""`r2 analyze` as a user runs it: files of every kind, outputs, gates, and all that can be wrong with the input."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import R2
from r2cli.analysis import layer_table as worker
from r2cli.analysis import terminal
from r2cli.config import inspection
from r2cli.storage import stream

ROOT = Path(__file__).parent.parent


@pytest.fixture
def model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A float checkpoint `model.safetensors` in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(trained, tmp_path / "model.safetensors"))


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that r2 did not make: `x.safetensors` with an outlier in `wide`, a flat layer, a bias and integers."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(16, 30, generator=generator).to(torch.bfloat16)
    wide[2, 3] = 40
    flat = torch.rand(8, 4, 3, 3, generator=generator).half() - 0.5
    others = {"bias": torch.zeros(16), "ids": torch.arange(6).reshape(2, 3)}
    save_file({"wide.weight": wide, "flat.weight": flat, **others}, "x.safetensors")
    return Path("x.safetensors")


def report(r2: R2, *arguments: object) -> dict[str, Any]:
    ran = r2("analyze", *arguments, "--json")
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


# --- files of every kind -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_float_checkpoint_is_shown_as_trained_and_as_ptq_rounds_it(r2: R2, model: Path) -> None:
    trained, folded = report(r2)["files"]
    assert (trained["view"], folded["view"]) == ("as trained", "folded")
    state = load_file(model)
    for layer in trained["layers"]:
        assert layer["max"] == float(state[layer["layer"]].max()) and layer["count"] == state[layer["layer"]].numel()
    assert {other["reason"] for other in trained["others"]} == {"vector", "integers"}
    for bits in (4, 2):
        quantized = json.loads(r2("ptq", "--weight-bits", bits, "--json", "--overwrite").out)["layers"]
        rounded = {f"{row['layer']}.weight": row["sqnr"] for row in quantized}
        assert set(rounded) == {layer["layer"] for layer in folded["layers"]} and len(rounded) == 10
        for layer in folded["layers"]:
            assert layer["sqnr_db"]["channel"]["min_max"][str(bits)] == pytest.approx(rounded[layer["layer"]], abs=0.01)


@pytest.mark.slow
def test_dead_channels_are_folded_as_ptq_folds_them(r2: R2, model: Path) -> None:
    """Folding alone would multiply a filter without variance by some 300."""
    with safe_open(model, framework="pt") as file:
        stored = file.metadata()
    state = load_file(model)
    name = next(name for name in state if name.endswith("running_var"))
    state[name][3] = 0.0
    save_file(state, "dead.safetensors", stored)
    (sheet,) = report(r2, "dead.safetensors", "--view", "folded")["files"]
    assert sheet["note"].startswith("1 dead channels")
    quantized = json.loads(r2("ptq", "dead.safetensors", "--weight-bits", 4, "--json").out)["layers"]
    rounded = {f"{row['layer']}.weight": row["sqnr"] for row in quantized}
    for layer in sheet["layers"]:
        assert layer["sqnr_db"]["channel"]["min_max"]["4"] == pytest.approx(rounded[layer["layer"]], abs=0.01)
    assert any(layer["channels"]["min"][3] == layer["channels"]["max"][3] == 0 for layer in sheet["layers"])


@pytest.mark.slow
def test_views_can_be_chosen(r2: R2, model: Path) -> None:
    assert [sheet["view"] for sheet in report(r2, "--view", "trained")["files"]] == ["as trained"]
    assert [sheet["view"] for sheet in report(r2, "--view", "folded")["files"]] == ["folded"]
    assert r2("analyze", "--view", "sideways").code == 2


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 3, 1])
def test_a_coded_checkpoint_and_its_onnx_hold_the_same_decoded_weights(bits: int, r2: R2, model: Path) -> None:
    assert r2("ptq", "--weight-bits", bits, "-o", "q.safetensors").code == 0
    (coded,), (file,) = (report(r2, name)["files"] for name in ("q.safetensors", "q.onnx"))
    assert coded["view"] == file["view"] == "decoded"
    for name in ("min", "max", "std", "outliers", "shape", "histogram"):
        want = {layer["layer"]: layer[name] for layer in coded["layers"]}
        assert {layer["layer"]: layer[name] for layer in file["layers"]} == want
    assert len(coded["layers"]) == 10
    assert {other["reason"] for other in file["others"]} >= {"part of a decoded weight"}


@pytest.mark.slow
def test_a_float_onnx_file_is_read_as_it_is(r2: R2, model: Path) -> None:
    assert r2("export", "-o", "float.onnx").code == 0
    (sheet,) = report(r2, "float.onnx")["files"]
    folded = {layer["shape"][0]: layer for layer in report(r2, "--view", "folded")["files"][0]["layers"]}
    assert sheet["view"] == "" and len(sheet["layers"]) == 10 and folded


def test_output_channels_of_onnx_layers_come_first(r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A MatMul's channels are its columns; dequantized and transposed weights are followed through what makes them."""
    monkeypatch.chdir(tmp_path)
    w = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    codes = torch.arange(-10, 14, dtype=torch.int8).reshape(4, 6)
    parts = {"w": w.numpy(), "codes": codes.numpy(), "scale": torch.tensor(0.5).numpy()}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["d"]),
        helper.make_node("Transpose", ["d"], ["t"], perm=[1, 0]),
        helper.make_node("Gemm", ["a", "t"], ["y"], transB=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", 6])],
        [value("y", TensorProto.FLOAT, ["n", 6])],
        [numpy_helper.from_array(array, name) for name, array in parts.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "m.onnx")
    (sheet,) = report(r2, "m.onnx")["files"]
    found = {layer["layer"]: layer for layer in sheet["layers"]}
    assert found["w"]["shape"] == [4, 6]
    assert found["w"]["channels"]["max"] == w.T.amax(1).tolist()
    assert found["t"]["shape"] == [6, 4] and found["t"]["channels"]["max"] == (0.5 * codes.T.amax(1)).tolist()


def test_foreign_files_shards_and_directories(r2: R2, foreign: Path) -> None:
    (sheet,) = report(r2, foreign)["files"]
    assert [layer["dtype"] for layer in sheet["layers"]] == ["float16", "bfloat16"] and sheet["view"] == ""
    assert {(other["name"], other["reason"]) for other in sheet["others"]} == {
        ("bias", "vector"),
        ("ids", "integers"),
    }
    folder = Path("model")
    folder.mkdir()
    shutil.copy(foreign, folder / "part.safetensors")
    places = dict.fromkeys(load_file(foreign), "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert report(r2, folder)["files"][0]["layers"] == sheet["layers"]
    assert len(report(r2, foreign, "--all")["files"][0]["layers"]) == 3


def test_layers_are_chosen_by_pattern(r2: R2, foreign: Path) -> None:
    assert [layer["layer"] for layer in report(r2, foreign, "--only", "wi*")["files"][0]["layers"]] == ["wide.weight"]
    ran = r2("analyze", foreign, "--only", "wide.weigth")
    assert ran.code == 2 and "did you mean 'wide.weight'?" in ran.err


def test_quick_measures_no_rounding(r2: R2, foreign: Path) -> None:
    (sheet,) = report(r2, foreign, "--quick")["files"]
    assert all(layer["sqnr_db"] is None and layer["outliers"] is not None for layer in sheet["layers"])
    assert r2("analyze", foreign, "--quick", "--min-sqnr", "20@4").code == 2


# --- what is printed -----------------------------------------------------------------------------------------------


def test_the_documented_keys_are_those_that_are_printed(r2: R2, foreign: Path) -> None:
    found = report(r2, foreign, "-o", "p.html")
    (sheet,) = found["files"]
    layer = sheet["layers"][0]
    printed = {*found, *sheet, *layer, *layer["channels"]}
    # The first column of the tables is the documentation of every key.
    cells = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "analyze-json.md").read_text(), re.MULTILINE)
    documented = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert documented == printed
    assert set(layer["sqnr_db"]) == {"tensor", "channel"} and set(layer["sqnr_db"]["tensor"]) == {"min_max", "best"}
    assert list(layer["empty_levels"]) == list(layer["sqnr_db"]["tensor"]["best"]) == ["8", "4", "3", "2", "1"]
    assert set(layer["histogram"]) == {"step", "first", "counts"}
    assert set(layer["channels"]["drivers"][0]) == {"channel", "max_abs"}
    assert set(sheet["others"][0]) == {"name", "shape", "dtype", "reason"}


@pytest.mark.slow
def test_eighty_columns_without_colour_are_enough(foreign: Path) -> None:
    long = "model.layers.31.self_attn.q_proj.weight"
    save_file({long: torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) ** 5}, "long.safetensors")
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
    ran = subprocess.run(
        [sys.executable, "-m", "r2cli", "analyze", "long.safetensors", "x.safetensors"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    lines = ran.stdout.splitlines()
    tables = [line for line in lines if "•" in line or "max/std" in line]
    assert len(tables) >= 4 and all(len(line) <= 80 for line in tables) and "\x1b" not in ran.stdout
    assert any("31.self_attn.q_proj" in line and line.count("•") >= 2 for line in lines), (
        "outliers are dots, in the tails"
    )
    assert lines[-1] == "next: r2 analyze long.safetensors x.safetensors -o report.html"


@pytest.mark.slow
def test_the_worst_come_first_and_the_others_are_counted(r2: R2, model: Path) -> None:
    ran = r2("analyze", "--limit", 3, "--view", "trained")
    assert ran.code == 0 and "7 more layers: --limit 0 shows all" in ran.out and "tensors are no layers (" in ran.out
    found = report(r2, "--view", "trained")["files"][0]["layers"]
    worst = min(found, key=lambda layer: layer["sqnr_db"]["tensor"]["min_max"]["4"])
    table = ran.out.splitlines()
    assert table[2].startswith(worst["layer"].removesuffix(".weight"))


def test_names_are_no_markup(r2: R2, foreign: Path) -> None:
    save_file({"[red]a[/red]": torch.ones(3, 3), "[/b]": torch.randn(3, 3)}, "m.safetensors")
    ran = r2("analyze", "m.safetensors")
    assert ran.code == 0 and "[red]a[/red]" in ran.out and "[/b]" in ran.out


def test_cells_of_the_small_histogram() -> None:
    x = torch.cat([torch.linspace(-1, 1, 2000), torch.tensor([5.0])]).reshape(3, -1)
    row = worker.row(
        stream.Stored("w", (3, 667), x.dtype, "float32", "", lambda a, b, _: x.reshape(-1)[a:b]),
        worker.AnalyzeSettings(),
    )
    heights, marked = terminal.cells(row, 4.0)
    assert heights[-1] > 0 and marked[-1] and not any(marked[:-1])
    assert heights[:5] == [0] * 5 and min(heights[6:8]) > 0.9


def test_sorts_and_bits_are_those_of_the_worker() -> None:
    assert set(inspection.SORTS) == set(worker.SORTS)


# --- outputs and gates ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_and_pages_are_written_whole_and_never_over_anything(r2: R2, foreign: Path) -> None:
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!doctype html>"}
    outputs = [argument for kind in starts for argument in ("-o", f"out.{kind}")]
    assert report(r2, foreign, *outputs)["outputs"] == [f"out.{kind}" for kind in starts]
    first = {kind: Path(f"out.{kind}").read_bytes() for kind in starts}
    assert all(first[kind].startswith(start) for kind, start in starts.items())
    assert r2("analyze", foreign, "-o", "out.png").code == 2
    assert r2("analyze", foreign, *outputs, "--overwrite").code == 0
    assert {kind: Path(f"out.{kind}").read_bytes() for kind in starts} == first, "the same weights, the same bytes"
    assert r2("analyze", foreign, "-o", "x.txt").code == 2
    assert r2("analyze", foreign, "-o", "x.safetensors", "--overwrite").code == 2
    Path("folder.png").mkdir()
    assert r2("analyze", foreign, "-o", "folder.png").code == 2
    assert not list(Path().glob(".*partial"))


@pytest.mark.slow
def test_a_picture_of_thousands_of_layers_is_refused(r2: R2, foreign: Path) -> None:
    save_file({f"l{n}": torch.tensor([[0.0, n + 1.0]]) for n in range(1600)}, "many.safetensors")
    assert r2("analyze", "many.safetensors", "-o", "m.png", "--quick").code == 0
    ran = r2("analyze", "many.safetensors", "-o", "all.png", "--quick", "--limit", 0)
    assert ran.code == 2 and "too many for a picture" in ran.err and not Path("all.png").exists()


@pytest.mark.slow
def test_a_picture_of_nothing_and_of_constants(r2: R2, foreign: Path) -> None:
    save_file({"ids": torch.arange(3)}, "none.safetensors")
    constant = {"c": torch.full((4, 4), 0.5), "z": torch.zeros(4, 4), "e": torch.zeros(0, 4), "one": torch.ones(1, 1)}
    save_file(constant, "constant.safetensors")
    for name in ("none.safetensors", "constant.safetensors"):
        ran = r2("analyze", name, "-o", "a.png", "-o", "a.html", "--overwrite", "--limit", 0)
        assert ran.code == 0, ran.err
    save_file({"a$x^$": torch.randn(4, 4), "$": torch.randn(4, 4), "_b": torch.randn(3, 3)}, "_dollars$.safetensors")
    assert r2("analyze", "_dollars$.safetensors", "-o", "d.png").code == 0
    broken = torch.full((4, 4), math.nan)
    save_file({"broken": broken, "b.weight": torch.ones(2, 2)}, "nan.safetensors")
    ran = r2("analyze", "nan.safetensors", "-o", "n.png", "-o", "n.html", "-o", "n.svg")
    assert ran.code == 0 and "16 bad" in ran.out and "broken: 16 NaN and 0 infinite" in ran.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "passes", "fails"),
    [("--max-range-ratio", "100", "5"), ("--max-outliers", "0.5", "0.001"), ("--min-sqnr", "1@4", "20@4")],
)
def test_gates_name_the_layers_that_fail_and_leave_the_files(
    gate: str, passes: str, fails: str, r2: R2, foreign: Path
) -> None:
    assert r2("analyze", foreign, gate, passes).code == 0
    ran = r2("analyze", foreign, gate, fails, "-o", "p.html")
    assert ran.code == 1 and "x.safetensors: wide (" in ran.err and "flat" not in ran.err
    assert Path("p.html").exists()


def test_nan_fails_every_gate(r2: R2, foreign: Path) -> None:
    save_file({"w": torch.tensor([[1.0, math.nan], [math.inf, 2.0]])}, "nan.safetensors")
    assert r2("analyze", "nan.safetensors").code == 0
    for gate in (["--max-range-ratio", 100], ["--max-outliers", 1], ["--min-sqnr", "0@8"]):
        ran = r2("analyze", "nan.safetensors", *gate)
        assert ran.code == 1 and "w (1 NaN and 1 infinite weights)" in ran.err


@pytest.mark.parametrize("value", ["20", "x@4", "20@x", "20@5", "@", "20@4@4", "nan@4"])
def test_a_gate_that_makes_no_sense_is_refused_before_any_work(value: str, r2: R2, foreign: Path) -> None:
    ran = r2("analyze", foreign, "--min-sqnr", value)
    assert ran.code == 2 and "--min-sqnr" in ran.err


def test_a_dry_run_writes_and_measures_nothing(r2: R2, foreign: Path) -> None:
    ran = r2("analyze", foreign, "-o", "p.html", "--dry-run")
    assert ran.code == 0 and "would analyze 2 layers" in ran.out and not Path("p.html").exists()


# --- what can be wrong ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_input_is_one_sentence_that_names_the_file(r2: R2, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = foreign.read_bytes()
    Path("cut.safetensors").write_bytes(good[:20])
    Path("short.safetensors").write_bytes(good[:-1])
    Path("text.safetensors").write_bytes(b"not what it says it is, and long enough")
    Path("bad.onnx").write_bytes(b"no protobuf")
    Path("empty").mkdir()
    Path("model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    for name, told in {
        "cut.safetensors": "cut off",
        "short.safetensors": "ends inside the tensor",
        "text.safetensors": "not a safetensors file",
        "bad.onnx": "not a valid ONNX model",
        "empty": "a directory without",
        "model.safetensors.index.json": "gone.safetensors is missing",
        "none.safetensors": "does not exist",
        "none.onnx": "does not exist",
    }.items():
        ran = r2("analyze", name, "-o", "p.html")
        assert ran.code == 2 and told in ran.err and name.split("/")[0].split(".")[0][:4] in ran.err, ran.err
        assert ran.err.count("\n") == 1 and not Path("p.html").exists()
    # A file that cannot be read after its header could: nothing is written.

    def broken(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "preadv", broken)
    ran = r2("analyze", foreign, "-o", "p.html")
    assert ran.code == 2 and "x.safetensors: tensor 'flat.weight' cannot be read (Permission denied)" in ran.err
    assert not Path("p.html").exists()


@pytest.mark.slow
def test_a_checkpoint_whose_graph_cannot_be_built_is_shown_as_trained(r2: R2, model: Path) -> None:
    state = load_file(model)
    with safe_open(model, framework="pt") as file:
        stored = file.metadata()
    meta = json.loads(stored["r2"])
    meta["model"]["name"] = "a_network_of_tomorrow"
    save_file(state, "other.safetensors", {"r2": json.dumps(meta)})
    (sheet,) = report(r2, "other.safetensors")["files"]
    assert sheet["view"] == "as trained" and "shown as trained only" in sheet["note"] and len(sheet["layers"]) == 10
    ran = r2("analyze", "other.safetensors", "--view", "folded")
    assert ran.code == 2 and "other.safetensors cannot be folded" in ran.err


@pytest.mark.slow
def test_a_checkpoint_with_nan_is_counted_not_refused(r2: R2, model: Path) -> None:
    with safe_open(model, framework="pt") as file:
        stored = file.metadata()
    state = load_file(model)
    name = next(name for name in state if state[name].ndim == 4)
    state[name].view(-1)[0] = math.nan
    save_file(state, "nan.safetensors", stored)
    (sheet,) = report(r2, "nan.safetensors")["files"]
    assert {layer["layer"]: layer["nan"] for layer in sheet["layers"]}[name] == 1
    assert "NaN or infinite" in sheet["note"]
