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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from r2cli.errors import InputError, unknown

PLACEHOLDER = re.compile(r"\{([\w.-]+)\}")
KEY = re.compile(r"""\s*["']?([\w-]+)["']?\s*=""")
COMMANDS = ("pretrain", "analyze", "ptq", "qat", "palettize", "export", "evaluate")
FILES = ("source", "output")
HEAD = ""  # under this key `lines` has the line of a step's own head


@dataclass(frozen=True)
class Recipe:
    """What the file says; `lines` has, for every step, the line of each key, counted from 1."""

    path: Path
    matrix: Mapping[str, Sequence[Any]]
    steps: Sequence[Mapping[str, Any]]
    tables: Sequence[Mapping[str, Any]]
    lines: Sequence[Mapping[str, int]] = ()


@dataclass(frozen=True)
class Step:
    """One command to run, the matrix values that it was made for, and where it stands: `FILE:LINE` of every key."""

    command: str
    options: Mapping[str, Any]
    values: Mapping[str, Any]
    places: Mapping[str, str] = field(default_factory=dict)

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

    def blame(self, message: str) -> str:
        """`message` behind the place that it is about: the option that it names, the value in quotes, or the step."""
        named = [key for key in self.options if re.search(rf"--{re.escape(key)}(?![\w-])", message)]
        quoted = [key for key, value in self.options.items() if f"'{value}'" in message]
        place = next((self.places[key] for key in [*named, *quoted, HEAD] if key in self.places), None)
        output = f" -> {self.options['output']}" if "output" in self.options else ""
        return f"{f'{place}: ' if place else ''}r2 {self.command}{output}: {message}"


def shipped() -> dict[str, Path]:
    """The recipes that come with r2, by name: `quickstart`, `cpu/digits`."""
    inside = Path(__file__).with_name("recipes")  # of an installed package; in a checkout they stand beside it
    folder = inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"
    return {str(path.relative_to(folder).with_suffix("").as_posix()): path for path in sorted(folder.rglob("*.toml"))}


def find(name: str) -> Path:
    """The recipe at the path `name`, or the shipped one of that name. Raises InputError where there is neither."""
    path, known = Path(name), shipped()
    short = path.as_posix().removeprefix("recipes/").removesuffix(".toml")
    if path.is_file() or (path.exists() and short not in known):
        return path
    if short not in known:
        error = unknown("recipe", short, known)
        raise InputError(f"{name} does not exist: give a file, or the name of a shipped recipe ({error})")
    return known[short]


def load(path: Path) -> Recipe:
    """Read a recipe. Raises InputError for a missing or malformed one."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: name a recipe, for example quickstart, or see `r2 recipe ls`")
    try:
        text = path.read_text()
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    for key in content:
        if key not in ("matrix", "step", "table"):
            raise unknown(f"key in {path}", key, ("matrix", "step", "table"))
    matrix, steps, tables = content.get("matrix", {}), content.get("step", []), content.get("table", [])
    recipe = Recipe(path, matrix, steps, tables, _lines(text))
    _require_shapes(recipe)
    for table in recipe.tables:
        require_complete(recipe, table)
    _require_filled(recipe)
    return recipe


def _lines(text: str) -> list[dict[str, int]]:
    """The line of every key of every [[step]], counted from 1: a reader of TOML forgets where it read."""
    steps: list[dict[str, int]] = []
    inside = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("["):
            inside = re.match(r"\s*\[\[\s*step\s*\]\]", line) is not None
            if inside:
                steps.append({HEAD: number})
        elif inside and (key := KEY.match(line)):
            steps[-1].setdefault(key[1], number)
    return steps


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


def require_complete(recipe: Recipe, table: Mapping[str, Any]) -> None:
    """Raises InputError, before any work is done, for a [[table]] that lacks a key or names no variable."""
    for key, kind in (("run", str), ("rows", list), ("metrics", dict)):
        if not isinstance(table.get(key), kind):
            raise InputError(f"{recipe.path}: a [[table]] wants {key}, as {kind.__name__}")
    for name in _variables(table):
        if not isinstance(name, str) or (recipe.matrix and name not in recipe.matrix):
            raise unknown(f"variable of {recipe.path}", str(name), recipe.matrix)


def _require_filled(recipe: Recipe) -> None:
    """Raises InputError, before any work is done, for a [[table]] that no step can fill."""
    for table in recipe.tables:
        own = [_mentioned(step) for step in recipe.steps if step.get("run") == table["run"]]
        if not own:
            raise InputError(f"{recipe.path}: a [[table]] of {table['run']}, and no step runs that")
        if not any(each.issuperset(_variables(table)) for each in own):
            listed = ", ".join(_variables(table))
            raise InputError(
                f"{recipe.path}: a [[table]] by {listed}, and no {table['run']} step has them in its options"
            )


def _variables(table: Mapping[str, Any]) -> list[Any]:
    """The variables of a [[table]]'s rows and columns."""
    return [*table["rows"], *([table["column"]] if "column" in table else [])]


