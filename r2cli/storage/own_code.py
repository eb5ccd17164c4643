"""The user's own code: `file.py:name` or `package.module:name`, for networks, data, metrics and losses.

This is the only file that runs code from outside r2 and its dependencies. It runs what the command line names, never
what a checkpoint names.
"""

import ast
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from r2cli.errors import InputError, unknown


def is_code(name: str) -> bool:
    """Whether a name is one of the user's own code: what stands before its last colon is a file, or a module's path."""
    where, colon, what = name.rpartition(":")
    return (
        bool(colon)
        and what.isidentifier()
        and (where.endswith(".py") or ("." in where and not set(where) & set(":/\\")))
    )


def file_of(name: str | None) -> Path | None:
    """The file of the user's own code, if it is one; else None."""
    where = (name or "").rpartition(":")[0]
    return Path(where) if where.endswith(".py") else None


def label(name: str) -> str:
    """Return what a checkpoint records: the name of the file without its folders, and the name of the factory."""
    where, _, factory = name.rpartition(":")
    return f"{Path(where).name if where.endswith('.py') else where}:{factory}"


def factory(name: str, what: str = "factory") -> Callable[..., Any]:
    """Import the function that `name` names. Raises InputError if it is missing, or its file cannot be imported."""
    where, _, wanted = name.rpartition(":")
    module = _module(where)
    factory = getattr(module, wanted, None)
    if not callable(factory):
        available = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(f"{what} in {where}", wanted, available)
    if what == "factory" and callable(getattr(factory, "state_dict", None)) and not isinstance(factory, type):
        raise InputError(f"{name} is a network itself: name a class, or a function that returns one")
    return factory  # type: ignore[no-any-return]


def called(function: Callable[..., Any], name: str, keywords: Mapping[str, Any], option: str) -> Any:
    """What the user's function gives. Raises InputError if it raises, or wants other keywords than `option` gives."""
    try:
        inspect.signature(function).bind(**keywords)
    except TypeError as error:
        raise InputError(f"{name}: {error}: give {option} NAME=VALUE for each") from error
    except ValueError:  # a function written in C may have no signature
        pass
    try:
        return function(**keywords)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        told = " ".join(str(error).split())[:300]
        raise InputError(f"{name} raised {type(error).__name__}: {told}") from error


def keywords(texts: Sequence[str], option: str) -> dict[str, Any]:
    """`NAME=VALUE` options as keywords: numbers, True, False, None and lists as Python writes them, else text."""
    out = {}
    for given in texts:
        name, sign, value = given.partition("=")
        if not sign or not name.isidentifier():
            raise InputError(f"{option} {given} is not NAME=VALUE, for example {option} width_mult=0.5")
        try:
            out[name] = _plain(ast.literal_eval(value))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            out[name] = value
    return out


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back; ValueError for what JSON does not hold."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | bool | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(value)


def _module(where: str) -> ModuleType:
    """Import a .py file or a module by name. Raises InputError if it is missing, or raises."""
    path = Path(where)
    if not where.endswith(".py"):
        sys.path.insert(0, "")  # so that a package in the current folder is found, as by `python -m`
        try:
            return importlib.import_module(where)
        except (Exception, SystemExit) as error:
            raise InputError(f"{where} cannot be imported ({type(error).__name__}: {error})") from error
        finally:
            sys.path.remove("")
    if not path.is_file():
        raise InputError(f"{path} does not exist: give FILE.py:NAME")
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)  # so that it can import files beside it
    known = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look up their module there while they are defined
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"{path} cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(folder)
        # At the end it stays: where workers are no forks (macOS, Windows, Python 3.14), they import it by name.
        if folder not in sys.path:
            sys.path.append(folder)
        if known is not None:  # a file of the same name as a library must not replace it for others
            sys.modules[name] = known
    return module
