"""The only file that prints: results go to standard output, progress and errors to standard error.

With --json, standard output holds one JSON object and nothing else, so that it can be piped into another program.
"""

import io
import json
import math
import os
import select
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import IO, Any
from unicodedata import category

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from r2cli.errors import R2Error


def escaped(text: str) -> str:
    """`text` with every character that a terminal would obey written as `\\x1b`: names in files may hold any.

    Those are control characters but new lines, marks that turn the direction of writing, and halves of characters.
    """
    if text.isprintable():
        return text
    obeyed = (own for own in set(text) if own != "\n" and category(own) in OBEYED)
    return text.translate({ord(own): own.encode("unicode_escape").decode() for own in obeyed})


OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of Unicode


class Output(Console):
    """Prints, with names `escaped`, until its reader goes away. The command then goes on without a word, to its files
    and its exit code.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))

    def on_broken_pipe(self) -> None:
        self.quiet = True
        hush(self.file)


# No markup: a file name such as "[a].onnx" must be printed as it is.
_PLAIN: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False}
_COLORS: dict[str, dict[str, Any]] = {
    "always": {"color_system": "standard", "no_color": False},
    "never": {"no_color": True},
}
_out, _err = Output(**_PLAIN), Output(stderr=True, **_PLAIN)
# torchrun sets RANK. Only the first process prints results and progress; the others print nothing but their errors.
RANK = int(os.environ.get("RANK", "0"))

Line = str | Text | Table

BARS = "▁▂▃▄▅▆▇█"
NAMED = 20  # characters of a name in the first column of a table, which are on one line in a narrow terminal too


class Bar:
    """A running progress bar. `advance` moves it on; `line` prints a line above it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self._task, steps)

    def line(self, text: str) -> None:
        if not RANK and not _mood.quiet:
            self._progress.console.print(text)


@contextmanager
def bar(what: str, total: int, *, of_bytes: bool = False) -> Iterator[Bar]:
    """Show a progress bar over `total` steps or bytes, with the time left, on standard error."""
    done = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(None), done, TimeRemainingColumn())
    hidden = RANK > 0 or _mood.quiet or not _err.is_terminal
    with Progress(*columns, console=_err, transient=True, disable=hidden) as progress:
        yield Bar(progress, progress.add_task(what, total=total))


def note(text: str) -> None:
    """Print one line for a person who is waiting, on standard error."""
    if not RANK and not _mood.quiet:
        _err.print(f"{perf_counter() - _mood.started:7.1f} s  {text}" if _mood.verbose else text, style="dim")


@dataclass
class _Mood:
    quiet: bool = False
    verbose: bool = False
    started: float = 0.0


_mood = _Mood()


@contextmanager
def speaking(quiet: bool, verbose: bool, color: str) -> Iterator[None]:
    """Within the block leave progress out (`quiet`), tell with it the seconds since the start (`verbose`), and write
    colours as `color` says: auto, always or never. A block within another one changes nothing.
    """
    if _mood.started:
        yield
        return
    global _out, _err
    before = _out, _err
    _mood.quiet, _mood.verbose, _mood.started = quiet, verbose and not quiet, perf_counter()
    if color in _COLORS:
        _out, _err = Output(**_PLAIN, **_COLORS[color]), Output(stderr=True, **_PLAIN, **_COLORS[color])
    try:
        yield
    finally:
        _mood.quiet, _mood.verbose, _mood.started = False, False, 0.0
        _out, _err = before


def command_of_github(kind: str, title: str, text: str) -> None:
    """Print an annotation of GitHub Actions, on standard error: `kind` is error, warning or notice."""
    data = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    name = title.replace("%", "%25").replace(":", "%3A").replace(",", "%2C").replace("\n", " ")
    _err.print(f"::{kind} title={name}::{data}")


