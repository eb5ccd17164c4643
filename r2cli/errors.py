"""Every error that a user can cause, and the exit code of each class.

    R2Error                3   something failed while running
    ├── InputError         2   a file, a tensor, a name or an option value cannot be used
    └── CheckFailed        1   the work was done and written, but a gate or a proof failed

A message is one sentence. It names the file and the tensor, and says what to do. Success is 0, an interrupt 130.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any


class R2Error(Exception):
    """A failure at run time (exit code 3), with a message meant for the user."""

    exit_code = 3


class InputError(R2Error):
    """Something that the user gave cannot be used (exit code 2)."""

    exit_code = 2


class CheckFailed(R2Error):
    """The result was written, but a gate or a proof on it failed (exit code 1).

    `report` is the report of the command, if it was complete by then.
    """

    exit_code = 1

    def __init__(self, message: str, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report


def unknown(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """Return the error for a name that does not exist. Its message suggests the nearest one that does."""
    names = sorted(choices)
    # Below a similarity of 0.5 a suggestion is more often wrong than right.
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return InputError(f"unknown {kind} '{name}': {f'{hint}known are {listed}' if names else 'there are none'}")
