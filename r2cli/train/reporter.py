"""How long work reports its progress: to nobody, or to what the caller gives."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class ProgressBar(Protocol):
    """A progress bar that is running. `advance` moves it on, and `line` shows a line above it."""

    def advance(self, steps: int = 1, /) -> None: ...
    def line(self, text: str, /) -> None: ...


class Reporter(Protocol):
    """Shows notes and progress bars to a person who waits. `r2cli.console` is one."""

    def note(self, text: str, /) -> None: ...
    def bar(self, what: str, total: int, /) -> AbstractContextManager[ProgressBar]: ...


class _Nothing:
    def advance(self, steps: int = 1, /) -> None:
        pass

    def line(self, text: str, /) -> None:
        pass


class Silent:
    """Shows nothing."""

    def note(self, text: str, /) -> None:
        pass

    @contextmanager
    def bar(self, what: str, total: int, /) -> Iterator[ProgressBar]:
        yield _Nothing()


SILENT = Silent()
