"""`--plot`: the picture of a command's report, beside its output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r2cli import console
from r2cli.cli import gates
from r2cli.errors import CheckFailed

Report = dict[str, Any]


@contextmanager
def beside(
    output: Path, front: Path | None = None, *, wanted: bool, replaces: bool
) -> Iterator[Callable[[Report], Report]]:
    """Where it is `wanted`, draw the report that the block passes through what it is given, or that a gate or proof
    fails, to `output` with the ending .png; and its front to `front`, if there is one. Raises InputError for a picture
    that is there, unless the run `replaces` it.
    """
    path = output.with_suffix(".png")
    gates.require_free([*([path] if wanted else []), *([front] if front else [])], overwrite=replaces)
    found: list[Any] = []

    def kept(report: Report) -> Report:
        found.append(report)
        return report

    try:
        yield kept
    except CheckFailed as failed:
        found.append(failed.report)
        raise
    finally:
        if wanted and found and found[0] and not console.RANK:
            _draw(path, found[0], "of_report")
        if front and found and found[0].get("front") and not console.RANK:
            _draw(front, found[0], "front")


def _draw(path: Path, report: Report, kind: str) -> None:
    from r2cli.analysis import plots
    from r2cli.storage.atomic import write_atomically

    drawn = getattr(plots, kind)(report)
    if drawn is not None:
        write_atomically(path, drawn)
        console.note(f"wrote {path}")
