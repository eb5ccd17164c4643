"""The steps of a recipe, run: what is up to date is not run again, what is independent may run side by side.

A step is up to date where it was done with the same options by the same version, its files are still there, and what
it read (its source, its weights) has the same bytes. One that was stopped half way goes on from its last epoch, or runs
again over its own files. One whose gate or proof failed has written its files: the others go on, and its failure stands
beside its report. What is done is kept in the folder's results.json, after every step.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any, Protocol

from r2cli import __version__
from r2cli.errors import CheckFailed, InputError, R2Error
from r2cli.storage.checkpoint import write_atomically
from r2cli.train.resume import resume_state
from r2cli.workflow.recipe import Step, reads_from, shell

WITH_ONNX = ("ptq", "qat", "palettize")  # these write an ONNX file beside the checkpoint
PAUSE = 0.1  # seconds between two looks at running processes


class Job(Protocol):
    """A command that was started. `report` is asked for once, when it is `done`, and raises what stopped it."""

    def done(self) -> bool: ...
    def report(self) -> Any: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class InThisProcess:
    """A command in this process, which runs when its report is asked for."""

    invoke: Callable[[list[str]], Any]
    arguments: list[str]

    def done(self) -> bool:
        return True

    def report(self) -> Any:
        with redirect_stdout(sys.stderr):  # what a network's own code prints is no result
            return self.invoke(self.arguments)

    def stop(self) -> None:
        pass


class InOwnProcess:
    """A command in a process of its own, on so many `threads`; what it says goes to the file `log`."""

    def __init__(self, arguments: Sequence[str], threads: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.out = log, tempfile.TemporaryFile()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with log.open("wb") as told:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "r2cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self.out,
                stderr=told,
                env=environment,
                start_new_session=True,  # so that an interrupt comes from us, once
            )

    def done(self) -> bool:
        return self.process.poll() is not None

    def report(self) -> Any:
        """What the command printed for machines. Raises the class of error that its exit code stands for."""
        code = self.process.wait()
        self.out.seek(0)
        printed = self.out.read().decode(errors="replace")
        self.out.close()
        if code == 130:
            raise KeyboardInterrupt
        try:
            found = json.loads(printed or "{}")
        except ValueError as error:
            raise R2Error(f"it ended with {code} and no report, {self.log} says more") from error
        if code == 0:
            return found
        told = found.pop("error", f"it ended with {code}, {self.log} says more")
        if code == 1:
            found.pop("exit_code", None)
            raise CheckFailed(told, found or None)
        raise {2: InputError}.get(code, R2Error)(told)

    def stop(self) -> None:
        """Interrupt it, so that it keeps its last whole epoch, and wait for its end."""
        if not self.done():
            self.process.send_signal(signal.SIGINT)
        self.process.wait()


def threads_each(jobs: int) -> int:
    """Threads for each of `jobs` processes, of those that this one may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (min(int(given), usable) if given.isdecimal() else usable) // jobs)


