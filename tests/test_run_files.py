"""Files of a run: kills at every step, two runs at once, and every state that a second run can find."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r2cli.errors import InputError, R2Error
from r2cli.storage import atomic
from r2cli.storage.manifest import Asked, Manifest
from r2cli.storage.run_files import RunFiles

CODED, ONNX, STATE = "m.safetensors", "m.onnx", "m.resume.safetensors"
WHOLE = ["m.manifest.json", "m.onnx", "m.safetensors"]
ASKED = Asked("qat", {"lr": 0.1, "reg": {"name": "linf", "strength": 0.01}, "keep": ()}, {"f.safetensors": "a1"})


def files_of(folder: Path, *, resume: bool = False, overwrite: bool = False) -> RunFiles:
    files = [folder / CODED, folder / ONNX]
    return RunFiles("qat", files, state=folder / STATE, resume=resume, overwrite=overwrite)


def run(folder: Path, asked: Asked = ASKED, *, resume: bool = False, overwrite: bool = False) -> str:
    """A run of a command that writes two files: 'made', or 'finished' where there was nothing to do."""
    files = files_of(folder, resume=resume, overwrite=overwrite)
    files.require_free()
    with files.claimed():
        if files.finished(asked) is not None:
            return "finished"
        atomic.write_atomically(folder / STATE, b"epoch 1")
        files.write(folder / CODED, f"codes {asked.options['lr']}".encode())
        files.write(folder / ONNX, f"graph {asked.options['lr']}".encode())
        files.commit(asked, {"top1": 97.5})
    return "made"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    assert run(tmp_path) == "made" and names(tmp_path) == WHOLE
    return tmp_path


# --- kills ---------------------------------------------------------------------------------------------------------

# A process of one thread, which may fork: it kills a run before its first step, before its second, and so on.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
from r2cli.errors import InputError
from r2cli.storage import atomic
from test_run_files import run

def attempt(folder, options, kill_at):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = []
    def watcher(step, path):
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(step)
    atomic.watchers.append(watcher)
    try:
        run(folder, **options)
    except InputError as error:
        os._exit(2)
    os._exit(0)

def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}

base, options, before = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
found = []
while not found or found[-1]["killed"] == -signal.SIGKILL:
    folder = base / str(len(found))
    folder.mkdir()
    for name, text in before.items():
        (folder / name).write_text(text)
    killed, left = attempt(folder, options, len(found)), content(folder)
    found.append({"killed": killed, "left": left, "again": attempt(folder, options, -1), "whole": content(folder)})
print(json.dumps(found))
"""


