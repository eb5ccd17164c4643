"""All that r2 prints, and the only importer of rich: results on standard output, progress and errors on standard error.

With --json, standard output holds one JSON object and nothing else.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_out = Console(soft_wrap=True, highlight=False, markup=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
RANK = int(os.environ.get("RANK", "0"))  # under torchrun the first process prints, the others only what stops them

Line = str | Text | Table

BARS = "▁▂▃▄▅▆▇█"


class Bar:
    """A progress bar that is running: `advance` it, and print a `line` above it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self._task, steps)

    def line(self, text: str) -> None:
        if not RANK:
            self._progress.console.print(text)


@contextmanager
def bar(what: str, total: int, *, of_bytes: bool = False) -> Iterator[Bar]:
    """A bar over `total` steps, or bytes, with the time left, on standard error."""
    done = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(None), done, TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True, disable=RANK > 0 or not _err.is_terminal) as progress:
        yield Bar(progress, progress.add_task(what, total=total))


def note(text: str) -> None:
    """One line for a person who is waiting."""
    if not RANK:
        _err.print(text, style="dim")


def tell(lines: Sequence[Line], *, as_json: bool) -> None:
    """The result of a command for people, lines and tables; for machines it is the report that the command returns."""
    if RANK or as_json:
        return
    for line in lines:
        _out.print(line)  # a plain text is printed as it is: a file's name is no markup
        if isinstance(line, Table):
            _out.print()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A plain table; numbers to the right, the first column to the left."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = index > 0 and all(_is_numeric(row[index]) for row in rows)
        out.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        out.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return out


def histogram(heights: Sequence[float], marked: Sequence[bool]) -> Text:
    """Bars of heights from 0 to 1, one character each; `marked` ones are red dots, which no colour is needed to see."""
    text = Text()
    for height, mark in zip(heights, marked, strict=True):
        if height <= 0:
            text.append(" ")
        elif mark:
            text.append("•", "red")
        else:
            text.append(BARS[min(len(BARS) - 1, int(height * len(BARS)))])
    return text


def tick(name: str, passed: bool, detail: str) -> Text:
    return Text.assemble(("✓", "green") if passed else ("✗", "red"), f" {name}: {detail}")


def next_step(command: str) -> Text:
    return Text.assemble(("next:", "bold"), f" {command}")


def report(told: Mapping[str, Any]) -> None:
    """The result of a command for machines, on standard output."""
    if not RANK:
        sys.stdout.write(json.dumps(_plain(told), indent=2) + "\n")


def fail(message: str) -> None:
    """An error, as one sentence."""
    which = f" (process {RANK})" if RANK else ""
    _err.print(Text.assemble(("r2:", "bold red"), f"{which} {message}"))


def _is_numeric(cell: object) -> bool:
    text = str(cell).replace(",", "")
    try:
        float(text)
    except ValueError:
        return text == "-"
    return True


def _plain(value: Any) -> Any:
    """`value` for strict JSON: infinities and NaN become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
