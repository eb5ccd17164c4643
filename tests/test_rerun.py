"""The same command again, as a user runs it: every command that writes a checkpoint, in every state it can find."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import R2
from r2cli.storage import atomic

FLOAT = ["--model", "resnet8", "--size", 8, "--data", "digits:64", "--device", "cpu"]
CODED = ["model.safetensors", "--data", "digits:64", "--device", "cpu"]
# Of each command: its line, its outputs, an option that decides the result, and one that does not.
COMMANDS: dict[str, tuple[list[object], int, list[object], list[object]]] = {
    "pretrain": (["pretrain", *FLOAT, "--epochs", 1, "-o", "made.safetensors"], 1, ["--lr", 0.3], ["--workers", 1]),
    "ptq": (["ptq", *CODED, "-o", "made.safetensors"], 2, ["--weight-bits", 5], ["--weight-bits", 8]),
    "qat": (["qat", *CODED, "--epochs", 1, "-o", "made.safetensors"], 2, ["--distill", 1], ["--max-bytes", 10**9]),
    "palettize": (
        ["palettize", *CODED, "--epochs", 1, "--hard-epochs", 0, "-o", "made.safetensors"],
        2,
        ["--lr", 0.1],
        ["--lr", 0.02],
    ),
    "kmeans": (
        ["palettize", *CODED, "--method", "kmeans", "-o", "made.safetensors"],
        2,
        ["--bits", 5],
        ["--device", "auto"],
    ),
    "file": (["palettize", "weights.safetensors", "-o", "made.safetensors"], 1, ["--bits", 3], ["--json"]),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS if name not in ("file", "pretrain")]
ALL = ["file", "pretrain", *SLOW]
Line = Callable[..., list[object]]


@pytest.fixture(scope="session")
def finished(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From a command to a folder where it is finished, once a session."""
    from r2cli.cli.main import invoke

    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folders[name])
                shutil.copy(trained, "model.safetensors")
                weight = torch.arange(256.0).reshape(16, 16)
                save_file({"a.weight": weight, "a.bias": torch.ones(16)}, "weights.safetensors")
                invoke([*map(str, COMMANDS[name][0]), "--resume", "--json"])
        return folders[name]

    return folder