def killed_everywhere(folder: Path, before: dict[str, str], **options: bool) -> list[dict[str, Any]]:
    """For each step of a run: what is left when it is killed there, and what the same command makes of that."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), json.dumps(options), json.dumps(before)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(found) > 25 and all(each["killed"] == -signal.SIGKILL for each in found[:-1])
    return found


def is_finished(left: dict[str, str]) -> bool:
    return "m.manifest.json" in left and json.loads(left["m.manifest.json"])["finished"]


@pytest.mark.slow
def test_the_same_command_goes_on_wherever_it_was_killed(tmp_path: Path) -> None:
    for each in killed_everywhere(tmp_path, {}, resume=True):
        assert each["again"] == 0 and sorted(each["whole"]) == WHOLE
        assert is_finished(each["whole"]) and each["whole"][CODED] == "codes 0.1" and each["whole"][ONNX] == "graph 0.1"
        # The order that is documented: the checkpoint never stands there without its ONNX file.
        assert CODED not in each["left"] or ONNX in each["left"]


@pytest.mark.slow
def test_without_resume_a_killed_run_is_in_the_way_only_by_its_state_or_when_it_was_finished(tmp_path: Path) -> None:
    for each in killed_everywhere(tmp_path, {}):
        stopped, finished = STATE in each["left"], is_finished(each["left"])
        assert each["again"] == (2 if stopped or finished else 0)
        if not stopped and not finished:
            assert sorted(each["whole"]) == WHOLE


@pytest.mark.slow
def test_files_that_are_replaced_are_there_until_the_new_ones_are(tmp_path: Path) -> None:
    mine = {CODED: "mine", ONNX: "mine too"}
    for each in killed_everywhere(tmp_path, mine, overwrite=True):
        assert each["left"][CODED] in ("mine", "codes 0.1") and each["left"][ONNX] in ("mine too", "graph 0.1")
        assert each["again"] == 0 and sorted(each["whole"]) == WHOLE and each["whole"][CODED] == "codes 0.1"


def test_what_others_put_beside_half_placed_files_is_not_replaced(tmp_path: Path) -> None:
    def stop(step: str, path: Path) -> None:
        if (step, path.name) == ("place", CODED):
            raise KeyboardInterrupt

    atomic.watchers.append(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    finally:
        atomic.watchers.remove(stop)
    (tmp_path / STATE).unlink()
    assert names(tmp_path) == ["m.manifest.json", "m.onnx"]
    (tmp_path / ONNX).write_bytes(b"mine")
    with pytest.raises(InputError, match="m.onnx is there already: give --overwrite"):
        run(tmp_path)
    assert (tmp_path / ONNX).read_bytes() == b"mine"
    (tmp_path / ONNX).write_bytes(b"graph 0.1")
    assert run(tmp_path, Asked("qat", {"lr": 0.2}, {})) == "made"


# --- states --------------------------------------------------------------------------------------------------------


def test_nothing_there_is_a_start_and_a_finished_run_is_finished(tmp_path: Path) -> None:
    assert run(tmp_path, resume=True) == "made"
    before = (tmp_path / CODED).stat().st_mtime_ns
    assert run(tmp_path, resume=True) == "finished"
    assert (tmp_path / CODED).stat().st_mtime_ns == before and names(tmp_path) == WHOLE
    with pytest.raises(InputError, match="m.safetensors is there already: give --overwrite"):
        run(tmp_path)
    assert run(tmp_path, resume=True, overwrite=True) == run(tmp_path, overwrite=True) == "made"


def test_a_folder_that_was_moved_is_finished_too(made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    moved = tmp_path_factory.mktemp("moved") / "here"
    made.rename(moved)
    assert run(moved, resume=True) == "finished"


def test_a_state_is_in_the_way_of_a_new_run_and_goes_when_the_run_is_finished(made: Path) -> None:
    (made / STATE).write_bytes(b"epoch 1")
    assert run(made, resume=True) == "finished" and names(made) == WHOLE
    (made / STATE).write_bytes(b"epoch 1")
    for name in WHOLE:
        (made / name).unlink()
    with pytest.raises(InputError, match="m.resume.safetensors holds a stopped run: go on with --resume"):
        run(made)
    assert run(made, resume=True) == "made" and names(made) == WHOLE


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (replace(ASKED, command="ptq"), "made by `r2 qat`"),
        (replace(ASKED, options={**ASKED.options, "lr": 0.2}), "made with --lr 0.1, not 0.2"),
        (replace(ASKED, options={**ASKED.options, "reg": None}), "made with --reg linf, not None"),
        (
            replace(ASKED, options={**ASKED.options, "reg": {"name": "linf", "strength": 1.0}}),
            "made with --reg-weight 0.01, not 1.0",
        ),
        (replace(ASKED, options={**ASKED.options, "batch_size": 8}), "made with --batch-size None, not 8"),
        (replace(ASKED, read={"f.safetensors": "b2"}), "made before f.safetensors was changed"),
    ],
    ids=["command", "lr", "reg", "reg-weight", "batch-size", "source"],
)
def test_other_options_are_refused_and_named(other: Asked, told: str, made: Path) -> None:
    with pytest.raises(InputError) as caught:
        run(made, other, resume=True)
    assert str(caught.value).endswith(
        f"m.safetensors is there already, {told}: give --overwrite to replace it, or another --output"
    )
    assert run(made, other, overwrite=True) == "made"


@pytest.mark.parametrize("name", [CODED, ONNX])
def test_a_file_that_is_missing_damaged_or_exchanged_is_named_with_a_way_out(name: str, made: Path) -> None:
    way_out = {CODED: "put the right one back", ONNX: f"`r2 export {made / CODED} -o {made / ONNX} --overwrite`"}
    right = (made / name).read_bytes()
    for wrong, what in ((None, "is missing"), (b"", "is damaged or was exchanged"), (b"other", "was exchanged")):
        (made / name).unlink()
        if wrong is not None:
            (made / name).write_bytes(wrong)
        with pytest.raises(InputError) as caught:
            run(made, resume=True)
        assert str(made / name) in str(caught.value) and what in str(caught.value)
        assert way_out[name] in str(caught.value) and "--overwrite" in str(caught.value)
        (made / name).write_bytes(right)
    assert run(made, resume=True) == "finished"


def test_where_all_files_are_gone_the_run_starts_again(made: Path) -> None:
    (made / CODED).unlink()
    (made / ONNX).unlink()
    assert run(made, resume=True) == "made"


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": 2}', '{"format": 1, "asked": {}}'])
def test_files_without_a_readable_record_are_the_users(content: str | None, made: Path) -> None:
    record = made / "m.manifest.json"
    record.unlink()
    if content is not None:
        record.write_text(content)
    with pytest.raises(InputError, match="m.safetensors is there already: give --overwrite"):
        run(made, resume=True)


def test_a_file_that_comes_while_a_run_works_is_kept(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    with files.claimed():
        assert files.finished(ASKED) is None
        files.write(tmp_path / CODED, b"codes")
        files.write(tmp_path / ONNX, b"graph")
        (tmp_path / ONNX).write_bytes(b"mine")
        with pytest.raises(R2Error, match="m.onnx has come while this run worked, and is kept"):
            files.commit(ASKED, {})
    assert names(tmp_path) == ["m.onnx"] and (tmp_path / ONNX).read_bytes() == b"mine"


def test_the_record_says_how_the_files_were_made(made: Path) -> None:
    record = Manifest.read(made / "m.manifest.json")
    assert record is not None and record.finished and record.report == {"top1": 97.5}
    assert set(record.written) == {CODED, ONNX} and record.asked.read == {"f.safetensors": "a1"}


def test_the_same_work_elsewhere_gives_the_same_manifest(made: Path) -> None:
    (made / "other").mkdir()
    assert run(made / "other") == "made"
    assert (made / "other/m.manifest.json").read_bytes() == (made / "m.manifest.json").read_bytes()


def test_a_record_of_an_earlier_version_is_read_and_replaced(made: Path) -> None:
    (made / "m.manifest.json").rename(made / "m.run.json")
    assert run(made, resume=True) == "finished" and names(made) == ["m.onnx", "m.run.json", "m.safetensors"]
    assert run(made, overwrite=True) == "made" and names(made) == WHOLE


# --- two at once ---------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from test_run_files import files_of
files = files_of(Path(sys.argv[1]))
with files.claimed():
    files.write(files.files[0], b"half")
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed the files and written one of them under its temporary name."""
    tests = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
    )
    assert process.stdin is not None and process.stdout is not None
    with process, process.stdin, process.stdout:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_leaves_the_first_alone_which_may_die(tmp_path: Path) -> None:
    with another_run(tmp_path) as first:
        before = names(tmp_path)
        assert [name for name in before if name.endswith(".partial")] and f".{CODED}.lock" in before
        options: tuple[dict[str, Any], ...] = ({}, {"resume": True}, {"overwrite": True})
        for more in options:
            with pytest.raises(InputError, match=f"is being written by another run .process {first.pid} on "):
                run(tmp_path, **more)
        # Nor does a writer that asks for no lock take the temporary files of a living run for left over.
        atomic.write_atomically(tmp_path / CODED, b"of the Python API")
        assert names(tmp_path) == sorted([*before, CODED])
        (tmp_path / CODED).unlink()
        first.kill()
        first.wait()
        assert names(tmp_path) == before
        assert run(tmp_path) == "made" and names(tmp_path) == WHOLE


