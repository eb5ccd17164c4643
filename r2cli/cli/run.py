"""`r2 run`: run the steps of a recipe, in order or side by side, and print its tables."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from r2cli import console
from r2cli.cli import interrupt
from r2cli.cli.command import Report, command
from r2cli.cli.outcome import UsageError
from r2cli.config.groups import Written
from r2cli.config.inspection import RecipeConfig
from r2cli.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from r2cli.workflow import recipe as recipes
    from r2cli.workflow import results
    from r2cli.workflow import runner as worker


@command
def run(context: typer.Context, config: RecipeConfig, written: Written) -> Report:
    """Run a recipe's commands and print its tables; what was done with the same options is not done again."""
    from r2cli.storage import atomic
    from r2cli.workflow import recipe as recipes
    from r2cli.workflow import results
    from r2cli.workflow import runner as worker
    from r2cli.workflow import smoke as trial

    path = recipes.find(config.recipe)
    read = recipes.override(recipes.load(path), config.set)
    root = context.find_root()
    _require_options(recipes.steps(read), root.command)
    invoke = root.obj
    folder = config.work_dir or _folder(path, smoke=config.smoke)
    missing = trial.missing(read) if config.smoke else None
    if missing:
        console.tell([f"{path}: {missing}"], as_json=written.json)
        return {"command": "run", "recipe": path, "skipped": missing}
    if config.smoke:
        read = trial.reduced(read)
    todo = recipes.steps(read)
    recipes.require_data(todo)
    if config.smoke:
        todo, replaced = trial.small(todo, folder)
        console.note(f"smoke, whose numbers mean nothing: {'; '.join(replaced)}")
    todo = recipes.only(todo, config.only) if config.only else todo
    if written.dry_run:
        lines = [recipes.shell(step, folder) for step in todo]
        console.tell(lines, as_json=written.json)
        return {"command": "run", "steps": lines}
    recipes.require_files(todo, folder)
    started: list[int] = []

    def start(number: int, arguments: list[str]) -> "worker.Job":
        started.append(number)
        if config.jobs == 1:
            return worker.InThisProcess(invoke, arguments)
        return worker.InOwnProcess(arguments, worker.threads_each(config.jobs), worker.log_of(folder, number))

    lock = atomic.locked(folder / "results.json", way_out="another --work-dir")
    with _interruptible(config.jobs, _goes_on(folder, written)), lock:
        if config.smoke:
            trial.provide(todo, folder)
        done = worker.execute(
            todo, folder, start, console.note, overwrite=written.overwrite, resume=config.resume, jobs=config.jobs
        )
        tables = results.tables(read, done)
        first = _write(tables, [list(table["metrics"]) for table in read.tables], folder)
    report = {
        "command": "run",
        "recipe": path,
        "folder": folder,
        "tables": [table.__dict__ for table in tables],
        "results": done,
        "finished_before": not started,
    }
    told = f"{folder} has the files, {first} the tables, with .csv, .json and .png beside it"
    console.tell([*([] if started else [_done(len(done), config)]), *_shown(tables), told], as_json=written.json)
    _require_passed(report)
    return report


def _goes_on(folder: Path, written: Written) -> str:
    """What is said of a run that is stopped."""
    return f"{folder} keeps what is done: the same line{', without --overwrite,' * written.overwrite} goes on"


def _done(count: int, config: RecipeConfig) -> str:
    """What is said where no step had to run."""
    same = "with the same options, and their files are as they were written" if config.resume else "before"
    return f"all {count} steps were done {same}"


def _require_passed(report: Report) -> None:
    """Raises CheckFailed, naming the first, where a gate or proof of a step failed."""
    done = report["results"]
    failed = [each["failed"] for each in done if each["failed"]]
    if failed:
        rest = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise CheckFailed(f"{len(failed)} of {len(done)} steps failed a check: {failed[0]}{rest}", report)


def _shown(tables: "Sequence[results.Table]") -> list[console.Line]:
    """The tables with their titles and what failed, those without rows left out."""
    from r2cli.workflow import results

    shown: list[console.Line] = []
    for table in (table for table in tables if table.rows):
        shown += [table.title, console.table(tuple(table.rows[0]), [tuple(row.values()) for row in table.rows])]
        shown += [f"{results.DAGGER} {failure}" for failure in table.failures]
    return shown


def _folder(path: Path, *, smoke: bool) -> Path:
    """Return the folder for the files of the recipe at `path`: runs/NAME, for example runs/cpu/digits."""
    from r2cli.workflow import recipe as recipes

    name = next((name for name, own in recipes.shipped().items() if own.samefile(path)), path.stem)
    return Path("runs") / (f"{name}-smoke" if smoke else name)


def _write(tables: "Sequence[results.Table]", metrics: Sequence[Sequence[str]], folder: Path) -> Path:
    """The tables as tables.md, .csv, .json and .png in `folder`; the first of them. `metrics` are each table's."""
    from r2cli.analysis import plots
    from r2cli.storage.atomic import write_atomically
    from r2cli.workflow import results

    written = folder / "tables.md"
    write_atomically(written, "\n".join(table.markdown() for table in tables).encode())
    write_atomically(written.with_suffix(".csv"), results.as_csv(tables).encode())
    told = [{"title": table.title, "records": table.records} for table in tables]
    write_atomically(written.with_suffix(".json"), dumps(told, indent=1, default=str).encode())
    drawn = plots.tables([(one.title, own, one.records) for one, own in zip(tables, metrics, strict=True)])
    if drawn is not None:
        write_atomically(written.with_suffix(".png"), drawn)
    return written


@contextmanager
def _interruptible(jobs: int, words: str) -> Iterator[None]:
    """Let a request to end (SIGTERM) stop the block as Ctrl-C does, and either stop the steps' own processes first.

    Then `words` are told.
    """
    pressed = signal.getsignal(signal.SIGINT)
    if pressed == signal.SIG_IGN:  # as in the background of a script: Ctrl-C is for others, a request to end is not
        pressed = signal.default_int_handler
    before = signal.signal(signal.SIGTERM, pressed)
    try:
        with interrupt.raised() if jobs > 1 else interrupt.telling(lambda: words):
            yield
    except KeyboardInterrupt:
        console.note(words)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_options(steps: "Sequence[recipes.Step]", commands: Any) -> None:
    """Raise InputError for options that a step's command would refuse, before any work is done, naming their place."""
    for step in steps:
        command = commands.commands[step.command]
        flags = {name: flag for flag in command.params for name in (*flag.opts, *flag.secondary_opts)}
        for key, value in step.options.items():
            if value is False and key != "source":
                option = flags.get(f"--{key}")
                if option is not None and option.default is not False:
                    raise InputError(
                        step.blame(f"--{key} cannot be false: write {_opposite(option, key)} or leave it out")
                    )
        arguments = step.arguments(Path()) + [f"--{key}" for key, value in step.options.items() if value is False]
        try:
            command.make_context(f"r2 {step.command}", arguments[1:])
        except UsageError as error:
            raise InputError(step.blame(f"{error.format_message()} Try `r2 {step.command} --help`.")) from error
        except InputError as error:
            raise InputError(step.blame(str(error))) from error
        except typer.Exit as error:
            raise InputError(step.blame("--help is no option of a step: see it on the command line")) from error


def _opposite(option: Any, key: str) -> str:
    """Return how a recipe says the opposite of a flag: by its other name."""
    other = next((name for name in (*option.opts, *option.secondary_opts) if name != f"--{key}"), "")
    return f"{other.removeprefix('--')} = true" if other else "its value"
