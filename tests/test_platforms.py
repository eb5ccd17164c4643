"""What macOS and Windows lack, or do otherwise: by rules over the sources, and by a system that refuses as they do."""

import ast
import multiprocessing.spawn
import os
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TypeGuard

import pytest
import torch
from safetensors.torch import save_file

from r2cli.deploy import runtime
from r2cli.storage import atomic, checkpoint, own_code, stream

PACKAGE = Path(__file__).parent.parent / "r2cli"
FILES = sorted(PACKAGE.rglob("*.py"))
# What Windows lacks, with the files that ask whether it is there.
UNIX = {
    "fcntl": ["storage/atomic.py"],
    "resource": ["deploy/runtime.py"],
    "os.preadv": ["storage/stream.py"],
    "os.sched_getaffinity": ["config/machine.py"],
    "os.sysconf": ["deploy/runtime.py"],
    "os.getuid": ["storage/atomic.py"],  # these four only where there are locks
    "os.O_DIRECTORY": ["storage/atomic.py"],
    "os.O_NOFOLLOW": ["storage/atomic.py"],
    "os.kill": ["storage/atomic.py"],  # there it ends the process that it asks for
    "select.poll": ["console.py"],
    **dict.fromkeys(("os.fork", "os.killpg", "os.pread", "os.uname", "os.mkfifo", "os.setsid", "pwd", "grp"), []),
    **dict.fromkeys(("termios", "pty", "signal.SIGKILL", "signal.SIGHUP", "signal.alarm", "signal.setitimer"), []),
}


def _named(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_what_windows_lacks_is_only_where_it_is_asked_for() -> None:
    used: dict[str, list[str]] = {name: [] for name in UNIX}
    for path in FILES:
        for name in _named(ast.parse(path.read_text(encoding="utf-8"))) & UNIX.keys():
            used[name].append(path.relative_to(PACKAGE).as_posix())
    assert used == UNIX


def test_text_files_say_their_encoding() -> None:
    """Else Windows reads them as cp1252."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                modes = [str(one.value) for one in (*node.args, *(kw.value for kw in node.keywords)) if _is_mode(one)]
                binary = any("b" in mode for mode in modes)
                of_library = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in LIBRARIES
                if name in ("read_text", "write_text", "open") and not binary and not of_library:
                    assert "encoding" in {kw.arg for kw in node.keywords}, f"{path}: line {node.lineno}"


LIBRARIES = ("Image", "os", "webbrowser", "file", "archive")  # whose `open` is of other things


def _is_mode(node: ast.expr) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and bool(re.fullmatch("[rwax+b]{1,3}", str(node.value)))


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are open can be neither renamed nor removed, and what is Unix's alone is not there."""
    monkeypatch.setattr(atomic, "HAS_LOCKS", False)
    for name in ("preadv", "sysconf", "sched_getaffinity", "O_DIRECTORY", "O_NOFOLLOW"):
        monkeypatch.delattr(os, name)
    replace, unlink = os.replace, Path.unlink

    def closed(path: Path) -> None:
        for descriptor in Path("/proc/self/fd").iterdir():
            if descriptor.exists() and Path(path).exists() and descriptor.samefile(path):
                raise PermissionError(13, "used by another process")

    def replaced(one: Path, other: Path) -> None:
        closed(one)
        replace(one, other)

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        closed(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "unlink", unlinked)


on_linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc says which files are open")


@on_linux
def test_files_are_written_whole_where_no_open_file_can_be_renamed(windows: None, tmp_path: Path) -> None:
    path = tmp_path / "made"
    with atomic.locked(path), atomic.scratch_folder() as folder:
        atomic.write_atomically(path, b"old")
        atomic.write_atomically(path, b"new")
        (folder / "a").write_bytes(b"a")
    with pytest.raises(ZeroDivisionError), atomic.replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path] and not folder.exists()


@on_linux
def test_weights_are_read_and_memory_is_counted_without_what_is_unix(windows: None, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(1000.0), "b": torch.arange(7).to(torch.uint8)}
    save_file(tensors, tmp_path / "x.safetensors")
    for stored in stream.tensors_of_file(tmp_path / "x.safetensors"):
        assert torch.equal(torch.cat([part.clone() for part in stored.pieces(300)]), tensors[stored.name])
    assert runtime.memory() > 0


@on_linux
def test_a_checkpoint_is_not_mapped_where_that_keeps_it_from_being_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.arange(100_000.0)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(sys, "platform", "win32")
    held, _ = checkpoint.load_tensors(tmp_path / "x.safetensors")
    assert held["a"][-1] == 99_999 and "x.safetensors" not in Path("/proc/self/maps").read_text()


def test_a_worker_that_is_no_fork_finds_the_users_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "sets_of_mine.py").write_text("class Mine:\n    pass\n")
    made = own_code.factory(f"{tmp_path}/sets_of_mine.py:Mine")()
    given = multiprocessing.spawn.get_preparation_data("worker")["sys_path"]  # with which such a worker starts
    found = PathFinder.find_spec(type(made).__module__, given)
    assert found is not None and found.origin == str(tmp_path / "sets_of_mine.py")
