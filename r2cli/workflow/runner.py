"""Run the steps of a recipe. Steps that are up to date are left out, and independent steps may run at the same time.

A step is up to date if it was run with the same options by the same version of r2, its files still exist, and the files
that it read have the same bytes. A step that was stopped goes on from its last epoch, or runs again over its own files.
If a gate or proof of a step fails, its files are written all the same: the other steps go on, and the failure is kept
with its report. The file results.json in the folder holds what is done, with checksums. It is written after every step.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any, Protocol

from r2cli import __version__
from r2cli.config import targets, values
from r2cli.config.machine import usable_cores
from r2cli.errors import CheckFailed, InputError, R2Error
from r2cli.storage import schema
from r2cli.storage.atomic import write_atomically
from r2cli.storage.manifest import checksum
from r2cli.train.resume import resume_state
from r2cli.workflow.recipe import Step, reads_from, shell

WITH_FILE = ("ptq", "qat", "palettize")  # these write the file of a target beside the checkpoint
# How a command is started, or Ctrl-C would come twice, from the terminal and from `stop`; and how it is stopped.
APART: Any
if sys.platform == "win32":
    APART = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    STOP = signal.CTRL_BREAK_EVENT
else:
    APART = {"start_new_session": True}
    STOP = signal.SIGINT
PAUSE = 0.1  # seconds between two checks of the running processes


class Job(Protocol):
    """A command that was started. Call `report` once, when it is `done`: it raises the error that ended the command."""

    def done(self) -> bool: ...
    def report(self) -> Any: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class InThisProcess:
    """A command in this process. It runs when `report` is called."""

    invoke: Callable[[list[str]], Any]
    arguments: list[str]

    def done(self) -> bool:
        return True

    def report(self) -> Any:
        with redirect_stdout(sys.stderr):  # standard output is for results, and a network's own code may print
            return self.invoke(self.arguments)

    def stop(self) -> None:
        pass


class InOwnProcess:
    """A command in a new process that uses `threads` threads. Its progress and errors go to the file `log`."""

    def __init__(self, arguments: Sequence[str], threads: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.out = log, tempfile.TemporaryFile()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), values.STEP: "1"}
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "r2cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self.out,
                stderr=errors,
                env=environment,
                **APART,
            )

    def done(self) -> bool:
        return self.process.poll() is not None

    def report(self) -> Any:
        """Return the JSON that the command printed. Raises the class of error that its exit code stands for."""
        code = self.process.wait()
        self.out.seek(0)
        printed = self.out.read().decode(errors="replace")
        self.out.close()
        if code == 130:
            raise KeyboardInterrupt
        try:
            result = json.loads(printed or "{}")
        except ValueError as error:
            raise R2Error(f"it ended with {code} and no report, {self.log} says more") from error
        if code == 0:
            return result
        message = result.pop("error", f"it ended with {code}, {self.log} says more")
        if code == 1:
            result.pop("exit_code", None)
            raise CheckFailed(message, result or None)
        raise {2: InputError}.get(code, R2Error)(message)

    def stop(self) -> None:
        """Interrupt the command and wait for its end. It keeps its last complete epoch."""
        if not self.done():
            self.process.send_signal(STOP)
        self.process.wait()


def log_of(folder: Path, number: int) -> Path:
    """The log of the step with that number, from 1, where steps run in their own processes."""
    return folder / "logs" / f"{number}.log"


def threads_each(jobs: int) -> int:
    """Return the number of threads for each of `jobs` processes: together they use what this process may use."""
    usable = usable_cores()
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (min(int(given), usable) if given.isdecimal() else usable) // jobs)


def execute(
    todo: Sequence[Step],
    folder: Path,
    start: Callable[[int, list[str]], Job],
    tell: Callable[[str], None],
    *,
    overwrite: bool = False,
    resume: bool = False,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Run the steps, at most `jobs` at a time. A step starts when the steps that it reads from are done.

    With `resume`, what was done before must have been done with the same options, and its files must be as they were
    written: raises InputError, which names the step, before any other is run.

    `start` starts a command, given its number and arguments. Returns for each step its command, its values, its report,
    and the message of the gate or proof that failed, or None. If a step fails in another way, running steps end, no
    other starts, and the error is raised with the step's place in the recipe. An interrupt stops all steps.
    """
    record = Record.read(folder)
    if resume and not overwrite:
        record.require_as_written(todo)
    before = [{n for n in range(number) if _comes_first(todo[n], step)} for number, step in enumerate(todo)]
    waiting, running = list(range(len(todo))), dict[int, Job]()
    reports: dict[int, Any] = {}
    failure: Exception | None = None
    try:
        while waiting or running:
            ready = [number for number in waiting if before[number] <= reports.keys()]
            for number in ready[: jobs - len(running)]:
                waiting.remove(number)
                report = None if overwrite else record.report(todo[number])
                if report is None:
                    said = f"  # log: {log_of(folder, number + 1)}" if jobs > 1 else ""
                    tell(f"[{number + 1}/{len(todo)}] {shell(todo[number], folder)}{said}")
                    running[number] = start(number + 1, record.begin(todo[number], overwrite=overwrite))
                else:
                    reports[number] = report
            finished = [number for number, job in running.items() if job.done()]
            for number in finished:
                try:
                    reports[number] = record.end(todo[number], running.pop(number).report())
                except (R2Error, OSError) as error:
                    if isinstance(error, CheckFailed) and error.report is not None:
                        message = todo[number].blame(str(error))
                        reports[number] = record.end(todo[number], error.report, failed=message)
                        tell(message)
                    else:
                        failure, waiting = failure or _named(error, todo[number]), []
            if running and not finished:
                sleep(PAUSE)
    except BaseException:
        for job in running.values():
            job.stop()
        raise
    if failure is not None:
        raise failure
    return [
        {"command": step.command, "values": step.values, "report": reports[number], "failed": record.failed(step)}
        for number, step in enumerate(todo)
    ]


