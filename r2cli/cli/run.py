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
        _option("--work-dir", help="Where the steps' files go. (default: runs/RECIPE)", panel="Output"),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> dict[str, Any]:
    """Run a recipe's commands in order and print its tables; what was done with the same options is not done again."""
    from r2cli import recipe as worker
    from r2cli.checkpoint import write_atomically
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
    written = folder / "tables.md"
    write_atomically(written, "\n".join(table.markdown() for table in tables).encode())
    report = {
        "command": "run",
        "recipe": recipe,
        "folder": folder,
        "tables": [table.__dict__ for table in tables],
        "results": results,
    }
    shown: list[Any] = []
    for table in (table for table in tables if table.rows):
        shown += [table.title, console.table(tuple(table.rows[0]), [tuple(row.values()) for row in table.rows])]
    console.emit(report, as_json=json, lines=[*shown, f"{folder} has the files, {written} the tables"])
    return report