def test_left_over_files_of_other_outputs_stay(tmp_path: Path) -> None:
    for name in (
        ".m.safetensors.77.partial",
        ".m.safetensors.77-ab.partial",
        ".n.safetensors.77.partial",
        ".m.partial",
    ):
        (tmp_path / name).write_bytes(b"")
    assert run(tmp_path) == "made"
    assert names(tmp_path) == sorted([".m.partial", ".n.safetensors.77.partial", *WHOLE])


def test_the_next_run_removes_the_scratch_folders_of_killed_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "from r2cli.storage import atomic\nwith atomic.scratch_folder() as f: print(f, flush=True); input()"
    line = [sys.executable, "-c", code]
    given = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
    lives = f"r2-{os.getpid()}-0123456789ab"  # of an older version, which locks nothing
    others = [tmp_path / name for name in ("r2-notes", "r2-1-0123456789ab.txt", "r2-1-0123456789abc", lives)]
    for other in others:
        other.mkdir()
    (tmp_path / "r2-1-0123456789ab").symlink_to(others[0])
    others.append(tmp_path / "r2-1-0123456789ab")
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=given) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        (folder / "model.onnx").write_bytes(b"large")
        with atomic.scratch_folder() as own:
            assert names(tmp_path) == sorted(path.name for path in [*others, folder, own])
        process.kill()
    assert folder.exists()
    with atomic.scratch_folder() as own, atomic.scratch_folder() as second:
        assert names(tmp_path) == sorted(path.name for path in [*others, own, second])
    assert names(tmp_path) == sorted(path.name for path in others)


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / ".a.onnx.7.partial").write_bytes(b"")
    atomic.write_atomically(tmp_path / "[a].onnx", b"mine")
    assert names(tmp_path) == [".a.onnx.7.partial", "[a].onnx"]
    (tmp_path / ".[a].onnx.7.partial").write_bytes(b"")
    atomic.write_atomically(tmp_path / "[a].onnx", b"mine")
    assert names(tmp_path) == [".a.onnx.7.partial", "[a].onnx"]


def test_a_folder_that_cannot_be_written_is_named_before_any_work() -> None:
    files = RunFiles("qat", [Path("/proc/m.safetensors")])
    with pytest.raises(R2Error, match="/proc/m.safetensors could not be written") as caught, files.claimed():
        raise AssertionError("claimed")
    assert caught.value.exit_code == 3
