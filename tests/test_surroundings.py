"""Where a command runs: a reader that goes away, a full disk, no home, an encoding of few characters, 20 columns."""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import R2
from r2cli import __main__ as entry

R2_COMMAND = [sys.executable, "-m", "r2cli"]
# A C locale as it was before Python took UTF-8 for it, and no home.
BARE = {name: value for name, value in os.environ.items() if name not in ("HOME", "LANG", "LC_ALL")}
BARE |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20"}


@pytest.fixture
def model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A float checkpoint `model.safetensors` in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(trained, tmp_path / "model.safetensors"))


def without_reader(*arguments: str) -> tuple[int, str]:
    """The exit code and the errors of a command whose standard output is a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*R2_COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    return done.returncode, done.stderr


def on_a_full_disk(*arguments: str) -> tuple[int, str]:
    """The same where standard output is a file on a disk that is full."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([*R2_COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", ["--help", "ptq --help", "--version", "recipe ls", "recipe ls --json"])
def test_a_reader_that_goes_away_is_no_error(line: str) -> None:
    assert without_reader(*line.split()) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("json_too", [[], ["--json"]], ids=["text", "json"])
def test_a_gate_fails_whether_anybody_reads_or_not(json_too: list[str], model: Path) -> None:
    """A reader that goes away (`| head -1`) neither makes a gate fail nor lets it pass."""
    assert without_reader("analyze", str(model), *json_too)[0] == 0
    code, told = without_reader("analyze", str(model), "--min-sqnr", "99@2", *json_too)
    assert code == 1 and "gate failed" in told


@pytest.mark.slow
@pytest.mark.parametrize("line", ["recipe ls", "recipe ls --json", "--help"])
def test_a_full_disk_behind_standard_output_is_one_sentence(line: str) -> None:
    code, told = on_a_full_disk(*line.split())
    assert code == 3 and "No space left on device" in told and told.count("\n") == 1
    assert "standard output" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["--help", "ptq --help", "recipe ls", "recipe show quickstart", "run quickstart --dry-run"]
)
def test_a_c_locale_20_columns_and_no_home_are_enough(line: str) -> None:
    done = subprocess.run([*R2_COMMAND, *line.split()], capture_output=True, env=BARE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and not done.stderr


@pytest.mark.slow
def test_characters_that_the_encoding_lacks_are_question_marks(
    r2: R2, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`analyze` draws histograms of characters that ASCII and Latin-1 do not have."""
    for encoding in ("ascii", "latin-1"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        ran = r2("analyze", model, "--quick")
        sys.stdout.flush()
        assert ran.code == 0, ran.err
        assert b"stages.0.0.conv1" in written.getvalue() and b"?" in written.getvalue()


def test_a_user_without_a_home_is_asked_for_a_folder(r2: R2, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    ran = r2("pretrain", "--data", "mnist", "--dry-run")
    assert ran.code == 2 and "no home folder" in ran.err and "--data-dir" in ran.err


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_said_before_the_work(r2: R2, model: Path) -> None:
    """/proc takes no files from anybody, root included."""
    lines: list[list[object]] = [
        ["pretrain", "--data", "digits:64", "-o", "/proc/a.safetensors"],
        ["ptq", model, "--data", "digits:64", "-o", "/proc/a.safetensors"],
        ["qat", model, "--data", "digits:64", "-o", "/proc/a.safetensors"],
        ["palettize", model, "--data", "digits:64", "-o", "/proc/a.safetensors"],
        ["export", model, "-o", "/proc/a.onnx"],
        ["analyze", model, "--quick", "-o", "/proc/a.html"],
        ["recipe", "cp", "quickstart", "/proc/a.toml"],
        ["run", "quickstart", "--work-dir", "/proc/a"],
    ]
    for line in lines:
        ran = r2(*line, "--json") if line[0] != "recipe" else r2(*line)
        assert ran.code == 3 and "/proc/a" in ran.err and "could not be written" in ran.err, ran.err
        assert "epoch" not in ran.err and "exporting" not in ran.err and "Traceback" not in ran.err
        assert line[0] == "recipe" or json.loads(ran.out)["exit_code"] == 3


@pytest.mark.slow
def test_a_disk_that_is_full_while_files_are_written_is_one_sentence(
    r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files stands for the disk. What was there stays, and nothing half written is left."""
    monkeypatch.chdir(tmp_path)
    save_file({"a.weight": torch.arange(4096.0).reshape(64, 64)}, "weights.safetensors")
    Path("page.html").write_text("kept")
    Path("q.toml").write_text("kept")
    lines = [
        ["palettize", "weights.safetensors", "-o", "made.safetensors"],
        ["analyze", "weights.safetensors", "-o", "page.html", "--overwrite"],
        ["recipe", "cp", "quickstart", "q.toml", "--overwrite"],
    ]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for line in lines:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, before[1]))
        try:
            ran = r2(*line)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert ran.code == 3 and "could not be written: File too large" in ran.err, ran.err
    assert Path("page.html").read_text() == Path("q.toml").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "q.toml", "weights.safetensors"]


def test_an_interrupt_while_r2_is_imported_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "r2cli.cli.main", Interrupting())
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "r2: interrupted; no file is left half written\n"
