"""Files that appear whole or not at all: written under a temporary name beside their place, then renamed.

A temporary file is named `.NAME.PROCESS-RANDOM.partial` and is locked (flock) while the process that writes it lives. A
process that is killed loses its locks, so the next write of NAME can tell what is left over, and removes that alone.
`locked` keeps a second run away from an output. Neither needs torch.
"""

import glob
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from r2cli.errors import InputError, R2Error

# Where the system has no such locks, nothing is locked, and so nothing is taken for left over.
HAS_LOCKS = find_spec("fcntl") is not None
if HAS_LOCKS:
    import fcntl

# Called as `watcher(step, path)` before each step of a write, where a kill may come: 'create' the temporary file of
# `path`, 'write' to it, 'sync' it to the disk, 'place' it at `path`; and 'remove' `path`, 'lock' it, 'unlock' it. Tests
# end the process there.
watchers: list[Callable[[str, Path], None]] = []

SCRATCH = re.compile("r2-([0-9]{1,7})-[0-9a-f]{12}")  # a name that `_new_folder` gives, with the process

# Temporary files and folders, and locks, that this process holds now.
_held: set[Path] = set()


def abandon() -> None:
    """Remove every temporary file and folder and every lock of this process, which ends now."""
    for path in list(_held):
        with suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                _unlink_unless_locked(path)


def _unlink_unless_locked(path: Path) -> None:
    """Remove a file, but not the lock that another process holds."""
    descriptor = os.open(path, os.O_RDWR)
    if HAS_LOCKS:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path.unlink()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new empty folder among the system's temporary ones, which is removed with all that is in it.

    It is locked (flock) while this process lives. Those that killed processes left are removed first.
    """
    _remove_left_over_folders(Path(tempfile.gettempdir()))
    place, descriptor = _new_folder(Path(tempfile.gettempdir()))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)
        _held.discard(place)


def _new_folder(parent: Path) -> tuple[Path, int]:
    """A new folder, locked, and its descriptor, which is -1 where folders cannot be locked."""
    while True:
        place = parent / f"r2-{os.getpid()}-{secrets.token_hex(6)}"
        _held.add(place)  # before it is there: an interrupt may come between
        place.mkdir(mode=0o700)
        if not HAS_LOCKS:
            return place, -1
        with suppress(FileNotFoundError):  # another process took it for left over in the moment before
            descriptor = os.open(place, os.O_RDONLY)
            if _is_ours(descriptor, place):
                return place, descriptor
            os.close(descriptor)
        _held.discard(place)


def _remove_left_over_folders(parent: Path) -> None:
    """Remove the scratch folders of this user whose processes were killed: those that nobody locks.

    One whose number a living process has stays too: an older version of r2 may use it, which locks nothing.
    """
    if not HAS_LOCKS:
        return
    for found in parent.glob("r2-*"):
        named = SCRATCH.fullmatch(found.name)
        if named is None or _lives(int(named[1])):
            continue
        with suppress(OSError):  # it lives, is another user's, or another process was faster
            descriptor = os.open(found, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(found, ignore_errors=True)
            finally:
                os.close(descriptor)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, all of it or nothing. Raises R2Error if the file cannot be written."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`. It replaces `path` when the block ends, and is removed when the block fails.

    Raises R2Error if the file cannot be written.
    """
    draft = Draft(path)
    try:
        with draft.writing() as file:
            yield file
        draft.place()
    finally:
        draft.discard()


