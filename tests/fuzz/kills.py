"""Commands that are killed: at random moments, and before each step of the file layer; then run again.

After a kill every file of a final name is whole, or is not there. The same command again ends with 0, leaves the bytes
that an unbroken run leaves, and nothing else.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from campaign import ran, restore_from
from valid_files import CPU

# Small, so that a command takes a second: kills are many.
CODE = """from torch import nn
def factory(num_classes=10):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))
"""
RECIPE = """[[step]]
run = "pretrain"
model = "tiny.py:factory"
size = 8
data = "digits:64"
device = "cpu"
epochs = 1
output = "float.safetensors"

[[step]]
run = "ptq"
source = "float.safetensors"
model = "tiny.py:factory"
data = "digits:64"
device = "cpu"
output = "coded.safetensors"
"""
OUT = ("-o", "k.safetensors", "--resume")
ONE = ("--epochs", "1")
TINY = ("--model", "tiny.py:factory", *CPU)
MADE = (
    ("pretrain", "--size", "8", *TINY, *ONE, "-o", "tiny.safetensors"),
    ("ptq", "tiny.safetensors", *TINY, "-o", "tiny8.safetensors"),
    ("palettize", "tiny.safetensors", *TINY, "--method", "kmeans", "-o", "warm.safetensors"),
    ("analyze", "weights.safetensors", "-o", "warm.html", "-o", "warm.svg"),
)
# Of each command: its line, and the outputs whose bytes are the same in every run.
COMMANDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pretrain": (("pretrain", "--size", "8", *TINY, "--epochs", "3", *OUT), ("k.safetensors",)),
    "ptq": (("ptq", "tiny.safetensors", *TINY, *OUT), ("k.safetensors", "k.onnx")),
    "qat": (("qat", "tiny.safetensors", *TINY, *ONE, *OUT), ("k.safetensors", "k.onnx")),
    "palettize": (
        ("palettize", "tiny.safetensors", *TINY, *ONE, "--hard-epochs", "0", *OUT),
        ("k.safetensors", "k.onnx"),
    ),
    "kmeans": (("palettize", "tiny.safetensors", *TINY, "--method", "kmeans", *OUT), ("k.safetensors", "k.onnx")),
    "file": (("palettize", "weights.safetensors", *OUT), ("k.safetensors",)),
    "export": (("export", "tiny8.safetensors", *TINY[:4], "-o", "k.onnx", "--overwrite"), ("k.onnx",)),
    "analyze": (("analyze", "weights.safetensors", "-o", "k.html", "-o", "k.svg", "--overwrite"), ("k.html", "k.svg")),
    "recipe": (("recipe", "cp", "quickstart", "k.toml", "--overwrite"), ("k.toml",)),
    "run": (
        ("run", "kills.toml", "--work-dir", "k"),
        ("k/float.safetensors", "k/coded.safetensors", "k/coded.onnx", "k/tables.md"),
    ),
}
# The order of kills: what is fast comes more often.
ROUND = (*COMMANDS, *("pretrain", "file", "recipe") * 2)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = {signal.SIGKILL: {-9}, signal.SIGTERM: {-15, 130}, signal.SIGINT: {130}}


@dataclass(frozen=True)
class Whole:
    """An unbroken run: the bytes of its outputs, its seconds, and its steps in the file layer."""

    content: Mapping[str, bytes]
    seconds: float
    steps: int


def killed(here: Path, count: int, seed: int, tell: Callable[[str], None]) -> dict[str, object]:
    """Kill `count` commands, by turns at a random moment and before a step, and run each again."""
    (here / "kills.toml").write_text(RECIPE)
    (here / "tiny.py").write_text(CODE)
    before = Path.cwd()
    os.chdir(here)
    for first in MADE:  # in this process, so that forks have imported what commands import
        code, _, told = ran(first)
        assert code == 0, told
    os.chdir(before)
    shutil.copytree(here, here.with_name("valid"), dirs_exist_ok=True)
    wholes: dict[str, Whole] = {}
    counts: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    late = 0
    for number in range(count):
        draw = random.Random(f"kill {seed} {number}")
        name = ROUND[number % len(ROUND)]
        line, outputs = COMMANDS[name]
        if name not in wholes:
            wholes[name] = _whole(here, line, outputs)
        whole, sent = wholes[name], SIGNALS[number // len(ROUND) % 3]
        at = draw.randrange(whole.steps) if draw.random() < 0.4 else draw.uniform(0, 1.05 * whole.seconds)
        code = _run(here, line, sent, at)
        counts[f"{name} {sent.name}"] += 1
        late += code == 0
        told = here.with_name("log").read_text(errors="replace")
        found = [f"exit {code}"] if code not in ENDS[sent] | {0} else []
        found += _left(here, whole, clean=sent == signal.SIGINT)
        again = _run(here, line)
        found += [f"again: exit {again}"] if again else []
        found += [f"again: {name} differs" for name, own in whole.content.items() if _content(here / name) != own]
        found += [f"again: left {rest}"] if (rest := _rest(here)) else []
        for fault in found:
            faults[fault] += 1
        if found:
            tell(f"kill {number}: {name} {sent.name} at {at}: {found} {told[-600:]}")
        restore_from(here)
    return {"kills": count, "came after the end": late, "by command and signal": counts, "faults of kills": faults}


def _whole(here: Path, line: tuple[str, ...], outputs: tuple[str, ...]) -> Whole:
    started = time.perf_counter()
    steps = here.with_name("steps")
    steps.write_text("")
    assert _run(here, line, count_in=steps) == 0, line
    made = Whole(
        {name: (here / name).read_bytes() for name in outputs}, time.perf_counter() - started, len(steps.read_text())
    )
    restore_from(here)
    return made


def _run(
    here: Path,
    line: tuple[str, ...],
    sent: signal.Signals | None = None,
    at: float = 0.0,
    *,
    count_in: Path | None = None,
) -> int:
    """Run a line in a fork, and send it a signal: after `at` seconds, or before step `at` where that is an integer."""
    child = os.fork()
    if not child:
        try:
            _command(here, line, sent, at, count_in)
        finally:
            os._exit(97)
    if sent is not None and isinstance(at, float):
        end = time.perf_counter() + at
        while time.perf_counter() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, sent)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _command(here: Path, line: tuple[str, ...], sent: signal.Signals | None, at: float, count_in: Path | None) -> None:
    from r2cli.storage import atomic

    seen = 0

    def watcher(step: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if count_in is not None:
            with count_in.open("a") as file:
                file.write(".")
        if sent is not None and isinstance(at, int) and seen == at + 1:
            os.kill(os.getpid(), sent)

    atomic.watchers.append(watcher)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(here)
    log = os.open(here.with_name("log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    try:
        code, out, err = ran(line)
    except KeyboardInterrupt:  # before or after `main`, where a process of its own is not yet r2, or r2 no more
        os._exit(130)
    os.write(log, err.encode(errors="replace"))
    os._exit(96 if "Traceback" in err + out or "internal error" in err + out else code)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _left(here: Path, whole: Whole, *, clean: bool) -> list[str]:
    """What is wrong with what a killed run left: half a file, another file changed or, after Ctrl-C, drafts."""
    found = [f"half {name}" for name, own in whole.content.items() if _content(here / name) not in (None, own)]
    for path in here.with_name("valid").rglob("*"):
        if path.is_file() and _content(here / path.relative_to(here.with_name("valid"))) != path.read_bytes():
            found.append(f"changed {path.name}")
    return found + ([f"left {rest}"] if clean and (rest := _rest(here)) else [])


def _rest(here: Path) -> list[str]:
    """Drafts and locks."""
    return sorted(path.name for path in here.rglob(".*") if path.name.endswith((".partial", ".lock")))
