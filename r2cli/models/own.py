"""The user's own networks: `file.py:factory` or `package.module:factory`.

This is the only file that runs code from outside r2 and its dependencies. It runs what the command line names, never
what a checkpoint names. A factory is called with the keywords of --model-arg, and with `num_classes` if it has such a
parameter.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from r2cli.errors import InputError, unknown
from r2cli.storage.checkpoint import ModelSpec


def label(name: str) -> str:
    """Return what a checkpoint records: the name of the file without its folders, and the name of the factory."""
    where, _, factory = name.rpartition(":")
    return f"{Path(where).name if where.endswith('.py') else where}:{factory}"


def factory(name: str) -> Callable[..., Any]:
    """Import the factory that `name` names. Raises InputError if it is missing, or its file cannot be imported."""
    where, _, wanted = name.rpartition(":")
    module = _module(where)
    factory = getattr(module, wanted, None)
    if not callable(factory):
        available = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(f"factory in {where}", wanted, available)
    return factory  # type: ignore[no-any-return]


def build(spec: ModelSpec) -> nn.Module:
    """Call the factory. Raises InputError if it raises, wants other arguments, or returns no module."""
    assert spec.factory is not None
    keywords = dict(spec.args)
    try:
        signature = inspect.signature(spec.factory)
    except (TypeError, ValueError):  # a factory written in C may have no signature
        signature = None
    if signature is not None:
        if "num_classes" in signature.parameters:
            keywords.setdefault("num_classes", spec.classes)
        try:
            signature.bind(**keywords)
        except TypeError as error:
            raise InputError(f"{spec.name}{signature}: {error}: give --model-arg NAME=VALUE for each") from error
    # SystemExit too: a script that is not meant to be imported may call sys.exit.
    try:
        model = spec.factory(**keywords)
    except (Exception, SystemExit) as error:
        raise InputError(f"{spec.name} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{spec.name} returned an object of type {type(model).__name__}: it must return a torch.nn.Module"
        )
    return model


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
        raise InputError(f"{path} does not exist: give --model FILE.py:FACTORY")
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # so that it can import files beside it
    known = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look up their module there while they are defined
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"{path} cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
        if known is not None:  # a file of the same name as a library must not replace it for others
            sys.modules[name] = known
    return module
