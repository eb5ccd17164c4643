"""The command line: it parses, calls one worker, and gives the result to the console.

torch is imported inside the commands, so that `r2 --help` is fast.
"""

import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from typing import Any, NoReturn

import typer

from r2cli import __version__, console
from r2cli.cli import (
    analyze,
    evaluate,
    export,
    interrupt,
    palettize,
    pretrain,
    prove,
    ptq,
    qat,
    recipes,
    run,
    target_list,
)
from r2cli.cli.command import UsageError
from r2cli.errors import InputError, R2Error

app = typer.Typer(
    name="r2",
    help="From a PyTorch network to a deployable integer ONNX model, with range regularization.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Start with: r2 pretrain --reg margin",
)
app.command()(pretrain.pretrain)
app.command()(analyze.analyze)
app.command()(ptq.ptq)
app.command()(qat.qat)
app.command()(palettize.palettize)
app.command()(export.export)
app.command()(evaluate.evaluate)
app.command()(prove.verify)
app.command()(run.run)
app.command("targets")(target_list.list_targets)
app.add_typer(recipes.recipe, name="recipe")

SPINS = "10000"  # how often a waiting thread of torch looks for work before it sleeps; the default is 300,000 times
TRAINING = ("pretrain", "palettize", "qat")  # the commands that torchrun may start in several processes


def _version(value: bool) -> None:
    """Print the version and exit, if `value` says so."""
    if value:
        typer.echo(f"r2 {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    context.obj = invoke  # `r2 run` calls it for its steps, which are commands
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and context.invoked_subcommand not in TRAINING:
        raise InputError(f"r2 {context.invoked_subcommand} runs in one process: start it without torchrun")


def invoke(arguments: list[str]) -> Any:
    """Run one command and return its report. Raises R2Error, or the parser's error, instead of exiting."""
    result = app(arguments, standalone_mode=False)
    if result == interrupt.CODE:  # the parser turns an interrupt into this exit code
        raise KeyboardInterrupt
    return result


def main() -> NoReturn:
    """Run the command of `sys.argv`, and map every error to one sentence and an exit code. This is `r2`."""
    arguments = sys.argv[1:]
    console.ready()
    # Beside another program on the same cores, threads that spin take away what those need that they wait for
    # (benchmarks/shared_cores.md). OpenMP reads it when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    as_json = "--json" in arguments
    try:
        # With --json, standard output has the report only. What the code of a network prints goes to standard error.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = invoke(arguments)
        if as_json and isinstance(result, Mapping):
            console.report(result)
        sys.exit(result if isinstance(result, int) else 0)
    except BrokenPipeError:  # the reader of our output has gone
        console.hush(sys.stdout)
        sys.exit(0)
    except SystemExit as error:
        # So the parser ends where the reader of its help has gone; 1 would say that a gate or a proof failed.
        if error.code == 1 and console.reader_has_gone():
            console.hush(sys.stdout)
            sys.exit(0)
        raise
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("R2_TRACEBACK"):  # for bug reports
            traceback.print_exc()
        message, code = _told(error, arguments)
        found = getattr(error, "report", None) or {}
    console.fail(message)
    if as_json:
        console.report({"error": message, "exit_code": code, **found})
    sys.exit(code)


def _told(error: BaseException, arguments: list[str]) -> tuple[str, int]:
    """Return the message for an error, in one sentence, and the exit code."""
    if isinstance(error, R2Error):
        message, code = str(error), error.exit_code
    elif isinstance(error, KeyboardInterrupt | typer.Abort):
        message, code = interrupt.TOLD, interrupt.CODE
    elif isinstance(error, UsageError):
        command = " ".join(["r2", *[a for a in arguments[:1] if not a.startswith("-")]])
        message, code = f"{error.format_message()} Try `{command} --help`.", 2
    elif isinstance(error, OSError):
        where = error.filename or "standard output, or a file among the temporary ones (TMPDIR)"
        message, code = f"{where}: {error.strerror or error}", 3
    else:
        told = f"internal error ({type(error).__name__}: {error})"
        message, code = f"{told}: run it again with R2_TRACEBACK=1 and report what that prints", 3
    return " ".join(message.split()), code
