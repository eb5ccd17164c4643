"""The manifest beside a model: what it holds, what `r2 verify` makes of it, and `--baseline`, which reads it."""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import R2
from r2cli import data as datasets
from r2cli.cli import baseline, gates, provenance
from r2cli.cli.baseline import Baseline
from r2cli.config.groups import AccuracyGate, CompressionGates, Preparation
from r2cli.errors import InputError
from r2cli.storage.manifest import Manifest

RECORD, CODED, FILE = (f"model.w4a8-none.{ending}" for ending in ("manifest.json", "safetensors", "onnx"))
QUICK = ["--eval-images", "40"]


@pytest.fixture(scope="module")
def quantized(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantized network."""
    from r2cli.cli.main import invoke

    folder = tmp_path_factory.mktemp("quantized")
    shutil.copy(trained, folder / "model.safetensors")
    invoke(["ptq", str(folder / "model.safetensors"), *QUICK, "--weight-bits", "4", "--max-drop", "50", "--json"])
    return folder


@pytest.fixture
def here(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    shutil.copytree(quantized, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def sha256(name: str) -> str:
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def changed(**report: Any) -> None:
    """Write the manifest as base.json with another report."""
    stored = json.loads(Path(RECORD).read_text())
    Path("base.json").write_text(json.dumps(stored | {"report": stored["report"] | report}))


def test_it_says_what_was_read_and_written_how_and_how_good_it_is(here: Path, r2: R2) -> None:
    stored = json.loads(Path(RECORD).read_text())
    assert stored["written"] == {name: sha256(name) for name in (CODED, FILE)}
    assert stored["asked"]["read"]["model.safetensors"] == sha256("model.safetensors")
    assert stored["asked"]["places"] == {"model.safetensors": "model.safetensors"}
    assert {"r2", "python", "torch", "onnx", "onnxruntime"} == stored["versions"].keys() and stored["processor"]
    report = stored["report"]
    assert report["gates"] == [{"name": "--max-drop 50", "passed": True, "detail": ""}]
    assert report["metric"]["name"] == "top1" and report["measured_on"]["samples"] == 40
    _, command, *line = shlex.split(stored["asked"]["line"])
    again = json.loads(r2(command, *line, "-o", "new.safetensors", "--dry-run", "--json").out)["options"]
    assert again.items() <= {**stored["asked"]["options"]}.items() and again["weight_bits"] == 4


def test_the_line_holds_what_came_from_elsewhere(here: Path, r2: R2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R2_EVAL_IMAGES", "10")
    Path("pyproject.toml").write_text("[tool.r2.export]\nbatch = 2\n")
    assert r2("export", CODED, "-o", "other.onnx", "--no-eval", "-q").code == 2  # which says that the variable is read
    assert r2("export", CODED, "-o", "other.onnx", "-q").code == 0
    record = Manifest.load(Path("other.onnx.manifest.json"))
    assert record.asked.line == f"r2 export {CODED} --eval-images 10 --batch 2 --output other.onnx"
    assert record.written == {"other.onnx": sha256("other.onnx")}
    killed = json.loads(Path("other.onnx.manifest.json").read_text()) | {"finished": False}
    Path("other.onnx.manifest.json").write_text(json.dumps(killed))  # as if it were killed before its last rename
    assert r2("export", CODED, "-o", "other.onnx", "-q").code == 0
    assert Manifest.load(Path("other.onnx.manifest.json")).finished
    (check,) = provenance.checks(Path("other.onnx"))
    assert check.passed and "1 of 1 files are as `r2 export" in check.detail


# --- r2 verify -----------------------------------------------------------------------------------------------------


def test_verify_has_a_check_of_the_manifest(here: Path, r2: R2) -> None:
    ran = r2("verify", FILE, "--data", "digits:10")
    assert ran.code == 0 and "✓ manifest: 2 of 2 files are as `r2 ptq" in ran.out
    Path(CODED).write_bytes(Path(CODED).read_bytes() + b" ")
    ran = r2("verify", FILE, "--data", "digits:10")
    assert ran.code == 1 and f"manifest ({CODED} is not what `r2 ptq" in ran.err


@pytest.mark.parametrize(
    ("change", "passed", "told"),
    [
        (lambda: Path(FILE).write_bytes(b"other"), False, f"{FILE} is not what `r2 ptq"),
        (lambda: Path(CODED).unlink(), True, "1 of 2 files are as"),
        (lambda: Path("model.safetensors").unlink(), True, "model.safetensors, which it read, is not there"),
        (lambda: Path("model.safetensors").write_bytes(b""), True, "model.safetensors, which it read, is another"),
        (lambda: Path(RECORD).write_bytes(Path(RECORD).read_bytes()[:500]), False, f"{RECORD} is damaged"),
        (lambda: Path(RECORD).write_text('{"name": "theirs"}'), False, f"{RECORD} is no manifest of r2's"),
        (lambda: Path(RECORD).write_text('{"format": 9, "asked": 1}'), False, "of another version of r2"),
        (
            lambda: Path(RECORD).write_text(Path(RECORD).read_text().replace(FILE, "b.onnx")),
            False,
            f"nothing of {FILE}",
        ),
        (
            lambda: Path(RECORD).write_text(Path(RECORD).read_text().replace(FILE, "../b.onnx")),
            False,
            "is not beside it",
        ),
        (lambda: Path(RECORD).rename("model.w4a8-none.run.json"), True, "2 of 2 files are as"),
    ],
    ids=["file", "checkpoint", "no input", "input", "cut", "foreign", "version", "others", "elsewhere", "former name"],
)
def test_what_is_wrong_beside_a_file_is_told(change: Callable[[], object], passed: bool, told: str, here: Path) -> None:
    change()
    (check,) = provenance.checks(Path(FILE))
    assert (check.name, check.passed) == ("manifest", passed) and told in check.detail, check


def test_without_a_manifest_there_is_no_check_and_a_folder_may_move(here: Path, tmp_path: Path) -> None:
    here.rename(tmp_path / "moved")
    (check,) = provenance.checks(tmp_path / "moved" / FILE)
    assert check.passed and "read" not in check.detail
    (tmp_path / "moved" / RECORD).unlink()
    assert provenance.checks(tmp_path / "moved" / FILE) == []


# --- --baseline ----------------------------------------------------------------------------------------------------


def test_a_network_that_fell_behind_fails_and_says_by_how_much(here: Path, r2: R2) -> None:
    stored = json.loads(Path(RECORD).read_text())["report"]
    value = stored["metric"]["value"]
    line = ["evaluate", FILE, *QUICK, "--json", "--baseline"]
    assert r2(*line, RECORD).code == 0
    changed(metric=stored["metric"] | {"value": value + 0.5})
    ran = r2(*line, "base.json", "--max-regression", "0.3")
    assert ran.code == 1 and f"is 0.50 points behind the {value + 0.5:.2f} of base.json" in ran.err
    (gate,) = json.loads(ran.out)["gates"]
    assert gate["name"] == "--max-regression 0.3" and not gate["passed"]
    assert r2(*line, "base.json", "--max-regression", "0.5").code == 0


@pytest.mark.parametrize(
    ("higher", "value", "bound", "missed"),
    [
        (True, 97.5, 0.3, False),  # 97.8 - 97.5 is a little above 0.3 in floats
        (True, 97.4, 0.3, True),
        (True, 98.0, None, False),
        (True, 97.7, None, True),
        (False, 98.0, 0.3, False),
        (False, 98.2, 0.3, True),
        (False, 90.0, None, False),
    ],
)
def test_the_bound_goes_with_what_is_better(higher: bool, value: float, bound: float | None, missed: bool) -> None:
    metric = {"value": value, "higher": higher, "unit": "%", "shown": f"m {value}"}
    report: dict[str, Any] = {"metric": metric}
    gates.judge(report, CompressionGates(max_regression=bound), baseline=Baseline(Path("b.json"), 97.8))
    assert [each["passed"] for each in report["gates"]] == [not missed]


def report_with(**metric: Any) -> Callable[[], object]:
    return lambda: changed(metric=json.loads(Path(RECORD).read_text())["report"]["metric"] | metric)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda: None, "base.json cannot be read: No such file"),
        (lambda: Path("base.json").mkdir(), "base.json cannot be read: Is a directory"),
        (lambda: Path("base.json").write_text("{"), "base.json is damaged (it is not JSON"),
        (lambda: Path("base.json").write_text("[1]"), "base.json is no manifest of r2's"),
        (lambda: Path("base.json").write_text('{"top1": 97}'), "base.json is no manifest of r2's"),
        (lambda: Path("base.json").write_bytes(b"\xff\xfe"), "base.json is damaged"),
        (report_with(value=float("nan")), "'report.metric.value' is nan, not a finite number"),
        (report_with(value="97"), "'report.metric.value' is '97', not a number"),
        (report_with(name="mse", label="mse"), "has mse, and what is measured is top-1"),
        (report_with(higher=False), "and what is measured is top-1"),
        (lambda: changed(metric=None), "holds no metric of a data set"),
        (lambda: changed(measured_on=None), "holds no metric of a data set"),
        (
            lambda: changed(measured_on={"data": "mnist", "samples": 40}),
            "on 40 samples of mnist, and this is 40",
        ),
        (lambda: changed(measured_on={"data": "digits:64", "samples": 41}), "on 41 samples of digits:64, and this is"),
    ],
)
def test_a_baseline_that_cannot_be_compared_is_one_sentence(
    change: Callable[[], object], told: str, here: Path, digits: datasets.Data
) -> None:
    change()
    with pytest.raises(InputError, match=re.escape(told)):
        baseline.read(AccuracyGate(baseline=Path("base.json")), Preparation(), digits)


def test_a_baseline_is_taken_whose_folder_of_data_has_another_name(here: Path, digits: datasets.Data) -> None:
    """Another machine of a pipeline has its images elsewhere."""
    changed(measured_on={"data": "imagefolder", "samples": 40})
    moved = replace(digits, name="imagefolder:/elsewhere")
    found = baseline.read(AccuracyGate(baseline=Path("base.json")), Preparation(), moved)
    assert found == Baseline(Path("base.json"), Manifest.load(Path(RECORD)).report["metric"]["value"])


@pytest.fixture(scope="module")
def digits() -> datasets.Data:
    return datasets.with_test_images(datasets.load("digits"), 40)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["ptq", "model.safetensors", "--max-regression", "1"], "--max-regression needs --baseline"),
        (
            ["ptq", "model.safetensors", "--no-eval", "--baseline", RECORD],
            "needs a metric to compare: leave out --no",
        ),
        (["ptq", "model.safetensors", "--max-drop", "nan"], "--max-drop nan is impossible: give a number"),
        (["ptq", "model.safetensors", "--eval-images", "41", "--baseline", RECORD], "and this is 41 samples of digits"),
        (["palettize", "weights.safetensors", "--baseline", RECORD], "weights.safetensors has weights alone"),
    ],
)
def test_a_baseline_that_has_nothing_to_compare_with_is_refused(line: list[str], told: str, here: Path, r2: R2) -> None:
    save_file({"a.weight": torch.ones(8, 8)}, "weights.safetensors")
    ran = r2(*line, "-o", "new.safetensors", "--dry-run")
    assert ran.code == 2 and told in ran.err, ran.err
