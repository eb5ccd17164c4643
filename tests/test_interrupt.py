"""Ctrl-C, wherever it comes: the process ends at once, tells so in one sentence, and leaves nothing temporary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
START = """
import os, signal, sys, weakref
from pathlib import Path
from r2cli.cli import interrupt
from r2cli.storage import atomic
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupt.ends_at_once()

def press():
    os.kill(os.getpid(), signal.SIGINT)

"""
# What a KeyboardInterrupt would be lost in, or be told late.
PLACES = {
    "in the end of a weak reference": """
class Thing: pass
thing = Thing()
kept = weakref.ref(thing, lambda ref: press())
del thing
""",
    "while a file is written": """
with atomic.replacing(Path("made")) as file:
    file.write(b"half")
    press()
""",
    "with a lock and a folder": """
with atomic.locked(Path("made")), atomic.scratch_folder() as folder:
    (folder / "a").write_text("a")
    print(folder, flush=True)
    press()
""",
}


def run(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", START + code + "\nprint('went on')", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_ends_the_process_and_leaves_nothing(place: str, tmp_path: Path) -> None:
    ran = run(PLACES[place], tmp_path)
    assert (ran.returncode, ran.stderr) == (130, "r2: interrupted; no file is left half written\n")
    assert "went on" not in ran.stdout and not list(tmp_path.iterdir())
    assert not ran.stdout or not Path(ran.stdout.strip()).exists()


def test_the_lock_of_another_run_stays(tmp_path: Path) -> None:
    code = """
with atomic.locked(Path("made")):
    if not os.fork():
        try:
            with atomic.locked(Path("made")):
                pass
        except Exception:
            interrupt._owner = os.getpid()
            press()
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 130
    print(Path(".made.lock").exists())
"""
    assert run(code, tmp_path).stdout == "True\nwent on\n"


def test_a_command_may_add_its_words_and_machines_get_json(tmp_path: Path) -> None:
    ran = run("with interrupt.telling(lambda: 'go on with --resume'):\n    press()", tmp_path, "--json")
    assert ran.stderr.splitlines() == ["go on with --resume", "r2: interrupted; no file is left half written"]
    assert json.loads(ran.stdout)["exit_code"] == 130


def test_a_process_that_waits_for_others_is_told_by_an_exception(tmp_path: Path) -> None:
    code = (
        "with interrupt.raised():\n    try:\n        press()\n    except KeyboardInterrupt:\n        print('stopped')"
    )
    assert run(code, tmp_path).stdout == "stopped\nwent on\n"


def test_a_process_that_is_started_to_ignore_interrupts_does(tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN)\ninterrupt.ends_at_once()\npress()"
    assert run(code, tmp_path).stdout == "went on\n"
