"""Fields of configs that are options of commands too: default, bounds, check and help of an option stand in one place.

`r2cli.cli.command` makes the command line from these fields, and the Python API takes the same configs. A value is
checked when the config is made, so both refuse the same values in the same words.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, get_args

from r2cli.errors import InputError

# The panels of `r2 COMMAND --help`.
WORK, FOREIGN, GATES, OUTPUT = "Work", "A network of your own", "Gates (exit 1)", "Output"


@dataclass(frozen=True)
class Option:
    """What a field says about its option.

    `flags` replace `--field-name`. `least` and `most` are bounds. `check` raises InputError for a value that makes no
    sense. `given` is the type on the command line if that differs from the field's, and `shown` is the default there.
    `means` turns a value into what a method gets, where that differs. An option with `is_argument` is given by its
    place on the line, without a flag.
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
    """Return a dataclass field with a default that is an option too. `more` are fields of `Option`."""
    return field(default=default, metadata={"option": Option(help, flags, **more)})


@dataclass(frozen=True)
class Config:
    """The base of all configs. Making one raises InputError for a value that is out of bounds or makes no sense."""

    def __post_init__(self) -> None:
        for own in fields(self):
            told: Option = own.metadata["option"]
            value = getattr(self, own.name)
            # An empty value means that the option was not given.
            if value is None or (isinstance(value, list | tuple) and not value):
                continue
            flag = flag_of(own.name, told)
            _require_number(flag, own.type, value)
            if isinstance(value, Real) and math.isnan(value):  # no bound: nothing is below it
                raise InputError(f"{flag} nan is impossible: give a number")
            if told.least is not None and value < told.least:
                raise InputError(f"{flag} {value:g} is impossible: give {told.least:g} or more")
            if told.most is not None and value > told.most:
                raise InputError(f"{flag} {value:g} is impossible: give {told.most:g} or less")
            if told.check is not None:
                told.check(value)


def _require_number(flag: str, kind: Any, value: Any) -> None:
    """Raise InputError for a value of another type where a field of `kind` is a number."""
    kinds = set(get_args(kind) or (kind,)) - {type(None)}
    if kinds == {int} and (type(value) is bool or not isinstance(value, Integral)):
        raise InputError(f"{flag} {value!r} is impossible: give a whole number")
    if kinds == {float} and (type(value) is bool or not isinstance(value, Real)):
        raise InputError(f"{flag} {value!r} is impossible: give a number")


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
    """Return how messages name a field: `--weight-bits` for weight_bits."""
    return told.flags[0].split("/")[0] if told.flags else f"--{name.replace('_', '-')}"
