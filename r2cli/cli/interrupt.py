"""Ctrl-C ends the process at once, with one sentence and exit code 130.

Python's own KeyboardInterrupt is raised wherever the program is. Raised in what native code calls (the end of a weak
reference, torch's dispatcher), it is lost, or aborts the process. So nothing is raised here: what is unfinished is
removed by its name. Files appear whole or not at all in any case (storage/atomic.py).
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

CODE = 130
ATOMIC = "r2cli.storage.atomic"
TOLD = "interrupted; no file is left half written"
CLEAR = "\r\x1b[2K\x1b[?25h"  # a progress bar's line, and the cursor that it hides

_last_words: list[Callable[[], str]] = []
_raising = 0
_owner = 0


def ends_at_once() -> None:
    """From now on an interrupt ends this process, unless it is started to ignore interrupts.

    A step of `r2 run --jobs` ends in any case: only the run itself interrupts it.
    """
    global _owner
    here = threading.current_thread() is threading.main_thread()  # others may not say what a signal does
    before = signal.getsignal(signal.SIGINT)
    if here and (before is signal.default_int_handler or (before == signal.SIG_IGN and _is_step())):
        _owner = os.getpid()
        signal.signal(signal.SIGINT, _end)
        if sys.platform == "win32":
            signal.signal(signal.SIGBREAK, _end)  # by which `r2 run --jobs` stops a step there


def _is_step() -> bool:
    from r2cli.config import values  # rarely needed, and its import takes longer than `r2 --help` can spare

    return values.STEP in os.environ


@contextmanager
def telling(words: Callable[[], str]) -> Iterator[None]:
    """Within the block an interrupt also tells what `words` returns, where that is not empty."""
    _last_words.append(words)
    try:
        yield
    finally:
        _last_words.remove(words)


@contextmanager
def raised() -> Iterator[None]:
    """Within the block an interrupt is a KeyboardInterrupt: for a process that waits for others, and stops them."""
    global _raising
    _raising += 1
    try:
        yield
    finally:
        _raising -= 1


def _end(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _owner:  # a process that loads data for this one, which tells of it
        os._exit(CODE)
    if _raising:
        raise KeyboardInterrupt
    if ATOMIC in sys.modules:  # else this process holds nothing yet; importing it takes a fifth of `r2 --help`
        sys.modules[ATOMIC].abandon()
    said = [*filter(None, (words() for words in _last_words)), f"r2: {TOLD}"]
    # By the system's own write: the stream may be in the middle of one.
    os.write(2, ((CLEAR if os.isatty(2) else "") + "\n".join(said) + "\n").encode())
    if "--json" in sys.argv:
        os.write(1, (json.dumps({"error": TOLD, "exit_code": CODE}, indent=2) + "\n").encode())
    os._exit(CODE)