def _mentioned(options: Mapping[str, Any]) -> set[str]:
    """The variables that options have in them."""
    return {name.split(".")[0] for name in PLACEHOLDER.findall(json.dumps(options, default=str))}


def steps(recipe: Recipe) -> list[Step]:
    """Every command of the recipe, in order. Raises InputError for a variable that the matrix does not have."""
    out = []
    for number, step in enumerate(recipe.steps):
        options = {key: value for key, value in step.items() if key != "run"}
        lines = recipe.lines[number] if len(recipe.lines) == len(recipe.steps) else {}  # not for steps written inline
        places = {key: f"{recipe.path}:{line}" for key, line in lines.items()}
        mentioned = _mentioned(options)
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
            out.append(Step(step["run"], {k: v for k, v in filled.items() if v is not None}, values, places))
    return out


def shell(step: Step, folder: Path) -> str:
    """The step as a line for a shell."""
    return shlex.join(["r2", *step.arguments(folder)])


def reads_from(step: Step, earlier: Step) -> bool:
    """Whether `step` reads what `earlier` writes: its checkpoint, or the ONNX file beside that."""
    source, output = step.options.get("source"), earlier.options.get("output")
    return None not in (source, output) and _stem(source) == _stem(output)


def _stem(name: Any) -> str:
    return re.sub(r"\.(safetensors|onnx)$", "", str(name))


def only(todo: Sequence[Step], pattern: str) -> list[Step]:
    """The steps whose output matches `pattern`, or whose command line has it in it, and those that these read from.

    Raises InputError where no step does.
    """
    wanted = {
        number
        for number, step in enumerate(todo)
        if fnmatch(str(step.options.get("output", "")), pattern) or pattern in shell(step, Path())
    }
    if not wanted:
        raise InputError(f"--only {pattern} matches none of the {len(todo)} steps: --dry-run prints them")
    for number in reversed(range(len(todo))):
        wanted |= {before for before in range(number) if number in wanted and reads_from(todo[number], todo[before])}
    return [todo[number] for number in sorted(wanted)]


def override(recipe: Recipe, texts: Iterable[str]) -> Recipe:
    """`recipe` with `KEY=VALUE` in every step that has the key, `COMMAND.KEY=VALUE` in all steps of a command, and
    `matrix.NAME=VALUE` for a variable; VALUE as TOML writes it, or plain text.

    Raises InputError for a text of another form, and for a key that no step, or a variable that the matrix, has.
    """
    for text in texts:
        key, sign, value = text.partition("=")
        scope, _, name = key.rpartition(".")
        if not sign or not name:
            raise InputError(f"--set {text} is not KEY=VALUE, for example --set epochs=1 or --set matrix.seed=0")
        if scope == "matrix":
            if name not in recipe.matrix:
                raise unknown(f"variable of {recipe.path}", name, recipe.matrix)
            recipe = replace(recipe, matrix={**recipe.matrix, name: _chosen(recipe.matrix[name], _parsed(value))})
            continue
        touched = [n for n, step in enumerate(recipe.steps) if (step["run"] == scope if scope else name in step)]
        if name in ("run", *FILES):
            raise InputError(f"--set {text} would make all steps the same: change {name} in the recipe")
        if not touched:
            keys = {f"{step['run']}.{own}" if scope else own for step in recipe.steps for own in step}
            error = unknown(f"option of the steps of {recipe.path}", key, keys)
            raise InputError(f"{error}; COMMAND.{name}=VALUE, as ptq.{name}, gives it to all steps of a command")
        steps = [{**step, name: _parsed(value)} if n in touched else step for n, step in enumerate(recipe.steps)]
        lines = [
            {k: at for k, at in own.items() if k != name or n not in touched} for n, own in enumerate(recipe.lines)
        ]
        recipe = replace(recipe, steps=steps, lines=lines)
    _require_shapes(recipe)
    _require_filled(recipe)
    return recipe


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def _chosen(there: Sequence[Any], value: Any) -> list[Any]:
    """`value` as a list of a variable's values; one that is called as a value of the recipe is that value."""
    named = {label(own): own for own in there}
    return [named.get(label(own), own) for own in (value if isinstance(value, list) else [value])]


def label(value: Any) -> str:
    """What a value of the matrix is called."""
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
        return label(found)

    return PLACEHOLDER.sub(text, value)


def _look_up(path: str, values: Mapping[str, Any]) -> Any:
    """The value of `name` or of `name.key`; None, which leaves the option out, for a key that its table lacks."""
    name, _, key = path.partition(".")
    if key and not isinstance(values[name], Mapping):
        raise InputError(f"{{{path}}} asks for a key of '{values[name]}', which is not a table")
    return values[name].get(key) if key else values[name]