@pytest.fixture
def here(
    request: pytest.FixtureRequest, finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The name of a command that is finished in the working directory."""
    name: str = request.param
    shutil.copytree(finished(name), tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return name


def outputs(name: str) -> list[Path]:
    return [Path("made.safetensors"), Path("made.onnx")][: COMMANDS[name][1]]


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("here", ALL, indirect=True)
def test_a_finished_run_is_said_to_be_finished_and_nothing_is_done(r2: R2, here: str) -> None:
    line, _, _, same = COMMANDS[here]
    before = contents()
    ran = r2(*line, *same, "--resume")
    assert ran.code == 0, ran.err
    shown = json.loads(ran.out) if same == ["--json"] else json.loads(r2(*line, "--resume", "--json").out)
    assert (
        shown["finished_before"] and shown["command"] == line[0] and shown["bytes"] == outputs(here)[-1].stat().st_size
    )
    if same != ["--json"]:
        assert "made.safetensors was finished before" in ran.out and "next: r2" in ran.out
    assert contents() == before
    own = {"made.manifest.json", *map(str, outputs(here))}
    assert set(before) - {"model.safetensors", "weights.safetensors"} == own


@pytest.mark.parametrize("here", ALL, indirect=True)
def test_other_options_other_files_and_no_resume_are_refused(r2: R2, here: str) -> None:
    line, _, other, _ = COMMANDS[here]
    before = contents()
    ran = r2(*line, *other, "--resume")
    assert ran.code == 2 and "made.safetensors is there already, made with" in ran.err and "--overwrite" in ran.err
    assert str(other[0]) in ran.err and f", not {other[1]}" in ran.err
    assert r2(*line).code == 2 and contents() == before
    if here != "pretrain":
        source = Path(str(line[1]))
        header = source.read_bytes()
        source.write_bytes(header[:-1] + bytes([header[-1] ^ 1]))
        ran = r2(*line, "--resume")
        assert ran.code == 2 and f"made before {source} was changed" in ran.err


@pytest.mark.slow
@pytest.mark.parametrize("here", ALL, indirect=True)
def test_a_file_that_is_missing_or_exchanged_is_named(r2: R2, here: str) -> None:
    line = COMMANDS[here][0]
    for path in outputs(here):
        right = path.read_bytes()
        path.write_bytes(right[:-1])
        ran = r2(*line, "--resume")
        assert ran.code == 2 and f"{path} is not the file that the finished run wrote" in ran.err
        path.unlink()
        ran = r2(*line, "--resume")
        if len(outputs(here)) == 2:
            assert ran.code == 2 and f"{path} is missing" in ran.err
        else:
            assert ran.code == 0 and path.read_bytes() == right  # with nothing there, the run starts
        path.write_bytes(right)


@pytest.mark.slow
@pytest.mark.parametrize("here", ["ptq"], indirect=True)
def test_what_a_missing_onnx_file_s_message_says_helps(r2: R2, here: str) -> None:
    Path("made.onnx").unlink()
    assert "`r2 export made.safetensors -o made.onnx --overwrite`" in r2(*COMMANDS[here][0], "--resume").err
    assert r2("export", "made.safetensors", "-o", "made.onnx", "--overwrite").code == 0
    assert r2(*COMMANDS[here][0], "--resume").code == 0


@pytest.mark.parametrize("here", ["pretrain"], indirect=True)
def test_a_gate_is_asked_of_a_finished_run_too(r2: R2, here: str) -> None:
    line = COMMANDS[here][0]
    assert r2(*line, "--resume", "--min-accuracy", 0).code == 0
    assert r2(*line, "--resume", "--min-accuracy", 101).code == 1


# --- killed while the files are placed ------------------------------------------------------------------------------

KILL = """
import os, signal, sys
from pathlib import Path
from r2cli.storage import atomic

_, *where = sys.argv[:3]

def watcher(step, path):
    if [step, path.name] == where:
        os.kill(os.getpid(), signal.SIGKILL)

atomic.watchers.append(watcher)
sys.argv[:] = ["r2", *sys.argv[3:]]
from r2cli.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("here", "step", "name"),
    [("ptq", "place", "made.safetensors"), ("qat", "sync", "made.onnx"), ("palettize", "place", "made.safetensors")],
    indirect=["here"],
)
def test_a_killed_run_does_not_stand_in_the_way_of_the_same_command(r2: R2, here: str, step: str, name: str) -> None:
    whole = contents()
    for path in (*outputs(here), Path("made.manifest.json")):
        path.unlink()
    line = [*map(str, COMMANDS[here][0]), *(["--resume"] if here != "ptq" else [])]
    done = subprocess.run([sys.executable, "-c", KILL, step, name, *line], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(path.name.endswith(".partial") for path in Path().iterdir()) and not Path("made.safetensors").exists()
    ran = r2(*line)
    assert ran.code == 0, ran.err
    again = contents()
    assert again.keys() == whole.keys()
    assert all(again[str(path)] == whole[str(path)] for path in outputs(here))


@pytest.mark.slow
@pytest.mark.parametrize("here", ["pretrain"], indirect=True)
def test_a_state_of_other_options_is_refused(r2: R2, here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(step: str, path: Path) -> None:
        if (step, path.name) == ("create", "other.safetensors"):
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "watchers", [stop])
    line = ["pretrain", *FLOAT, "--epochs", 1, "-o", "other.safetensors"]
    assert r2(*line, "--resume").code == 130
    monkeypatch.setattr(atomic, "watchers", [])
    assert Path("other.resume.safetensors").exists() and not Path("other.safetensors").exists()
    assert "holds a stopped run: go on with --resume" in r2(*line).err
    ran = r2(*line, "--lr", 0.3, "--resume")
    assert ran.code == 2 and "other.resume.safetensors was made with --lr 0.1, not 0.3" in ran.err
    ran = r2(*line, "--resume")
    assert ran.code == 0 and "epoch 1/1" not in ran.err  # the epoch was done, and is not done again
    assert Path("other.safetensors").read_bytes() == Path("made.safetensors").read_bytes()
    assert not Path("other.resume.safetensors").exists()
