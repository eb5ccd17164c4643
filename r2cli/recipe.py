"""Recipes: the commands of `r2` in a TOML file, for every combination of a matrix, and tables of what came out.

    [matrix]                        # every combination of these values
    reg = ["none", "margin"]
    bits = [8, 4]

    [[step]]                        # once for each combination of the variables that it mentions
    run = "pretrain"
    reg = "{reg}"
    output = "{reg}.safetensors"

    [[table]]                       # of the reports of the steps that run this command with these variables
    title = "what range regularization buys"
    run = "ptq"
    rows = ["reg", "bits"]
    metrics = { "top-1" = "top1" }

A step's keys are exactly its command's options; `source` and `output` are files in the recipe's folder. A value of the
matrix may be a table: `{pre.reg}` is its `reg`, and its `name` stands for it in tables. What a table does not list is
averaged.
"""

import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from r2cli import __version__
from r2cli.checkpoint import write_atomically
from r2cli.errors import InputError, unknown
from r2cli.options import resume_state

PLACEHOLDER = re.compile(r"\{([\w.-]+)\}")
COMMANDS = ("pretrain", "ptq", "qat", "palettize", "export", "evaluate")
FILES = ("source", "output")


@dataclass(frozen=True)
class Recipe:
    path: Path
    matrix: Mapping[str, Sequence[Any]]
    steps: Sequence[Mapping[str, Any]]
    tables: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Step:
    """One command to run, and the matrix values that it was made for."""

    command: str
    options: Mapping[str, Any]
    values: Mapping[str, Any]

    def arguments(self, folder: Path) -> list[str]:
        """The command line after `r2`."""
        out = [self.command]
        for key, value in self.options.items():
            if key in FILES:
                value = folder / value
            if key == "source":
                out.insert(1, str(value))
            elif value is True:
                out.append(f"--{key}")
            elif value is not False:
                for one in value if isinstance(value, list) else [value]:
                    out += [f"--{key}", str(one)]
        return out


def load(path: Path) -> Recipe:
    """Read a recipe. Raises InputError for a missing or malformed one."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: name a recipe, for example recipes/quickstart.toml")
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    for key in content:
        if key not in ("matrix", "step", "table"):
            raise unknown(f"key in {path}", key, ("matrix", "step", "table"))
    recipe = Recipe(path, content.get("matrix", {}), content.get("step", []), content.get("table", []))
    _require_shapes(recipe)
    for table in recipe.tables:
        _require_complete(recipe, table)
    return recipe


def _require_shapes(recipe: Recipe) -> None:
    """Raises InputError for a matrix that is no lists, steps that are no commands, and values that no option takes."""
    path, matrix = recipe.path, recipe.matrix
    if not isinstance(matrix, dict) or not all(isinstance(values, list) and values for values in matrix.values()):
        raise InputError(f"{path}: [matrix] wants a list of values for every variable, for example bits = [8, 4]")
    if not _are_tables(recipe.steps) or not recipe.steps:
        raise InputError(f"{path} has no [[step]]: give it at least one, with run = 'pretrain' or another command")
    if not _are_tables(recipe.tables):
        raise InputError(f"{path}: a table is written [[table]], with run, rows and metrics")
    for step in recipe.steps:
        if step.get("run") not in COMMANDS:
            raise unknown(f"command of a step in {path}", str(step.get("run")), COMMANDS)
        for key, value in step.items():
            if not isinstance(value, str if key in FILES else (str, int, float, list)):
                raise InputError(f"{path}: {key} = {value} is not a value that an option takes: put it in quotes")


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _require_complete(recipe: Recipe, table: Mapping[str, Any]) -> None:
    """Raises InputError, before any work is done, for a [[table]] that lacks a key or names no variable."""
    for key, kind in (("run", str), ("rows", list), ("metrics", dict)):
        if not isinstance(table.get(key), kind):
            raise InputError(f"{recipe.path}: a [[table]] wants {key}, as {kind.__name__}")
    for name in [*table["rows"], *([table["column"]] if "column" in table else [])]:
        if recipe.matrix and name not in recipe.matrix:
            raise unknown(f"variable of {recipe.path}", str(name), recipe.matrix)


def steps(recipe: Recipe) -> list[Step]:
    """Every command of the recipe, in order. Raises InputError for a variable that the matrix does not have."""
    out = []
    for step in recipe.steps:
        options = {key: value for key, value in step.items() if key != "run"}
        mentioned = {name.split(".")[0] for name in PLACEHOLDER.findall(json.dumps(options, default=str))}
        for name in mentioned:
            if name not in recipe.matrix:
                raise unknown(f"variable of {recipe.path}", name, recipe.matrix)
        variables = [name for name in recipe.matrix if name in mentioned]
        for chosen in itertools.product(*(recipe.matrix[name] for name in variables)):
            values = dict(zip(variables, chosen, strict=True))
            try:
                filled = {key: _fill(value, values) for key, value in options.items()}
            except InputError as error:
                raise InputError(f"{recipe.path}: {error}") from error
            out.append(Step(step["run"], {k: v for k, v in filled.items() if v is not None}, values))
    return out


def shell(step: Step, folder: Path) -> str:
    """The step as a line for a shell."""
    return shlex.join(["r2", *step.arguments(folder)])


def execute(
    todo: Sequence[Step],
    folder: Path,
    invoke: Callable[[list[str]], Any],
    tell: Callable[[str], None],
    *,
    overwrite: bool,
) -> list[dict[str, Any]]:
    """Run the steps in order; returns each step's values and report. What is done is kept in results.json.

    A step is skipped that was done with the same options by the same version, whose output is still there and whose
    source was not made again. One that was stopped half way goes on from its last epoch, or runs again over its own
    files.
    """
    record = folder / "results.json"
    done, results = _recorded(record), []
    for number, step in enumerate(todo, start=1):
        key = json.dumps([__version__, step.command, step.options], sort_keys=True, default=str)
        output = step.options.get("output")
        name = key if output is None else str(output)
        files = [] if output is None else [folder / name]
        if step.command == "ptq":
            files += [file.with_suffix(".onnx") for file in files]
        known, exists = done.get(name, {}), all(file.exists() for file in files)
        report = known.get("report") if known.get("key") == key and exists and not overwrite else None
        if report is None:
            tell(f"[{number}/{len(todo)}] {shell(step, folder)}")
            ours = overwrite or name in done  # a file of the recipe's own, which it may replace
            goes_on = not overwrite and known.get("key") == key and any(resume_state(file).exists() for file in files)
            for other in done.values():
                if output is not None and other["source"] == output:
                    other["report"] = None  # made from a file that is about to change
            entry = {"key": key, "source": step.options.get("source"), "report": None}
            if ours or not exists:
                done[name] = entry
                _record(record, done)
            more = ["--resume"] if goes_on else ["--overwrite"] if ours and output is not None else []
            made = invoke([*step.arguments(folder), *more, "--json"])
            report = json.loads(json.dumps(made, default=str))
            done[name] = {**entry, "report": report}
            _record(record, done)
        results.append({"command": step.command, "values": step.values, "report": report})
    return results


@dataclass(frozen=True)
class Table:
    """Rows of text by column, in the order of the steps."""

    title: str
    rows: Sequence[Mapping[str, str]]

    def markdown(self) -> str:
        head = list(self.rows[0]) if self.rows else []
        lines = [f"**{self.title}**", "", _line(head), "|---" * len(head) + "|"]
        return "\n".join([*lines, *(_line(row.values()) for row in self.rows), ""])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables(recipe: Recipe, results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The recipe's tables. Raises InputError for a metric that no report has."""
    return [Table(table.get("title", ""), _rows(recipe, table, results)) for table in recipe.tables]