def _comes_first(earlier: Step, step: Step) -> bool:
    """Say whether `step` must wait for `earlier`: it reads its output, writes the same file, or writes its source."""
    output = step.options.get("output")
    same = output is not None and output == earlier.options.get("output")
    return same or reads_from(step, earlier) or reads_from(earlier, step)


def _named(error: Exception, step: Step) -> R2Error:
    kind = type(error) if isinstance(error, R2Error) else R2Error
    return kind(step.blame(str(error)))


@dataclass(frozen=True)
class DoneEntry:
    """What results.json holds of a step. r2 0.1 kept no checksums."""

    key: str
    report: Mapping[str, Any] | None = None
    failed: str | None = None
    inputs: Mapping[str, str | None] = field(default_factory=dict)
    written: Mapping[str, str | None] = field(default_factory=dict)


DONE: Any = Mapping[str, DoneEntry]
TABLE: Any = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """What was done in a folder: for each output the options, the checksums of the inputs, and the report."""

    folder: Path
    done: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Read the record of `folder`. If it is missing or damaged, start an empty one: then all steps run again."""
        try:
            stored = schema.parsed((folder / "results.json").read_bytes())
            for entry in schema.read(DONE, stored).values():
                _, _, options = schema.parsed(entry.key)
                schema.read(TABLE, options)
        except (
            OSError,
            ValueError,
            TypeError,
        ):  # a key that is no list of three, too
            return cls(folder, {})
        return cls(folder, stored)

    def report(self, step: Step) -> Any:
        """Return the report of a step that is up to date, or None for a step that must run."""
        known = self.done.get(_name(step), {})
        if known.get("key") != _key(step) or not all(file.exists() for file in self._files(step)):
            return None
        inputs = self._inputs(step)  # records of r2 0.1 have no checksums of inputs
        return known.get("report") if known.get("inputs", inputs) == inputs else None

    def require_as_written(self, steps: Sequence[Step]) -> None:
        """Raises InputError for a step that was done with other options, from other files, or whose files changed."""
        for step in steps:
            known = self.done.get(_name(step))
            if known is None:
                continue
            files = self._files(step)
            if known.get("report") is None and not any(file.exists() or resume_state(file).exists() for file in files):
                continue  # it ended before it wrote anything, for a wrong option perhaps, and starts anew
            if known["key"] != _key(step):
                changed = _changed(json.loads(known["key"]), json.loads(_key(step)))
                raise InputError(step.blame(f"it was done {changed}: leave out --resume to do it again"))
            if known.get("report") is None:
                continue  # it was stopped, and goes on
            for key, value in self._inputs(step).items():
                if known.get("inputs", {}).get(key, value) != value:
                    raise InputError(step.blame(f"its {key} has changed since: leave out --resume to do it again"))
            for file in files:
                sums = known.get("written", {})  # r2 0.1 kept none
                if not file.exists() or sums.get(file.name, checksum(file)) != checksum(file):
                    what = "is not as it was written" if file.exists() else "is missing"
                    raise InputError(step.blame(f"{file} {what}: put it back, or run all again with --overwrite"))

    def begin(self, step: Step, *, overwrite: bool) -> list[str]:
        """Record that `step` starts. Returns its command line, with --resume or --overwrite where they are needed."""
        name, key, files = _name(step), _key(step), self._files(step)
        ours = overwrite or name in self.done  # an earlier run of the recipe made the file, so it may be replaced
        inputs, known = self._inputs(step), self.done.get(name, {})
        same = known.get("key") == key and known.get("inputs", inputs) == inputs
        goes_on = not overwrite and same and any(resume_state(file).exists() for file in files)
        if ours or not (files and all(file.exists() for file in files)):
            self.done[name] = {"key": key, "inputs": inputs, "report": None}
            self._write()
        # A step that goes on may have been stopped between its checkpoint and its ONNX file.
        replaces = ours and (any(file.exists() for file in files) if goes_on else bool(files))
        more = ["--resume"] * goes_on + ["--overwrite"] * replaces
        return [*step.arguments(self.folder), *more, "--json"]

    def failed(self, step: Step) -> str | None:
        """Return the message of the gate or proof that `step` failed, or None."""
        failed: str | None = self.done.get(_name(step), {}).get("failed")
        return failed

    def end(self, step: Step, made: Any, *, failed: str | None = None) -> Any:
        """Record the report of `step` and what it failed. Returns the report as JSON holds it."""
        report = json.loads(json.dumps(made, default=str))
        entry: Mapping[str, Any] = self.done.get(_name(step)) or {"key": _key(step), "inputs": self._inputs(step)}
        written = {file.name: checksum(file) for file in self._files(step)}
        self.done[_name(step)] = {**entry, "written": written, "report": report}
        self.done[_name(step)] |= {"failed": failed} if failed else {}
        self._write()
        return report

    def _files(self, step: Step) -> list[Path]:
        output = step.options.get("output")
        files = [] if output is None else [self.folder / output]
        name = str(step.options.get("target", targets.DEFAULT))
        return files + ([targets.beside(file, name) for file in files] if step.command in WITH_FILE else [])

    def _inputs(self, step: Step) -> dict[str, str | None]:
        """Return the checksums of the files that `step` reads. None stands for a folder or a missing file."""
        given = {"source": self.folder / step.options["source"]} if "source" in step.options else {}
        if "weights" in step.options:
            given["weights"] = Path(step.options["weights"])
        return {key: checksum(path) for key, path in given.items()}

    def _write(self) -> None:
        write_atomically(self.folder / "results.json", json.dumps(self.done, indent=1).encode())


def _key(step: Step) -> str:
    return json.dumps([__version__, step.command, step.options], sort_keys=True, default=str)


def _name(step: Step) -> str:
    output = step.options.get("output")
    return _key(step) if output is None else str(output)


def _changed(old: Sequence[Any], new: Sequence[Any]) -> str:
    """How a step's key differs from another: its version, its command, or the first of its options."""
    if old[:2] != new[:2]:
        return f"as `r2 {old[1]}` by r2 {old[0]}"
    key = next(key for key in {**old[2], **new[2]} if old[2].get(key) != new[2].get(key))
    return f"with {key} = {old[2].get(key)}, not {new[2].get(key)}"