def tell(lines: Sequence[Line], *, as_json: bool) -> None:
    """Print the result of a command for people. With `as_json` print nothing: `report` prints the result then."""
    if RANK or as_json:
        return
    with _told():
        for line in lines:
            _out.print(line)
            if isinstance(line, Table):
                _out.print()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Make a plain table. Columns of numbers are aligned to the right, all others and the first to the left.

    Where the terminal is narrow, the names in the first column are broken last.
    """
    out = Table(box=None, pad_edge=False, header_style="bold")
    named = min(NAMED, max((len(str(row[0])) for row in rows), default=0))
    for index, column in enumerate(columns):
        numeric = index > 0 and all(_is_numeric(row[index]) for row in rows)
        side, least = ("right" if numeric else "left"), (named if index == 0 else None)
        out.add_column(column, justify=side, overflow="fold", min_width=least)  # type: ignore[arg-type]
    for row in rows:
        out.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return out


def histogram(heights: Sequence[float], marked: Sequence[bool]) -> Text:
    """Draw heights from 0 to 1 as bars, one character each. Marked bars are red dots, so they show without colour."""
    text = Text()
    for height, mark in zip(heights, marked, strict=True):
        if height <= 0:
            text.append(" ")
        elif mark:
            text.append("•", "red")
        else:
            text.append(BARS[min(len(BARS) - 1, int(height * len(BARS)))])
    return text


def ending(name: str, most: int) -> str:
    """A name of at most `most` characters: its end, which is what differs."""
    return name if len(name) <= most else f"…{name[-(most - 1) :]}"


def bar_of(length: int) -> Text:
    """A bar of that many characters."""
    return Text("█" * length)


def tick(name: str, passed: bool | None, detail: str) -> Text:
    """A line with a tick, a cross or, for None, a dash."""
    return Text.assemble(TICKS[passed], f" {name}: {detail}")


TICKS: Mapping[bool | None, tuple[str, str]] = {True: ("✓", "green"), False: ("✗", "red"), None: ("-", "dim")}


def next_step(*words: object) -> Text:
    """The line that says what to run next: its words, quoted for a shell where they need it."""
    return Text.assemble(("next:", "bold"), f" {shlex.join(map(str, words))}")


def report(result: Mapping[str, Any]) -> None:
    """Print the result of a command for machines: one JSON object on standard output."""
    if RANK:
        return
    with _told():
        sys.stdout.write(json.dumps(_plain(result), indent=2) + "\n")
        sys.stdout.flush()


@contextmanager
def _told() -> Iterator[None]:
    """Raises R2Error where standard output cannot be written; a reader that has gone is no error."""
    try:
        yield
    except BrokenPipeError:
        hush(sys.stdout)
    except OSError as error:
        hush(sys.stdout)  # or the report of this error would fail in the same way
        raise R2Error(f"standard output could not be written: {error.strerror or error}") from error


def ready() -> None:
    """Make standard output take every text: where its encoding lacks a character, as in a C locale, it is a '?'."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def hush(stream: IO[str]) -> None:
    """Let what is written to `stream` from now on go nowhere, also what the interpreter writes at its end."""
    with suppress(OSError, ValueError):  # one that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, or was one and is hushed."""
    with suppress(OSError, ValueError, AttributeError):  # no file, or a system that cannot ask
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return _file_of_output() != _AT_START or any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _file_of_output() -> tuple[int, int] | None:
    with suppress(OSError, ValueError, AttributeError):
        found = os.fstat(sys.stdout.fileno())
        return found.st_dev, found.st_ino
    return None


_AT_START = _file_of_output()


def fail(message: str) -> None:
    """Print an error, which is one sentence, on standard error."""
    which = f" (process {RANK})" if RANK else ""
    _err.print(Text.assemble(("r2:", "bold red"), f"{which} {message}"))


def _is_numeric(cell: object) -> bool:
    text = str(cell).replace(",", "")
    try:
        float(text)
    except ValueError:
        return text == "-"  # stands for a number that does not exist
    return True


def _plain(value: Any) -> Any:
    """Make `value` fit for strict JSON, which has no infinities and no NaN: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
