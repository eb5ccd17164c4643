"""Commands take configs, and their Typer signature has one option for each field.

@command
def ptq(config: PtqConfig, inputs: Inputs, gates: CompressionGates, output: PtqOutput) -> Report: ...
"""

import inspect
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import MISSING, fields
from itertools import chain
from typing import Annotated, Any, get_type_hints

import typer

from r2cli import console
from r2cli.cli import completion, defaults, reports
from r2cli.config.groups import ModelWritten
from r2cli.config.option import Config, Option, flag_of
from r2cli.errors import InputError

Report = Mapping[str, Any]

_line: ContextVar[str] = ContextVar("_line", default="")
UNTOLD = {*(own.name for own in fields(ModelWritten)), "resume"}  # these say how a command answers, not what it makes


def command(function: Callable[..., Report]) -> Callable[..., Report]:
    """Return `function` with one keyword parameter for each field of the configs that it takes, as Typer reads them.

    Parameters that are no configs, such as Typer's context, stay as they are.
    """
    hints = get_type_hints(function)
    taken: dict[str, type[Config]] = {}
    parameters: list[inspect.Parameter] = []
    for name in inspect.signature(function).parameters:
        kind = hints[name]
        if isinstance(kind, type) and issubclass(kind, Config):
            taken[name] = kind
        else:
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind))
    parameters += [parameter for kind in taken.values() for parameter in _parameters(kind)]

    def run(**given: Any) -> Report:
        mood = console.speaking(given["quiet"], given["verbose"], given["color"])
        with mood, reports.written(given["report"] or ()) as found:
            made = {name: _made(kind, given) for name, kind in taken.items()}
            words = [each for kind in taken.values() for each in _words(kind, given)]
            first = sorted(words, key=lambda each: each[0].startswith("--"))  # what is given by its place
            _line.set(shlex.join(["r2", function.__name__, *chain(*first)]))
            own = {name: value for name, value in given.items() if name in hints}
            report = function(**made, **own)
            found.update(report)
        return report

    # Typer reads only these two of a function. functools.wraps would show it the parameters of `function`, the configs.
    run.__signature__ = inspect.Signature(parameters, return_annotation=Report)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


def line() -> str:
    """The command that runs, as one line that gives the same files without variables and without pyproject.toml."""
    return _line.get()


def _words(kind: type[Config], given: Mapping[str, Any]) -> Iterator[list[str]]:
    """The values of a config that are no defaults, as they are given on a line."""
    for own in fields(kind):
        told: Option = own.metadata["option"]
        value = given[own.name]
        if own.name in UNTOLD or value is None or value in (own.default, _default(own.default, told)):
            continue
        flag, _, opposite = (told.flags[0] if told.flags else flag_of(own.name, told)).partition("/")
        if told.is_argument:
            yield list(map(str, value if isinstance(value, list | tuple) else [value]))
        elif isinstance(value, bool):
            yield [flag if value else opposite]
        else:
            yield from ([flag, str(each)] for each in (value if isinstance(value, list | tuple) else [value]))


def _parameters(kind: type[Config]) -> tuple[inspect.Parameter, ...]:
    """Return a parameter for each field of a config."""
    hints = get_type_hints(kind)
    return tuple(
        inspect.Parameter(
            own.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(own.default, own.metadata["option"]),
            annotation=Annotated[
                _given(hints[own.name], own.metadata["option"]), _typer(own.name, own.metadata["option"])
            ],
        )
        for own in fields(kind)
    )


def _given(hint: Any, told: Option) -> Any:
    """Return the type that the option has on the command line."""
    return hint if told.given is None else told.given


def _default(default: Any, told: Option) -> Any:
    """Return the default on the command line.

    It is None for an empty sequence, which Typer would show as a value. An argument whose default is an empty text has
    none, so that it must be given.
    """
    if told.is_argument and default == "":
        return inspect.Parameter.empty
    assert default is not MISSING
    return None if default == () else default


def _typer(name: str, told: Option) -> Any:
    """Return the field as Typer's option or argument. Its check runs while a line is read, also for recipes' steps."""

    def checked(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
        if told.check is not None and value is not None and value != []:
            try:
                told.check(value)
            except InputError as error:
                origin = defaults.origin(context, parameter)
                raise InputError(f"{error}.{origin[:-1]}" if origin else str(error)) from error
        return value

    if told.is_argument:
        return typer.Argument(help=told.help, show_default=False)
    bounds = {"min": told.least, "max": told.most}
    flags = told.flags or (flag_of(name, told),)
    offered = completion.of(flags[0], told.check)
    more: dict[str, Any] = {"rich_help_panel": told.panel, "callback": checked, "autocompletion": offered, **bounds}
    return typer.Option(*flags, help=told.help, envvar=variable(flags[0]), show_envvar=False, **more)


def variable(flag: str) -> str | None:
    """Return the variable of the environment that stands for an option: R2_WEIGHT_BITS for --weight-bits.

    There is none for --json, which belongs to the line of who reads it.
    """
    name = flag.split("/")[0].strip("-").replace("-", "_").upper()
    return None if name == "JSON" else f"R2_{name}"


def _made(kind: type[Config], given: Mapping[str, Any]) -> Config:
    """Return the config with the values that were given. Raises InputError as the config does."""
    own = {each.name: given[each.name] for each in fields(kind)}
    return kind(**{name: () if value is None and _is_sequence(kind, name) else value for name, value in own.items()})


def _is_sequence(kind: type[Config], name: str) -> bool:
    """Return whether the default of a field is an empty sequence."""
    return next(each for each in fields(kind) if each.name == name).default == ()
