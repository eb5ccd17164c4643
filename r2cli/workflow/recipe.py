"""Recipes: a TOML file with commands of `r2`, a matrix of values to run them with, and tables of their results.

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

The keys of a step are the options of its command; `source`, `output` and `card` are files in the folder of the run. A
value of the matrix may be a TOML table: then `{pre.reg}` is its key `reg`, and its `name` is shown in tables. A table
averages over the variables that it does not list, for example over seeds. Where what is measured is not top-1,
`"{metric}" = "metric.value"` is a column with the metric's own name and unit.
"""

import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from math import prod
from os.path import normpath
from pathlib import Path
from typing import Any

from r2cli.errors import InputError, unknown
from r2cli.storage import schema
from r2cli.storage.schema import Malformed

READ_DATA = ("ptq", "qat", "palettize", "evaluate")  # commands that look at images, or at another network's outputs
PLACEHOLDER = re.compile(r"\{([\w.-]+)\}")
KEY = re.compile(r"""\s*["']?([\w-]+)["']?\s*=""")
COMMANDS = ("pretrain", "analyze", "ptq", "qat", "palettize", "export", "evaluate")
FILES = ("source", "output", "card")
MOST_STEPS = 10_000  # that one [[step]] may stand for
HEAD = ""  # the key under which `lines` has the line of [[step]] itself


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe file. `lines` has the line number of each key of each step, from 1."""

    path: Path
    matrix: Mapping[str, Sequence[Any]]
    steps: Sequence[Mapping[str, Any]]
    tables: Sequence[Mapping[str, Any]]
    lines: Sequence[Mapping[str, int]] = ()


@dataclass(frozen=True)
class TableEntry:
    """A [[table]]."""

    run: str
    rows: tuple[str, ...]
    metrics: Mapping[str, str]
    column: str | None = None
    title: str = ""


@dataclass(frozen=True)
class Step:
    """One command to run, its values of the matrix, and the places `FILE:LINE` of its keys, for messages."""

    command: str
    options: Mapping[str, Any]
    values: Mapping[str, Any]
    places: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, folder: Path) -> list[str]:
        """Return the command line after `r2`."""
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
        """Put the place that `message` is about before it.

        That is the option that it names, or else the option whose value it quotes, or else the step.
        """
        named = [key for key in self.options if re.search(rf"--{re.escape(key)}(?![\w-])", message)]
        quoted = [key for key, value in self.options.items() if f"'{value}'" in message]
        place = next((self.places[key] for key in [*named, *quoted, HEAD] if key in self.places), None)
        output = f" -> {self.options['output']}" if "output" in self.options else ""
        return f"{f'{place}: ' if place else ''}r2 {self.command}{output}: {message}"


def shipped() -> dict[str, Path]:
    """Return the recipes that come with r2, by name, such as `quickstart` or `cpu/digits`."""
    package = Path(__file__).parent.parent
    inside = package / "recipes"  # in an installed package; a checkout has them beside the package
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return {str(path.relative_to(folder).with_suffix("").as_posix()): path for path in sorted(folder.rglob("*.toml"))}


def find(name: str) -> Path:
    """Return the path of the recipe `name`: a file, or a recipe that comes with r2. Raises InputError for neither."""
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
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, text that is not UTF-8, a number of 5,000 digits
        raise InputError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
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
    """Return the line of every key of every [[step]], from 1. Python's TOML reader does not give line numbers."""
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
    """Raise InputError for a matrix without lists, a step without a command, or a value that no option can have."""
    path, matrix = recipe.path, recipe.matrix
    if not isinstance(matrix, dict) or not all(isinstance(values, list) and values for values in matrix.values()):
        raise InputError(f"{path}: [matrix] wants a list of values for every variable, for example bits = [8, 4]")
    for name, values in matrix.items():
        parts = [part for value in values for part in (value.values() if isinstance(value, dict) else [value])]
        if not all(map(_is_option, parts)):
            raise InputError(f"{path}: {name} in [matrix] wants numbers, texts, or tables of these, for each value")
    if not _are_tables(recipe.steps) or not recipe.steps:
        raise InputError(f"{path} has no [[step]]: give it at least one, with run = 'pretrain' or another command")
    if not _are_tables(recipe.tables):
        raise InputError(f"{path}: a table is written [[table]], with run, rows and metrics")
    for step in recipe.steps:
        if step.get("run") not in COMMANDS:
            raise unknown(f"command of a step in {path}", str(step.get("run")), COMMANDS)
        for key, value in step.items():
            if not _is_option(value) if key not in FILES else not (isinstance(value, str) and _is_option(value)):
                raise InputError(f"{path}: {key} = {value} is not a value that an option takes: put it in quotes")