def _rows(recipe: Recipe, table: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    _require_complete(recipe, table)
    names, column = table["rows"], table.get("column")
    needed = {*names, *([column] if column else [])}
    cells: dict[tuple[str, ...], dict[str, list[Any]]] = {}
    for result in results:
        if result["command"] != table["run"] or not needed <= result["values"].keys():
            continue
        row = tuple(_label(result["values"][name]) for name in names)
        for title, metric in table["metrics"].items():
            if metric not in result["report"]:
                raise unknown(f"metric of {recipe.path}", metric, result["report"])
            head = title if column is None else f"{_label(result['values'][column])} {title}".strip()
            cells.setdefault(row, {}).setdefault(head, []).append(result["report"][metric])
    heads = list(dict.fromkeys(head for own in cells.values() for head in own))
    return [
        dict(zip(names, row, strict=True)) | {head: _cell(own[head]) if head in own else "-" for head in heads}
        for row, own in cells.items()
    ]


def _cell(values: Sequence[Any]) -> str:
    """One value, or the mean of several with their least and greatest."""
    if not all(isinstance(value, int | float) for value in values):
        return ", ".join(dict.fromkeys(map(str, values)))
    shape = ".0f" if all(isinstance(value, int) for value in values) else ".2f"
    if len(values) == 1:
        return f"{values[0]:,{shape}}"
    return f"{mean(values):,{shape}} [{min(values):,{shape}}-{max(values):,{shape}}]"


def _label(value: Any) -> str:
    return str(value.get("name", value)) if isinstance(value, Mapping) else str(value)


def _fill(value: Any, values: Mapping[str, Any]) -> Any:
    """`value` with its placeholders filled; a text that is one placeholder takes the type of what fills it."""
    if isinstance(value, list):
        return [_fill(item, values) for item in value]
    if not isinstance(value, str):
        return value
    whole = PLACEHOLDER.fullmatch(value)
    if whole:
        return _look_up(whole[1], values)

    def text(match: re.Match[str]) -> str:
        found = _look_up(match[1], values)
        if found is None:
            raise InputError(f"'{value}' has nothing to put for {match[0]}: give every value of the matrix that key")
        return _label(found)

    return PLACEHOLDER.sub(text, value)


def _look_up(path: str, values: Mapping[str, Any]) -> Any:
    """The value of `name` or of `name.key`; None, which leaves the option out, for a key that its table lacks."""
    name, _, key = path.partition(".")
    if key and not isinstance(values[name], Mapping):
        raise InputError(f"{{{path}}} asks for a key of '{values[name]}', which is not a table")
    return values[name].get(key) if key else values[name]


def _recorded(record: Path) -> dict[str, Any]:
    try:
        return {
            str(name): {**entry, "key": entry["key"], "source": entry["source"]}
            for name, entry in json.loads(record.read_text()).items()
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def _record(record: Path, done: Mapping[str, Any]) -> None:
    write_atomically(record, json.dumps(done, indent=1).encode())
