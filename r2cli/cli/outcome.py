"""How a command ended: the exit code of an error, and its one sentence."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import typer

from r2cli.cli import defaults, interrupt
from r2cli.errors import InputError, R2Error

# What the parser raises for a wrong command line. Versions of Typer define it in different modules, so it is taken from
# the bases of a class that is public.
UsageError: Any = typer.BadParameter.__mro__[1]

# Where a sentence about an option sends the reader, by the option: the document that says more.
DOCUMENTS = {
    "--data": "docs/own-data.md",
    "--metric": "docs/tasks.md",
    "--loss": "docs/tasks.md",
    "--target": "docs/deploy.md",
    "--runtime": "docs/deploy.md",
    "--report": "docs/ci.md",
}


@dataclass(frozen=True)
class Outcome:
    """How `r2 LINE` ended: its exit code, the error in one sentence (empty: none), its report, and how long it took."""

    line: str
    code: int
    message: str
    report: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def told(error: BaseException, arguments: list[str]) -> tuple[str, int]:
    """Return the message for an error, in one sentence, and the exit code."""
    if isinstance(error, R2Error):
        message, code = str(error), error.exit_code
        if isinstance(error, InputError):
            message += _document(message)
    elif isinstance(error, KeyboardInterrupt | typer.Abort):
        message, code = interrupt.TOLD, interrupt.CODE
    elif isinstance(error, UsageError):
        # The parser's context has a parent where it had read the command: a misspelt one has no help.
        known = arguments[:1] if error.ctx is not None and error.ctx.parent is not None else []
        command = " ".join(["r2", *known])
        said = error.format_message()
        said += "" if said.endswith((".", "?", "!")) else "."
        origin = defaults.origin(error.ctx, getattr(error, "param", None))
        message, code = f"{said}{origin} Try `{command} --help`.", 2
    elif isinstance(error, OSError):
        where = error.filename or "standard output, or a file among the temporary ones (TMPDIR)"
        message, code = f"{where}: {error.strerror or error}", 3
    else:
        text = f"internal error ({type(error).__name__}: {error})"
        message, code = f"{text}: run it again with R2_TRACEBACK=1 and report what that prints", 3
    return " ".join(message.split()), code


def _document(sentence: str) -> str:
    """What is added to a sentence that names an option: the document that says more of it."""
    named = (document for option, document in DOCUMENTS.items() if f"{option} " in f"{sentence} ")
    return "" if "docs/" in sentence else next((f" (see {document})" for document in named), "")