def _is_option(value: Any) -> bool:
    """Whether an option takes a value: text, which no NUL ends, or a number; or a list of these."""
    if isinstance(value, list):
        return all(_is_option(item) and not isinstance(item, list) for item in value)
    return "\0" not in value if isinstance(value, str) else isinstance(value, int | float)


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def require_complete(recipe: Recipe, table: Mapping[str, Any]) -> None:
    """Raise InputError for a [[table]] that lacks a key or names an unknown variable, before any work is done."""
    try:
        schema.read(TableEntry, table)
    except Malformed as error:
        raise InputError(
            f'{recipe.path}: a [[table]] wants run, rows and metrics = {{ top1 = "metric.value" }}: {error}'
        ) from error
    for name in _variables(table):
        if not isinstance(name, str) or (recipe.matrix and name not in recipe.matrix):
            raise unknown(f"variable of {recipe.path}", str(name), recipe.matrix)


def _require_filled(recipe: Recipe) -> None:
    """Raise InputError for a [[table]] that no step can fill, before any work is done."""
    for table in recipe.tables:
        mentioned = [_mentioned(step) for step in recipe.steps if step.get("run") == table["run"]]
        if not mentioned:
            raise InputError(f"{recipe.path}: a [[table]] of {table['run']}, and no step runs that")
        if not any(variables.issuperset(_variables(table)) for variables in mentioned):
            listed = ", ".join(_variables(table))
            raise InputError(
                f"{recipe.path}: a [[table]] by {listed}, and no {table['run']} step has them in its options"
            )


def _variables(table: Mapping[str, Any]) -> list[Any]:
    """Return the variables of the rows and columns of a [[table]]."""
    return [*table["rows"], *([table["column"]] if "column" in table else [])]


def _mentioned(options: Mapping[str, Any]) -> set[str]:
    """Return the variables that are used in the values of options."""
    return {name.split(".")[0] for name in PLACEHOLDER.findall(json.dumps(options, default=str))}


def steps(recipe: Recipe) -> list[Step]:
    """Return every command of the recipe, in order. Raises InputError for a variable that the matrix does not have."""
    out = []
    for number, step in enumerate(recipe.steps):
        options = {key: value for key, value in step.items() if key != "run"}
        lines = recipe.lines[number] if len(recipe.lines) == len(recipe.steps) else {}  # inline tables have no lines
        places = {key: f"{recipe.path}:{line}" for key, line in lines.items()}
        mentioned = _mentioned(options)
        for name in mentioned:
            if name not in recipe.matrix:
                raise unknown(f"variable of {recipe.path}", name, recipe.matrix)
        variables = [name for name in recipe.matrix if name in mentioned]
        count = prod(len(recipe.matrix[name]) for name in variables)
        if count > MOST_STEPS:
            raise InputError(f"{recipe.path}: a [[step]] stands for {count:,} commands: give {MOST_STEPS:,} at most")
        for chosen in itertools.product(*(recipe.matrix[name] for name in variables)):
            values = dict(zip(variables, chosen, strict=True))
            try:
                filled = {key: _fill(value, values) for key, value in options.items()}
            except InputError as error:
                raise InputError(f"{recipe.path}: {error}") from error
            out.append(Step(step["run"], {k: v for k, v in filled.items() if v is not None}, values, places))
    return out


def shell(step: Step, folder: Path) -> str:
    """Return the step as a line for a shell."""
    return shlex.join(["r2", *step.arguments(folder)])


def reads_from(step: Step, earlier: Step) -> bool:
    """Say whether `step` reads the checkpoint that `earlier` writes, or the ONNX file beside it."""
    source, output = step.options.get("source"), earlier.options.get("output")
    return None not in (source, output) and _stem(source) == _stem(output)


