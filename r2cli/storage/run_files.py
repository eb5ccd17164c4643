"""The files that a command writes: they appear together, and a record beside them says how they were made.

The record of model.safetensors is model.run.json: the command, what decided the result, checksums of what was read and
written, and the report. All files are written under temporary names first. Then they are renamed, in this order:

    1. the record, marked unfinished
    2. the .onnx file, where there is one
    3. the checkpoint
    4. the record, marked finished
    5. the state of training is removed

A run that is killed before 1 leaves temporary files, which the next run removes. One that is killed between 1 and 4
leaves files whose checksums are in an unfinished record: the next run takes them for finished where all of them are
there, and otherwise replaces them without being asked.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from r2cli import __version__
from r2cli.console import RANK
from r2cli.errors import InputError, R2Error
from r2cli.storage import atomic, schema
from r2cli.storage.schema import Malformed

FORMAT = 1

# Options whose names differ from those of the settings that they fill, of a regularizer and of a network.
OPTIONS = {"name": "reg", "strength": "reg-weight", "stable": "reg-form", "dim": "reg-dim"}
NETWORK = {"name": "model", "args": "model-arg"}


@dataclass(frozen=True)
class Asked:
    """What decides the result of a run; equal values are the same options.

    `options` are settings with their defaults filled in, by the names of options: --lr 0.1 is the same as no --lr where
    0.1 is the default. `read` are the files that the run reads, by name, with their checksums (None: it is missing),
    and the data set, whose images are counted and not read. What only says how the run answers, where it works or what
    it must reach is not compared: --json, --device, --workers, --data-dir, the gates, the number of threads.
    """

    command: str
    options: Mapping[str, Any]
    read: Mapping[str, str | None]

    def difference(self, other: "Asked") -> str | None:
        """How this, which was, differs from `other`, which is wanted, in some words; None where they are the same."""
        if self.command != other.command:
            return f"made by `r2 {self.command}`"
        old, new = _flat(self.options), _flat(other.options)
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return f"made with --{key} {_shown(old.get(key))}, not {_shown(new.get(key))}"
        for key in {**self.read, **other.read}:
            if self.read.get(key) != other.read.get(key):
                return f"made before {key} was changed"
        return None


def checksum(path: Path) -> str | None:
    """SHA-256 of a file, as hexadecimal digits. None stands for a folder or a missing file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote. `written` has the checksum of each file by its name."""

    asked: Asked
    written: Mapping[str, str | None]
    report: Mapping[str, Any]
    finished: bool

    @classmethod
    def read(cls, path: Path) -> "RunRecord | None":
        """The record at `path`; None where there is none, it is damaged, or another version wrote it."""
        try:
            stored = schema.parsed(path.read_bytes())
            return schema.read(cls, stored) if isinstance(stored, dict) and stored.get("format") == FORMAT else None
        except (OSError, Malformed):
            return None

    def to_bytes(self) -> bytes:
        return json.dumps({"format": FORMAT, "r2": __version__, **asdict(self)}, indent=1, default=str).encode()


class RunFiles:
    """The files of one run. In order: `require_free`, `claimed`, and in its block `finished`, `writing`, `commit`.

    `files` are the outputs, the checkpoint first. `state` is where training keeps its last whole epoch. Without
    `resume` or `overwrite`, files that are there stop the command.
    """

    def __init__(
        self,
        command: str,
        files: Sequence[Path],
        *,
        state: Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.command, self.files, self.state = command, tuple(files), state
        self.resume, self.overwrite = resume, overwrite
        self.place = files[0].with_name(f"{files[0].stem}.run.json")
        self._drafts: dict[Path, atomic.Draft] = {}
        self._marks: list[atomic.Draft] = []  # the record, unfinished and finished
        self._ours: set[Path] = set()  # what a killed run had placed, and this one may replace

    def require_free(self) -> None:
        """Raises InputError, before any work is done, where it is clear that files or a stopped run are in the way."""
        if self.overwrite:
            return
        record = RunRecord.read(self.place)
        if record is None or (record.finished and not self.resume):
            _require_none(path for path in self.files if path.exists())
        if self.state is not None and self.state.exists() and not self.resume:
            raise InputError(f"{self.state} holds a stopped run: go on with --resume, or start again with --overwrite")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other runs from these files while the block runs, and remove what a killed run left half written.

        Raises InputError where another run writes them. Under torchrun the first process does it for all.
        """
        with ExitStack() as held:
            held.callback(self._discard)
            if not RANK:
                for path in sorted(self.files):
                    held.enter_context(atomic.locked(path))
                for path in (*self.files, self.place, *([self.state] if self.state else [])):
                    atomic.remove_left_over(path)
            yield

    def finished(self, asked: Asked) -> dict[str, Any] | None:
        """The report of a run that made the files with the same options; None where there is work to do.

        Raises InputError where the files were made with other options, and, naming the file, where one of them is
        missing or is not what the run wrote.
        """
        there = [path for path in self.files if path.exists()]
        if self.overwrite or not there:
            return None
        record, asked = RunRecord.read(self.place), _as_json(asked)
        if record is None:
            _require_none(there)
            return None
        as_written = {path for path in there if checksum(path) == record.written.get(path.name)}
        complete = len(as_written) == len(self.files)
        if not record.finished and not complete:
            _require_none(path for path in there if path not in as_written)
            self._ours = as_written
            return None
        difference = record.asked.difference(asked)
        if difference is not None or (record.finished and not self.resume):
            _require_none(there, difference)
        for path in self.files:
            if path not in as_written:
                raise InputError(f"{path} {self._wrong(path)}")
        if not RANK:
            if not record.finished:
                atomic.write_atomically(self.place, RunRecord(asked, record.written, record.report, True).to_bytes())
            if self.state is not None:
                atomic.remove(self.state)
        return dict(record.report)

    def _wrong(self, path: Path) -> str:
        """What is wrong with a file of a finished run, and what to do."""
        what = "is not the file that the finished run wrote: it is damaged or was exchanged"
        what = what if path.exists() else "is missing, and the run that wrote it is finished"
        again = "start again with --overwrite"
        if path.suffix == ".onnx":
            return f"{what}; write it again with `r2 export {self.files[0]} -o {path} --overwrite`, or {again}"
        return f"{what}; put the right one back, or {again}"

    @contextmanager
    def writing(self, path: Path) -> Iterator[IO[bytes]]:
        """Open a temporary file for the output `path`; `commit` puts it there. Raises R2Error as `atomic.Draft`."""
        self._drafts[path] = atomic.Draft(path)
        with self._drafts[path].writing() as file:
            yield file

    def write(self, path: Path, content: bytes) -> Path:
        """Write the output `path` to a temporary file, which is returned."""
        with self.writing(path) as file:
            file.write(content)
        return self._drafts[path].temporary

    def size(self, path: Path) -> int:
        """Bytes of an output that is written and not yet placed."""
        return self._drafts[path].temporary.stat().st_size

    def commit(self, asked: Asked | None = None, report: Mapping[str, Any] | None = None) -> None:
        """Put all files in their places, with a record where `asked` is given, and remove the state of training.

        Raises R2Error where that cannot be, or where a file has come in the meantime that is not to be replaced.
        """
        for path in self.files:
            if path.exists() and not self.overwrite and path not in self._ours:
                raise R2Error(f"{path} has come while this run worked, and is kept: give another --output")
        if asked is not None:
            sums = {path.name: checksum(self._drafts[path].temporary) for path in self.files}
            for finished in (False, True):
                self._mark(RunRecord(asked, sums, report or {}, finished))
        outputs = [self._drafts[path] for path in reversed(self.files)]
        for number, draft in enumerate([*self._marks[:1], *outputs, *self._marks[1:]]):
            try:
                draft.place()
            except R2Error as error:
                if not number:
                    raise
                raise R2Error(f"{draft.path} could not be put in its place: run the same command again") from error
        atomic.sync_folder(self.place.parent)
        if self.state is not None:
            atomic.remove(self.state)

    def _mark(self, record: RunRecord) -> None:
        self._marks.append(atomic.Draft(self.place))
        with self._marks[-1].writing() as file:
            file.write(record.to_bytes())

    def _discard(self) -> None:
        for draft in (*self._drafts.values(), *self._marks):
            draft.discard()
        self._drafts.clear()
        self._marks.clear()


def _require_none(paths: Iterable[Path], difference: str | None = None) -> None:
    for path in paths:
        made = f", {difference}" if difference else ""
        raise InputError(f"{path} is there already{made}: give --overwrite to replace it, or another --output")


def _as_json(asked: Asked) -> Asked:
    """`asked` as a record holds it: tuples become lists."""
    return Asked(**json.loads(json.dumps(asdict(asked), default=str)))


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in one level, each by the name of its option; a regularizer that is not there is `reg` None."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        names = {"reg": OPTIONS, "model": NETWORK}.get(key)
        parts = value if names is not None and isinstance(value, Mapping) else {key: value}
        flat |= {(names or {}).get(own, own).replace("_", "-"): each for own, each in parts.items()}
    return flat


def _shown(value: Any) -> str:
    return "something longer" if len(str(value)) > 60 else str(value)
