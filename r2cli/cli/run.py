"""`r2 run`: the steps of a recipe, in order, and its table."""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer

from r2cli import console
from r2cli.options import DryRun, Json, Overwrite, _option


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, recipes/*.toml.")],
    work_dir: Annotated[
        Path | None,
        _option("--work-dir", help="Where the steps' files go. [default: runs/RECIPE]", panel="Output"),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> dict[str, Any]:
    """Run a recipe's commands in order and print its tables; what was done with the same options is not done again."""
    from r2cli import recipe as worker
    from r2cli.cli import invoke

    read = worker.load(recipe)
    folder = work_dir or Path("runs") / recipe.stem
    steps = worker.steps(read)
    if dry_run:
        lines = [worker.shell(step, folder) for step in steps]
        console.emit({"command": "run", "steps": lines}, as_json=json, lines=lines)
        return {"steps": lines}

    def quietly(arguments: list[str]) -> Any:
        with redirect_stdout(StringIO()):
            return invoke(arguments)

    results = worker.execute(steps, folder, quietly, console.note, overwrite=overwrite)
    tables = worker.tables(read, results)
    report = {"command": "run", "recipe": recipe, "folder": folder, "tables": tables, "results": results}
    shown = [console.table(tuple(rows[0]), [tuple(row.values()) for row in rows]) for rows in tables if rows]
    console.emit(report, as_json=json, lines=[*shown, f"files in {folder}"])
    return report
