"""The files that a command writes: they appear together, and a manifest beside them says how they were made.

All files are written under temporary names first. Then they are renamed, in this order:

    1. the manifest, marked unfinished
    2. the .onnx file, where there is one
    3. the checkpoint
    4. the manifest, marked finished
    5. the state of training is removed

A run that is killed before 1 leaves temporary files, which the next run removes. One that is killed between 1 and 4
leaves files whose checksums are in an unfinished manifest: the next run takes them for finished where all of them are
there, and otherwise replaces them without being asked.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from r2cli.console import RANK
from r2cli.errors import InputError, R2Error
from r2cli.storage import atomic, manifest
from r2cli.storage.manifest import Asked, Manifest, checksum


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
        self.place, self.former = manifest.beside(files[0]), manifest.former(files[0])
        self._drafts: dict[Path, atomic.Draft] = {}
        self._marks: list[atomic.Draft] = []  # the manifest, unfinished and finished
        self._ours: set[Path] = set()  # what a killed run had placed, and this one may replace

    def require_free(self) -> None:
        """Raises InputError, before any work is done, where it is clear that files or a stopped run are in the way."""
        if self.overwrite:
            return
        record = self._record()
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
        record, asked = self._record(), _as_json(asked)
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
                atomic.write_atomically(self.place, replace(record, finished=True).to_bytes())
            if self.state is not None:
                atomic.remove(self.state)
        return dict(record.report)

    def _record(self) -> Manifest | None:
        """The manifest that is there, or the record of an earlier version."""
        return Manifest.read(self.place) or Manifest.read(self.former)

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
        """Put all files in their places, with a manifest where `asked` is given, and remove the state of training.

        Raises R2Error where that cannot be, or where a file has come in the meantime that is not to be replaced.
        """
        for path in self.files:
            if path.exists() and not self.overwrite and path not in self._ours:
                raise R2Error(f"{path} has come while this run worked, and is kept: give another --output")
        if asked is not None:
            sums = {path.name: checksum(self._drafts[path].temporary) for path in self.files}
            record = Manifest.made(asked, sums, report or {}, self.place.parent)
            for finished in (False, True):
                self._mark(replace(record, finished=finished))
        outputs = [self._drafts[path] for path in reversed(self.files)]
        for number, draft in enumerate([*self._marks[:1], *outputs, *self._marks[1:]]):
            try:
                draft.place()
            except R2Error as error:
                if not number:
                    raise
                raise R2Error(f"{draft.path} could not be put in its place: run the same command again") from error
        atomic.sync_folder(self.place.parent)
        if asked is not None and self.former.exists():
            atomic.remove(self.former)
        if self.state is not None:
            atomic.remove(self.state)

    def _mark(self, record: Manifest) -> None:
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
