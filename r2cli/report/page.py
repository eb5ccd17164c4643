"""The page."""

from collections.abc import Sequence

from r2cli.analyze import Sheet


def to_bytes(sheets: Sequence[Sheet], *, bits: int, sigma: float) -> bytes:
    raise NotImplementedError