def execute(
    todo: Sequence[Step],
    folder: Path,
    start: Callable[[int, list[str]], Job],
    tell: Callable[[str], None],
    *,
    overwrite: bool = False,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Run the steps, at most `jobs` at a time, each when those that it reads from are done.

    Returns for each its values, its report, and what gate or proof failed on what it wrote, or None. `start` begins a
    command, given its number and its arguments. Where a step fails otherwise, those that run come to their end, no
    other begins, and its error is raised with its place in the recipe. An interrupt stops all.
    """
    record = Record.read(folder)
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
                    tell(f"[{number + 1}/{len(todo)}] {shell(todo[number], folder)}")
                    running[number] = start(number + 1, record.begin(todo[number], overwrite=overwrite))
                else:
                    reports[number] = report
            finished = [number for number, job in running.items() if job.done()]
            for number in finished:
                try:
                    reports[number] = record.end(todo[number], running.pop(number).report())
                except (R2Error, OSError) as error:
                    if isinstance(error, CheckFailed) and error.report is not None:
                        told = todo[number].blame(str(error))
                        reports[number] = record.end(todo[number], error.report, failed=told)
                        tell(told)
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
    """Whether `step` waits for `earlier`: it reads what that writes, or writes the same, or what that reads."""
    output = step.options.get("output")
    same = output is not None and output == earlier.options.get("output")
    return same or reads_from(step, earlier) or reads_from(earlier, step)


def _named(error: Exception, step: Step) -> R2Error:
    kind = type(error) if isinstance(error, R2Error) else R2Error
    return kind(step.blame(str(error)))


@dataclass(frozen=True)
class Record:
    """What was done in a folder, by the name of the output: options, the bytes that were read, and the report."""

    folder: Path
    done: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """The record of `folder`; an empty one where there is none, or a damaged one."""
        try:
            found = json.loads((folder / "results.json").read_text())
            return cls(folder, {str(name): {**entry, "key": entry["key"]} for name, entry in found.items()})
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return cls(folder, {})

    def report(self, step: Step) -> Any:
        """The report of a step that is up to date; None for one that is to be run."""
        known = self.done.get(_name(step), {})
        if known.get("key") != _key(step) or not all(file.exists() for file in self._files(step)):
            return None
        inputs = self._inputs(step)  # records of r2 0.1 have no bytes of what was read
        return known.get("report") if known.get("inputs", inputs) == inputs else None

    def begin(self, step: Step, *, overwrite: bool) -> list[str]:
        """Note that `step` is about to run; its command line, with what makes it go on or replace its own files."""
        name, key, files = _name(step), _key(step), self._files(step)
        ours = overwrite or name in self.done  # a file of the recipe's own, which it may replace
        inputs, known = self._inputs(step), self.done.get(name, {})
        same = known.get("key") == key and known.get("inputs", inputs) == inputs
        goes_on = not overwrite and same and any(resume_state(file).exists() for file in files)
        if ours or not (files and all(file.exists() for file in files)):
            self.done[name] = {"key": key, "inputs": inputs, "report": None}
            self._write()
        # One that goes on may have written its checkpoint already, and been stopped before its ONNX file.
        replaces = ours and (any(file.exists() for file in files) if goes_on else bool(files))
        more = ["--resume"] * goes_on + ["--overwrite"] * replaces
        return [*step.arguments(self.folder), *more, "--json"]

    def failed(self, step: Step) -> str | None:
        """What gate or proof failed on what `step` wrote; None where none did."""
        failed: str | None = self.done.get(_name(step), {}).get("failed")
        return failed

    def end(self, step: Step, made: Any, *, failed: str | None = None) -> Any:
        """Note what `step` came to, and what failed of it; its report, as JSON gives it back."""
        report = json.loads(json.dumps(made, default=str))
        entry: Mapping[str, Any] = self.done.get(_name(step)) or {"key": _key(step), "inputs": self._inputs(step)}
        self.done[_name(step)] = {**entry, "report": report, **({"failed": failed} if failed else {})}
        self._write()
        return report

    def _files(self, step: Step) -> list[Path]:
        output = step.options.get("output")
        files = [] if output is None else [self.folder / output]
        return files + ([file.with_suffix(".onnx") for file in files] if step.command in WITH_ONNX else [])

    def _inputs(self, step: Step) -> dict[str, str | None]:
        """What `step` reads, by its bytes; None for a file that is not there, or is a folder."""
        given = {"source": self.folder / step.options["source"]} if "source" in step.options else {}
        if "weights" in step.options:
            given["weights"] = Path(step.options["weights"])
        return {key: _digest(path) for key, path in given.items()}

    def _write(self) -> None:
        write_atomically(self.folder / "results.json", json.dumps(self.done, indent=1).encode())


def _key(step: Step) -> str:
    return json.dumps([__version__, step.command, step.options], sort_keys=True, default=str)


def _name(step: Step) -> str:
    output = step.options.get("output")
    return _key(step) if output is None else str(output)


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
