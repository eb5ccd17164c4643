"""A field of a config that is an option of a command too: its default, bounds, check and one line of help, stated once.

The command line is made from these fields (`r2cli.cli.command`), and the Python API takes the same configs. A value is
checked when the config is made, so both refuse the same values in the same words.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from typing import Any

from r2cli.errors import InputError

# The panels of `r2 COMMAND --help`.
WORK, FOREIGN, GATES, OUTPUT = "Work", "A network of your own", "Gates (exit 1)", "Output"


@dataclass(frozen=True)
class Option:
    """What a field says of itself.

    `flags` stand in the place of `--field-name`. `check` raises InputError for a value that cannot be. `given` is the
    type on the command line where that differs from the field's, and `shown` the default there. `means` turns a value
    into what a method gets, where that differs. An option with `is_argument` is given by its place.
    """

    help: str
    flags: tuple[str, ...] = ()
    panel: str = WORK
    least: float | None = None
    most: float | None = None
    check: Callable[[Any], object] | None = None
    given: Any = None
    shown: Any = None
    means: Callable[[Any], Any] | None = None
    is_argument: bool = False


def option(default: Any, help: str, *flags: str, **more: Any) -> Any:
    """A dataclass field with a default, which is an option too; `more` as in `Option`."""
    return field(default=default, metadata={"option": Option(help, flags, **more)})


@dataclass(frozen=True)
class Config:
    """The base of all configs. Making one raises InputError for a value that cannot be."""

    def __post_init__(self) -> None:
        for own in fields(self):
            told: Option = own.metadata["option"]
            value = getattr(self, own.name)
            # What is empty or the default was not asked for.
            if value is None or value == () or value == []:
                continue
            flag = flag_of(own.name, told)
            if told.least is not None and value < told.least:
                raise InputError(f"{flag} {value:g} is impossible: give {told.least:g} or more")
            if told.most is not None and value > told.most:
                raise InputError(f"{flag} {value:g} is impossible: give {told.most:g} or less")
            if told.check is not None:
                told.check(value)


def meanings(config: Config, names: Collection[str]) -> dict[str, Any]:
    """The fields of `config` that have one of `names`, each as what its value means."""
    found = {}
    for own in fields(config):
        if own.name in names:
            told: Option = own.metadata["option"]
            value = getattr(config, own.name)
            found[own.name] = value if told.means is None else told.means(value)
    return found


def flag_of(name: str, told: Option) -> str:
    """How messages name a field: `--weight-bits` for weight_bits."""
    return told.flags[0].split("/")[0] if told.flags else f"--{name.replace('_', '-')}"