def require_data(todo: Sequence[Step]) -> None:
    """Raises InputError for a step that does not say where its data is, where its source cannot say it either.

    No checkpoint records the path of its data: such a step would stop after hours of the steps before it.
    """
    from r2cli.data import NOT_RECORDED  # torch comes with it, and `r2 recipe` does without

    for step in todo:
        made = next((earlier for earlier in todo if reads_from(step, earlier)), None)
        kind = "" if made is None else str(made.options.get("data", "")).partition(":")[0]
        if step.command in READ_DATA and "data" not in step.options and kind in NOT_RECORDED:
            told = f"{step.options['source']} does not record where its {kind} is: give data here"
            raise InputError(step.blame(told))


def require_files(todo: Sequence[Step], folder: Path) -> None:
    """Raise InputError for a source that is neither there nor written before, and for an output of two steps."""
    outputs, stems = set[Any](), set[str]()
    for step in todo:
        source, output = (step.options.get(key) for key in ("source", "output"))
        if output is not None and output in outputs:
            raise InputError(step.blame(f"a step before writes '{output}' too: give each step its own"))
        # The folder may not be there yet, so `..` is taken out first. A step without an output chooses its own name.
        made = source is None or None in outputs or _stem(source) in stems
        if not made and not Path(normpath(folder / str(source))).exists():
            raise InputError(step.blame(f"'{source}' is not in {folder}, and no step before writes it"))
        outputs.add(output)
        stems.add(_stem(output))


def _stem(name: Any) -> str:
    return re.sub(r"\.(safetensors|onnx|tflite)$", "", normpath(str(name)))


def only(todo: Sequence[Step], pattern: str) -> list[Step]:
    """Return the steps whose output matches `pattern` or whose command line contains it, with the steps that they need.

    Raises InputError where there is none.
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
    """Return `recipe` with other values.

        KEY=VALUE            in every step that has the key
        COMMAND.KEY=VALUE    in all steps of a command
        matrix.NAME=VALUE    for a variable of the matrix

    VALUE is TOML or plain text. Raises InputError for another form, and for an unknown key or variable.
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
            keys = {f"{step['run']}.{option}" if scope else option for step in recipe.steps for option in step}
            error = unknown(f"option of the steps of {recipe.path}", key, keys)
            raise InputError(f"{error}; COMMAND.{name}=VALUE, as ptq.{name}, gives it to all steps of a command")
        steps = [{**step, name: _parsed(value)} if n in touched else step for n, step in enumerate(recipe.steps)]
        lines = [
            {k: line for k, line in lines.items() if k != name or n not in touched}
            for n, lines in enumerate(recipe.lines)
        ]
        recipe = replace(recipe, steps=steps, lines=lines)
    _require_shapes(recipe)
    _require_filled(recipe)
    return recipe


def _parsed(text: str) -> Any:
    """Read a value as TOML, or take it as plain text: quotes are hard to type in a shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def _chosen(values: Sequence[Any], chosen: Any) -> list[Any]:
    """Return `chosen` as a list of values of a variable. A name of one of `values` stands for that value."""
    named = {label(value): value for value in values}
    return [named.get(label(value), value) for value in (chosen if isinstance(chosen, list) else [chosen])]


def label(value: Any) -> str:
    """Return the name of a value of the matrix."""
    return str(value.get("name", value)) if isinstance(value, Mapping) else str(value)


def _fill(value: Any, values: Mapping[str, Any]) -> Any:
    """Fill the placeholders in `value`. A text that is only a placeholder becomes the value itself, with its type."""
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
            raise InputError(f"'{value}' has no value for {match[0]}: give every value of the matrix that key")
        return label(found)

    return PLACEHOLDER.sub(text, value)


def _look_up(path: str, values: Mapping[str, Any]) -> Any:
    """Return the value of `name` or `name.key`. None, for a key that its table lacks, leaves the option out."""
    name, _, key = path.partition(".")
    if key and not isinstance(values[name], Mapping):
        raise InputError(f"{{{path}}} asks for a key of '{values[name]}', which is not a table")
    return values[name].get(key) if key else values[name]
