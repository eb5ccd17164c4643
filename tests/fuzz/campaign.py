"""Damaged files and kills in numbers: what every input led to, and the counts.

    python tests/fuzz/campaign.py --inputs 20000 --kills 300 --seed 0 --counts counts.json

Each command runs as `r2` does, through its error boundary, in a process that is forked from one that has everything
imported. That process runs one input after the other; where it ends or hangs, the input is named and another is forked.
"""

import argparse
import io
import itertools
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mutations
from cases import CASES
from valid_files import READERS, Reader, make

PART = 250  # inputs in memory
SLOWEST = 20.0  # seconds of one command
MEMORY = 3 * 2**30  # bytes that a command may take beyond what is imported
# Beside new lines; a terminal obeys the others. Colours are left out where there is no terminal.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
OUT_OF_MEMORY = re.compile(
    "MemoryError|bad_alloc|allocate memory|Unable to allocate|bad allocation|out of memory", re.I
)
EVIL = "open('PWNED', 'w').close()\ndef factory(**_): pass\n"


@dataclass(frozen=True)
class Input:
    """A file in place of the valid one of `reader`, and the line that reads it."""

    name: str
    reader: Reader
    content: bytes
    line: tuple[str, ...]
    due: tuple[int, str] | None = None  # the exit code, and a part of what is told, where they are known


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `faults` are the goals that it missed."""

    code: int
    seconds: float
    told: str
    faults: tuple[str, ...]


def inputs(folder: Path, count: int, seed: int, only: Sequence[str] = ()) -> Iterator[Input]:
    """`count` mutated files, by `seed`; input i of a seed is the same whatever the count is."""
    chosen = {name: reader for name, reader in READERS.items() if not only or name in only}
    contents = {name: (folder / reader.file).read_bytes() for name, reader in chosen.items()}
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        name = draw.choices(list(chosen), [reader.share for reader in chosen.values()])[0]
        reader = chosen[name]
        content = mutations.mutated(contents[name], reader.file, draw)
        yield Input(f"{name}-{seed}-{number}", reader, content, draw.choice(reader.lines))


def cases(folder: Path) -> Iterator[Input]:
    """The inputs that once missed a goal, each with the exit code and a part of the message that is due."""
    for name, case in CASES.items():
        reader = READERS[case.reader]
        content = case.edit((folder / reader.file).read_bytes())
        yield Input(name, reader, content, reader.lines[case.line], (case.code, case.told))


# --- one command ----------------------------------------------------------------------------------------------------


def ran(line: Sequence[str]) -> tuple[int, str, str]:
    """Exit code and output of `r2` in this process, with streams of the encodings that a terminal has."""
    from r2cli.__main__ import main

    kept = sys.argv, sys.stdout, sys.stderr
    out, err = io.BytesIO(), io.BytesIO()
    sys.argv = ["r2", *line]
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(out, encoding="utf-8", write_through=True),
        io.TextIOWrapper(err, encoding="utf-8", errors="backslashreplace", write_through=True),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # as outside of tests: a line on standard error
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 99
    except BaseException as error:
        if not any(frame.name == "main" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        traceback.print_exc()
        code = 98
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.detach()  # or it would close what it writes to
        sys.argv, sys.stdout, sys.stderr = kept
    return code, out.getvalue().decode(errors="replace"), err.getvalue().decode(errors="replace")


def listed(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def judged(given: Input, folder: Path) -> Outcome:
    """Run the line of an input in `folder`, which holds the valid files, and put the valid file back."""
    place = folder / given.reader.file
    valid = place.read_bytes()
    place.write_bytes(given.content)
    before, started = listed(folder), time.perf_counter()
    code, out, err = ran([part.replace("FILE", given.reader.file) for part in given.line])
    seconds = time.perf_counter() - started
    after = listed(folder)
    place.write_bytes(valid)
    new = {name for name in after if before.get(name) != after[name]} | (before.keys() - after.keys())
    faults = [*_said(code, out, err), *(["slow"] if seconds > SLOWEST else [])]
    if given.due is not None and (code != given.due[0] or given.due[1] not in err + out):
        faults.append(f"not {given.due}: {code} {err[-300:]}")
    if "PWNED" in new:
        faults.append("code ran")
    foreign = sorted(name for name in new if not name.startswith(given.reader.writes or ("\0",)))
    if foreign:
        faults.append(f"wrote {foreign[:3]}")
    if any(CONTROL.search((folder / name).read_text()) for name in new & {"page.html"}):
        faults.append("control characters in the page")
    _restore(folder, new, given.reader)
    return Outcome(code, seconds, err.strip()[-600:], tuple(faults))


def _said(code: int, out: str, err: str) -> Iterator[str]:
    """The goals that an exit code and an output miss."""
    if code not in (0, 1, 2):
        yield f"exit {code}"
    if "Traceback" in err + out or "internal error" in err + out:
        yield "traceback or internal error"
    if OUT_OF_MEMORY.search(err + out):
        yield "out of memory"
    if CONTROL.search(err + out):
        yield "control characters"
    told = [line for line in err.splitlines() if line.startswith("r2: ")]
    if code in (1, 2) and (len(told) != 1 or not err.endswith(f"{told[0]}\n")):
        yield "not one sentence"
    if "Warning: " in err:
        yield "a warning of a library"


def _restore(folder: Path, new: set[str], reader: Reader) -> None:
    """Put the folder back into the state of its valid files, which stand beside it."""
    for name in new | {reader.file}:
        kept = folder.with_name("valid") / name
        if kept.exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(kept, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


# --- many -----------------------------------------------------------------------------------------------------------


def prepared(folder: Path) -> Path:
    """The folder `here` of valid files for inputs to run in, with a copy of it beside it."""
    here = folder / "here"
    here.mkdir()
    child = os.fork()  # so that this process stays one that has done nothing yet
    if not child:
        try:
            os.chdir(here)
            make(here)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the valid files cannot be made"
    (here / "evil.py").write_text(EVIL)
    shutil.copytree(here, folder / "valid")
    return here


def restore_from(here: Path) -> None:
    """Put the folder back into the state of the valid files beside it."""
    shutil.rmtree(here)
    shutil.copytree(here.with_name("valid"), here)


def outcomes(here: Path, given: Sequence[Input]) -> Iterator[tuple[Input, Outcome]]:
    """The outcome of every input, in order."""
    at = 0
    while at < len(given):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            _work(here, given[at:], write)
        os.close(write)
        buffer = b""
        while at < len(given):
            if not select.select([read], [], [], SLOWEST + 10)[0]:
                os.kill(child, signal.SIGKILL)
                yield given[at], Outcome(-9, SLOWEST + 10, "", ("hangs",))
                at += 1
                break
            part = os.read(read, 65536)
            buffer += part
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                code, seconds, told, faults = json.loads(line)
                yield given[at], Outcome(code, seconds, told, tuple(faults))
                at += 1
            if not part:
                if at < len(given):
                    yield given[at], Outcome(-1, 0.0, buffer.decode(), ("the process ended",))
                    at += 1
                break
        os.close(read)
        os.waitpid(child, 0)
        restore_from(here)


def _work(here: Path, given: Sequence[Input], write: int) -> None:
    try:
        os.chdir(here)
        home = here.with_name("home")
        home.mkdir(exist_ok=True)
        os.environ |= {"HOME": str(home), "COLUMNS": "120"}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)  # what libraries in C write
        for each in given:
            outcome = judged(each, here)
            os.write(write, json.dumps([outcome.code, outcome.seconds, outcome.told, outcome.faults]).encode() + b"\n")
    except BaseException:
        os.write(write, traceback.format_exc().encode().replace(b"\n", b" | "))
    finally:
        os._exit(0)


def warm() -> None:
    """Import what the commands import, so that a fork has it."""
    import onnxruntime  # noqa: F401
    import torch
    from transformers import MobileBertForSequenceClassification  # noqa: F401

    from r2cli.cli import deliver, main  # noqa: F401
    from r2cli.deploy import runtime  # noqa: F401

    torch.set_num_threads(1)


def tried(here: Path, given: Iterator[Input], tell: Callable[[str], None], until: float) -> dict[str, object]:
    """Run the inputs, in parts until the time `until` of `perf_counter`, tell of every fault, and count."""
    codes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    slowest = 0.0
    parts = iter(lambda: [] if time.perf_counter() > until else list(itertools.islice(given, PART)), [])
    for each, outcome in (pair for part in parts for pair in outcomes(here, part)):
        codes[str(outcome.code)] += 1
        formats[each.name.rsplit("-", 2)[0]] += 1
        slowest = max(slowest, outcome.seconds)
        for fault in outcome.faults:
            faults[fault.partition(" [")[0]] += 1
        if outcome.faults:
            tell(f"{each.name}: {outcome.faults} {' '.join(each.line)}: {outcome.told}")
    return {
        "inputs": sum(codes.values()),
        "exit codes": codes,
        "formats": formats,
        "faults": faults,
        "slowest": round(slowest, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=600.0, help="of damaged files, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--counts", type=Path)
    parser.add_argument("--valid", type=Path, help="a folder for the valid files; kept, and used again")
    own = parser.parse_args()
    started = time.perf_counter()
    until = started + 60 * own.minutes

    def tell(text: str) -> None:
        print(text, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        warm()
        if own.valid and own.valid.exists():
            shutil.copytree(own.valid, Path(folder) / "valid")
            here = Path(shutil.copytree(own.valid, Path(folder) / "here"))
        else:
            here = prepared(Path(folder))
            if own.valid:
                shutil.copytree(here, own.valid)
        print(f"valid files made after {time.perf_counter() - started:.0f} s", flush=True)
        wrong = [f"{each.name}: {out.faults}" for each, out in outcomes(here, list(cases(here))) if out.faults]
        print(f"{len(CASES)} known cases, wrong are: {wrong}", flush=True)
        counts = tried(here, inputs(here, own.inputs, own.seed, own.only), tell, until)
        if own.kills:
            from kills import killed  # which uses this module

            counts |= killed(here, own.kills, own.seed, tell)
    counts |= {"known cases": len(CASES), "wrong": wrong}
    counts["seconds"] = round(time.perf_counter() - started)
    print(json.dumps(counts, indent=1))
    if own.counts:
        own.counts.write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
