"""`r2 recipe`: the recipes that come with r2."""

from pathlib import Path
from typing import Annotated, Any

import typer

from r2cli import console
from r2cli.cli import gates
from r2cli.config.option import OUTPUT
from r2cli.errors import InputError, unknown

recipe = typer.Typer(
    help="List, show and copy the recipes that come with r2; `r2 run NAME` runs one.", no_args_is_help=True
)
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.", rich_help_panel=OUTPUT)]
Name = Annotated[str, typer.Argument(help="As `r2 recipe ls` lists it: cpu/digits, for example.")]


@recipe.command("ls")
def ls(json: Json = False) -> dict[str, Any]:
    """List the shipped recipes, a line each."""
    from r2cli.workflow import recipe as recipes

    found = [{"name": name, "about": _about(path), "path": path} for name, path in recipes.shipped().items()]
    rows = [(own["name"], own["about"]) for own in found]
    report = {"command": "recipe ls", "recipes": found}
    console.tell([console.table(("recipe", "what it is"), rows), "next: r2 run quickstart"], as_json=json)
    return report


@recipe.command("show")
def show(name: Name, json: Json = False) -> dict[str, Any]:
    """Print a shipped recipe."""
    path = _shipped(name)
    report = {"command": "recipe show", "name": name, "path": path, "text": path.read_text(encoding="utf-8")}
    console.tell([path.read_text(encoding="utf-8").rstrip("\n")], as_json=json)
    return report


@recipe.command("cp")
def cp(
    name: Name,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A file, or a folder.")] = Path("."),
    overwrite: Overwrite = False,
    json: Json = False,
) -> dict[str, Any]:
    """Copy a shipped recipe, to change it."""
    from r2cli.storage.atomic import write_atomically

    path = _shipped(name)
    target = destination / path.name if destination.is_dir() else destination
    if target.suffix != ".toml":
        raise InputError(f"{target} must end in .toml, or be a folder that is there")
    gates.require_free([target], overwrite=overwrite)
    write_atomically(target, path.read_bytes())
    report = {"command": "recipe cp", "name": name, "path": path, "output": target}
    console.tell([f"{target} is {name}", console.next_step("r2", "run", target)], as_json=json)
    return report


def _shipped(name: str) -> Path:
    """Return the path of the shipped recipe `name`. Raises InputError for an unknown name."""
    from r2cli.workflow import recipe as recipes

    known = recipes.shipped()
    short = name.removeprefix("recipes/").removesuffix(".toml")
    if short not in known:
        raise unknown("recipe", name, known)
    return known[short]


def _about(path: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines).split(". ")[0].rstrip(".")
