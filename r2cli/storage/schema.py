"""JSON from files, checked once, at the door: the fields of a frozen dataclass say what a format may hold.

    @dataclass(frozen=True)
    class GridEntry:
        bits: Annotated[int, Between(1, 8)]
        axis: int | None = None

`read(GridEntry, value)` makes one of a value that `parsed` gave. Types are str, bool, int, float (finite), Literal,
Any, tuple[X, ...], Mapping[str, X], X | None, other dataclasses, and Annotated with `Between`. Keys that a class does
not name are left out. `Malformed` names the place, such as `codecs.conv.weight.bits`, and what stands there.
"""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

T = TypeVar("T")

LARGEST = 2**53  # of an integer: beyond it other readers of JSON lose digits
SHOWN = 40  # characters of a value in a message


class Malformed(ValueError):
    """A file's content is not what its format says. The message fits into brackets."""


@dataclass(frozen=True)
class Between:
    """Bounds of a number, both allowed."""

    least: float
    most: float


UNBOUNDED = Between(-math.inf, math.inf)  # of a float that may be infinite, or NaN


def parsed(text: str | bytes) -> Any:
    """The value of JSON text. Raises Malformed for other text, and for nesting that no format of ours has."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise Malformed("its JSON is nested too deeply") from error
    except ValueError as error:
        raise Malformed(f"it is not JSON: {error}") from error


def of_text(kind: type[T], text: str | bytes) -> T:
    """`read` of JSON text."""
    return read(kind, parsed(text))


@overload
def read(kind: type[T], value: Any, place: str = "") -> T: ...
@overload
def read(kind: Any, value: Any, place: str = "") -> Any: ...
def read(kind: Any, value: Any, place: str = "") -> Any:
    """Make a `kind`, a class or any other type that is named above, of a value of JSON. Raises Malformed."""
    return _read(kind, value, place)


def _read(kind: Any, value: Any, place: str) -> Any:
    if is_dataclass(kind):
        return _fields(kind, value, place)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated and inner[1] is UNBOUNDED and isinstance(value, float):
        return value
    if origin is Annotated:
        return _within(inner[1], _read(inner[0], value, place), place)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(next(own for own in inner if own is not types.NoneType), value, place)
    if origin is Literal:
        return value if any(value == own and type(value) is type(own) for own in inner) else _refuse(place, value, kind)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else _refuse(place, value, "a list")
        return tuple(_read(inner[0], item, f"{place}.{number}") for number, item in enumerate(items))
    if origin is Mapping:
        table = value if isinstance(value, Mapping) else _refuse(place, value, "a table")
        return {str(key): _read(inner[1], item, f"{place}.{key}") for key, item in table.items()}
    if kind is types.NoneType:
        return value if value is None else _refuse(place, value, "null")
    return value if kind is Any else _plain(kind, value, place)


def _fields(kind: Any, value: Any, place: str) -> Any:
    table = value if isinstance(value, Mapping) else _refuse(place, value, "a table")
    start, given = f"{place}." if place else "", {}
    hints = _hints(kind)
    for own in fields(kind):
        if own.name in table:
            given[own.name] = _read(hints[own.name], table[own.name], start + own.name)
        elif own.default is MISSING and own.default_factory is MISSING:
            raise Malformed(f"'{start}{own.name}' is missing")
    return kind(**given)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _plain(kind: type, value: Any, place: str) -> Any:
    """A text, a boolean or a number: an integer is no boolean, and counts as a float where one is wanted."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    if type(value) is not kind or (kind is int and abs(value) > LARGEST):  # type: ignore[arg-type]
        _refuse(place, value, {str: "a text", bool: "true or false", int: "an integer", float: "a number"}[kind])
    if kind is float and not math.isfinite(value):
        _refuse(place, value, "a finite number")
    return value


def _within(bounds: Between, value: Any, place: str) -> Any:
    if not bounds.least <= value <= bounds.most:
        _refuse(place, value, f"from {bounds.least:g} to {bounds.most:g}")
    return value


def _refuse(place: str, value: Any, wanted: Any) -> Any:
    if get_origin(wanted) is Literal:
        wanted = " or ".join(map(repr, get_args(wanted)))
    shown = "a table" if isinstance(value, dict) else "a list" if isinstance(value, list) else _short(value)
    raise Malformed(f"'{place}' is {shown}, not {wanted}" if place else f"it is {shown}, not {wanted}")


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) > LARGEST:  # Python refuses to write thousands of digits
        return "an integer of too many digits"
    shown = repr(value[:SHOWN] if isinstance(value, str) else value)
    return shown if len(shown) <= 2 * SHOWN else f"{shown[: 2 * SHOWN]}…"
