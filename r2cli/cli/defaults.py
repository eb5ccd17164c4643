"""`[tool.r2]` in pyproject.toml: options of this folder. What a command line or the environment says goes before it.

[tool.r2]
seed = 1                  # of every command that has the option
[tool.r2.ptq]
weight-bits = 4           # of one command
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2cli.errors import InputError, unknown

FILE = Path("pyproject.toml")


def of_folder(commands: Mapping[str, Mapping[str, bool]]) -> dict[str, dict[str, Any]]:
    """Return the options that the folder's pyproject.toml gives to each of `commands`, which have the options
    named; those that are true may be repeated, and their values become lists.

    Raises InputError for a file that is no TOML, and for an option or command that does not exist.
    """
    if not FILE.is_file():
        return {}
    import tomllib

    try:
        tools = tomllib.loads(FILE.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{FILE} cannot be read: {error}; mend it, or run r2 in another folder") from error
    own = tools.get("r2", {}) if isinstance(tools, dict) else tools
    if not isinstance(own, dict):
        raise InputError(f"{FILE}: tool.r2 must be a table of options")
    known = {name: {option.replace("_", "-"): option for option in options} for name, options in commands.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in commands}
    for key, value in own.items():
        if isinstance(value, dict):
            if key not in known:
                raise unknown(f"command in [tool.r2.{key}] of {FILE},", key, known)
            found[key] |= {_named(option, known[key], f"[tool.r2.{key}]"): given for option, given in value.items()}
            continue
        every = {option: name for options in known.values() for option, name in options.items()}
        option = _named(key, every, "[tool.r2]")
        for name, options in known.items():
            if option in options.values():
                found[name].setdefault(option, value)
    for name, given in found.items():
        repeated = {option for option, many in commands[name].items() if many}
        found[name] = {
            key: [value] if key in repeated and isinstance(value, str) else value for key, value in given.items()
        }
    return found


def origin(context: Any, parameter: Any) -> str:
    """A sentence that says where a wrong value comes from; empty for one on the command line, or where it is unknown.

    Both are the parser's, or None.
    """
    if context is None or parameter is None:
        return ""
    source = context.get_parameter_source(parameter.name)
    named = {"ENVIRONMENT": f"the variable {parameter.envvar}", "DEFAULT_MAP": str(FILE)}
    return f" It comes from {named[source.name]}." if source is not None and source.name in named else ""


def _named(key: str, options: Mapping[str, str], where: str) -> str:
    if key not in options:
        raise unknown(f"option in {where} of {FILE},", key, options)
    return options[key]