class Draft:
    """A temporary file beside `path`, which is to take its place: `writing`, then `place`. Call `discard` at the end.

    Every method raises R2Error, naming `path`, where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _told_as(path):
            # In the same folder, since a rename is atomic only within one file system.
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_left_over(path)
            _step("create", path)
            self.temporary, self._descriptor = _create(path)

    @contextmanager
    def writing(self) -> Iterator[IO[bytes]]:
        """Open the file to write it; at the end of the block its bytes are on the disk."""
        with _told_as(self.path):
            _step("write", self.path)
            with open(self._descriptor, "wb", closefd=False) as file:  # closing it would give up the lock
                yield file
                # Bytes must be on the disk before the rename is: after a power cut the file would be empty otherwise.
                file.flush()
                _step("sync", self.path)
                os.fsync(file.fileno())

    def place(self) -> None:
        """Rename the file to `path`, in the place of what was there."""
        with _told_as(self.path):
            _step("place", self.path)
            if not HAS_LOCKS:  # Windows renames no file that is open
                self._close()
            os.replace(self.temporary, self.path)

    def discard(self) -> None:
        """Give up the lock, and remove the file if it was not placed. May be called again."""
        if self.temporary not in _held:
            return
        if not HAS_LOCKS:  # Windows removes none that is open; elsewhere the lock is kept until it is removed
            self._close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)
        self._close()
        _held.discard(self.temporary)

    def _close(self) -> None:
        with suppress(OSError):  # a disk that is full may say so once more
            if self._descriptor >= 0:
                os.close(self._descriptor)
        self._descriptor = -1


def remove_left_over(path: Path) -> None:
    """Remove the temporary files of `path` that a killed process left. Those of a process that lives stay."""
    if not HAS_LOCKS:
        return
    for found in glob.glob(f".{glob.escape(path.name)}.*.partial", root_dir=path.parent, include_hidden=True):
        with suppress(OSError):  # it lives, or another process was faster
            descriptor = os.open(path.with_name(found), os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.with_name(found).unlink()
            finally:
                os.close(descriptor)


@contextmanager
def locked(path: Path, *, way_out: str = "another --output") -> Iterator[None]:
    """Keep every other run from writing `path`, by a lock on `.NAME.lock` beside it, which ends with this process.

    Raises InputError, with `way_out`, where another run holds the lock, and R2Error where the folder cannot be written.
    On a file system without locks nothing is kept away.
    """
    place = path.with_name(f".{path.name}.lock")
    with _told_as(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _step("lock", path)
        _held.add(place)
        descriptor = _locked(place, path, way_out)
    try:
        with suppress(OSError):  # who holds it is told to the others, nothing more
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        try:
            _step("unlock", path)
        finally:  # a second Ctrl-C may come in the first
            if not HAS_LOCKS:
                os.close(descriptor)
            with suppress(OSError):
                place.unlink()
            if HAS_LOCKS:
                os.close(descriptor)
            _held.discard(place)


def sync_folder(path: Path) -> None:
    """Bring the names of a folder to the disk, where the system can: a power cut then undoes no rename before this."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove `path` if it is there."""
    _step("remove", path)
    path.unlink(missing_ok=True)


def _step(step: str, path: Path) -> None:
    for watcher in watchers:
        watcher(step, path)


@contextmanager
def _told_as(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise R2Error(f"{path} could not be written: {error.strerror or error}; nothing was changed") from error


def _create(path: Path) -> tuple[Path, int]:
    """A new temporary file for `path`, locked, and its descriptor."""
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.partial")
        _held.add(temporary)  # before it is there: an interrupt may come between
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if _is_ours(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)
        _held.discard(temporary)


def _is_ours(descriptor: int, place: Path) -> bool:
    """Lock a temporary file; False where another process took it for left over in the moment before."""
    if not HAS_LOCKS:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then nobody can take it for left over either
        return True
    return _is_at(descriptor, place)


def _locked(place: Path, path: Path, way_out: str) -> int:
    """A descriptor of the lock file `place`, locked. Raises InputError where another run that writes `path` has it."""
    while True:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if HAS_LOCKS:
                # A lock of this process alone: a child that outlives a killed run would keep one made by flock.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            raise InputError(
                f"{path} is being written by another run ({holder or 'just started'}): wait for its end, or "
                f"give {way_out}"
            ) from error
        except OSError:
            return descriptor
        if _is_at(descriptor, place):
            return descriptor
        os.close(descriptor)  # the run before removed the file in this moment


def _is_at(descriptor: int, place: Path) -> bool:
    """Whether the open file is the one that has the name `place`."""
    try:
        named = os.stat(place)
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (own.st_dev, own.st_ino) == (named.st_dev, named.st_ino)
