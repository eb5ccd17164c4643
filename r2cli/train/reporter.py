"""Whom long work tells how far it is: nobody, or whoever the caller gives."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """A bar that is running: `advance` it, and show a `line` above it."""

    def advance(self, steps: int = 1, /) -> None: ...
    def line(self, text: str, /) -> None: ...


class Reporter(Protocol):
    """Takes notes for a person who waits, and opens bars. `r2cli.console` is one."""

    def note(self, text: str, /) -> None: ...
    def bar(self, what: str, total: int, /) -> AbstractContextManager[Bar]: ...


class _Nothing:
    def advance(self, steps: int = 1, /) -> None:
        pass

    def line(self, text: str, /) -> None:
        pass


class Silent:
    """Tells nobody."""

    def note(self, text: str, /) -> None:
        pass

    @contextmanager
    def bar(self, what: str, total: int, /) -> Iterator[Bar]:
        yield _Nothing()


SILENT = Silent()
