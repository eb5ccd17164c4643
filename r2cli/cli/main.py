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
    compare,
    cost,
    defaults,
    doctor,
    evaluate,
    examples,
    export,
    init,
    interrupt,
    outcome,
    palettize,
    pretrain,
    prove,
    ptq,
    qat,
    recipes,
    run,
    target_list,
)
from r2cli.errors import InputError

app = typer.Typer(
    name="r2",
    help="From a PyTorch network to a deployable integer ONNX model, with range regularization.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Start with: r2 pretrain --reg margin",
)
COMMANDS = {
    "pretrain": pretrain.pretrain,
    "analyze": analyze.analyze,
    "ptq": ptq.ptq,
    "qat": qat.qat,
    "palettize": palettize.palettize,
    "export": export.export,
    "evaluate": evaluate.evaluate,
    "compare": compare.compare,
    "cost": cost.cost,
    "verify": prove.verify,
    "run": run.run,
    "init": init.init,
    "doctor": doctor.doctor,
    "targets": target_list.list_targets,
}
for name, function in COMMANDS.items():
    app.command(name, epilog=examples.told(name))(function)
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
    context.default_map = defaults.of_folder(_options(context))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and context.invoked_subcommand not in TRAINING:
        raise InputError(f"r2 {context.invoked_subcommand} runs in one process: start it without torchrun")


def _options(context: typer.Context) -> dict[str, dict[str, bool]]:
    """The options of every command, by its name, and whether they may be repeated. --json is for a line alone."""
    commands: Mapping[str, Any] = getattr(context.command, "commands", {})
    return {
        name: {each.name: each.multiple for each in own.params if hasattr(each, "multiple") and each.name != "json"}
        for name, own in commands.items()
    }


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
        message, code = outcome.told(error, arguments)
        found = getattr(error, "report", None) or {}
    console.fail(message)
    if as_json:
        console.report({"error": message, "exit_code": code, **found})
    sys.exit(code)
