"""`--report`, options from the environment and from pyproject.toml, and how much a command says."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from conftest import R2
from r2cli import console
from r2cli.cli import reports
from r2cli.cli.outcome import Outcome
from r2cli.config import values

BAD = "a|b\x1b[31m`c`"
CHECKS = [{"name": "integer weights", "passed": True, "detail": "all"}, {"name": BAD, "passed": False, "detail": BAD}]
GATES = [{"name": "--min-metric 80", "passed": False, "detail": "top-1 20.60 % is below --min-metric 80"}]
FAILED = Outcome("ptq m.safetensors", 1, "gate failed: x", {"command": "ptq", "checks": CHECKS, "gates": GATES}, 2.5)
STEPS = [{"command": "ptq", "failed": None}, {"command": "qat", "failed": "its proof"}]


def test_junit_has_a_case_for_each_check_gate_and_step(tmp_path: Path) -> None:
    ended = Outcome(FAILED.line, 1, FAILED.message, {**FAILED.report, "results": STEPS}, 2.5)
    reports.junit(ended, tmp_path / "r2.xml")
    suite = ElementTree.parse(tmp_path / "r2.xml").getroot()[0]
    found = {case.get("name"): [child.tag for child in case] for case in suite}
    assert found == {
        "r2 ptq m.safetensors": [],
        "integer weights": [],
        console.escaped(BAD): ["failure"],
        "--min-metric 80": ["failure"],
        "step 1: r2 ptq": [],
        "step 2: r2 qat": ["failure"],
    }
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("6", "3", "0")


@pytest.mark.parametrize("code", [1, 2, 3])
def test_an_error_without_a_check_is_the_command_s_own(code: int, tmp_path: Path) -> None:
    reports.junit(Outcome("ptq", code, "m is missing"), tmp_path / "r2.xml")
    suite = ElementTree.parse(tmp_path / "r2.xml").getroot()[0]
    (error,) = suite.iter("error")
    assert error.get("message") == "m is missing" and suite.get("errors") == "1"


def test_the_page_keeps_cells_in_their_cells() -> None:
    page = reports.as_markdown(FAILED)
    assert page.startswith("### r2 ptq: failed") and "\x1b" not in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert "| integer weights | ✅ |" in rows and "❌ top-1 20.60 % is below --min-metric 80" in page


def test_github_gets_annotations_and_the_summary_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    reports.github(FAILED, None)
    told = capsys.readouterr().err.splitlines()
    assert told[1] == "::error title=r2%3A --min-metric 80::top-1 20.60 %25 is below --min-metric 80" and len(told) == 2
    assert summary.read_text().startswith("before\n### r2 ptq: failed")
    reports.github(Outcome("ptq", 2, "m is missing"), None)
    assert "::error title=r2::m is missing" in capsys.readouterr().err


def test_a_gate_that_fails_is_a_case_of_the_report(r2: R2, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "r2.xml"
    ran = r2("evaluate", trained, "--eval-images", "20", "--min-accuracy", "101", "--report", f"junit:{file}")
    assert ran.code == 1
    cases = {case.get("name"): len(case) for case in ElementTree.parse(file).getroot().iter("testcase")}
    assert cases.pop("--min-accuracy 101") == 1 and list(cases.values()) == [0]


def test_options_that_exclude_each_other_are_reported_too(r2: R2, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "r2.xml"
    line = ["ptq", trained, "--group-size", "32", "--granularity", "tensor", "--report", f"junit:{file}"]
    assert r2(*line).code == 2
    (error,) = ElementTree.parse(file).getroot().iter("error")
    assert "--group-size 32" in str(error.get("message"))


@pytest.mark.parametrize(
    ("asked", "told"),
    [("junti:a.xml", "did you mean 'junit'"), ("junit", "junit:FILE"), ("markdown:.", "names a folder")]
    + [("markdown:model.safetensors", "must end in .md"), ("junit:r2.md", "must end in .xml")],
)
def test_a_report_that_cannot_be_is_refused_before_the_work(asked: str, told: str, r2: R2) -> None:
    ran = r2("targets", "--report", asked)
    assert ran.code == 2 and told in ran.err and "docs/ci.md" in ran.err and not ran.out


def test_a_report_that_cannot_be_written_is_one_sentence(r2: R2) -> None:
    ran = r2("targets", "--report", "junit:/proc/a/r2.xml")
    assert ran.code == 3 and "/proc/a/r2.xml could not be written" in ran.err and "Traceback" not in ran.err


def test_a_step_of_a_recipe_writes_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [f"markdown:{tmp_path / 'r2.md'}"]
    with reports.written(asked) as outer:
        with reports.written(asked) as inner:
            inner["command"] = "ptq"
        assert not (tmp_path / "r2.md").exists()
        outer["command"] = "run"
    assert (tmp_path / "r2.md").read_text().startswith("### r2 run: passed")
    monkeypatch.setenv(values.STEP, "1")
    with reports.written([f"markdown:{tmp_path / 'other.md'}"]):
        pass
    assert not (tmp_path / "other.md").exists()


def test_options_come_from_the_line_then_the_environment_then_the_folder(
    r2: R2, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").write_text('[tool.r2]\nseed = 7\nkeep = "*=8"\n[tool.r2.ptq]\nweight-bits = 2\n')

    def seen(*more: str) -> tuple[int, int]:
        options = json.loads(r2("ptq", trained, "--dry-run", "--json", *more).out)["options"]
        return options["seed"], options["weight_bits"]

    assert seen() == (7, 2)
    monkeypatch.setenv("R2_WEIGHT_BITS", "3")
    assert seen() == (7, 3)
    assert seen("--weight-bits", "4", "--seed", "1") == (1, 4)


@pytest.mark.parametrize("value", ["77", "x"])  # the option's own check tells the first, the parser the second
def test_a_wrong_value_is_told_with_where_it_comes_from(
    r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    on_line = r2("ptq", "--weight-bits", value)
    Path("pyproject.toml").write_text(f'[tool.r2.ptq]\nweight-bits = "{value}"\n')
    in_folder = r2("ptq")
    monkeypatch.setenv("R2_WEIGHT_BITS", value)
    in_environment = r2("ptq")
    assert {on_line.code, in_folder.code, in_environment.code} == {2}
    assert "It comes from" not in on_line.err
    assert "It comes from pyproject.toml" in in_folder.err
    assert "It comes from the variable R2_WEIGHT_BITS" in in_environment.err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[tool.r2]\nsed = 1", "did you mean 'seed'"),
        ("[tool.r2]\njson = true", "unknown option in [tool.r2]"),
        ("[tool.r2.ptx]\nseed = 1", "did you mean 'ptq'"),
        ("[tool.r2.ptq]\nweight-bit = 1", "did you mean 'weight-bits'"),
        ("[tool", "cannot be read"),
        ("[tool]\nr2 = 1", "must be a table"),
        ("tool = 1", "must be a table"),
    ],
)
def test_a_wrong_pyproject_is_one_sentence(
    content: str, told: str, r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").write_text(content)
    ran = r2("targets")
    assert ran.code == 2 and told in ran.err and "pyproject.toml" in ran.err, ran.err


def test_quiet_leaves_progress_out_and_verbose_tells_the_time(r2: R2, trained: Path, tmp_path: Path) -> None:
    line = ["evaluate", str(trained), "--eval-images", "20"]
    assert r2(*line, "-q").err == "" and "top-1" in r2(*line, "-q").out
    training = ["pretrain", "--data", "fake:1x8x8:2", "--model", "resnet8", "--epochs", "1", "-q", "-o"]
    assert r2(*training, str(tmp_path / "new.safetensors")).err == ""
    assert re.search(r"^ +\d\.\d s  evaluating", r2(*line, "-v").err, re.MULTILINE)
    assert "\x1b[" in r2("targets", "--color", "always").out
    assert "\x1b[" not in r2("targets").out
