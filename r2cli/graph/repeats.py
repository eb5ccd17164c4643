"""What repeats values: along an axis of one, as often as the batch is large too, and along any other."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from r2cli.graph.writer import Writer


def expand(writer: Writer, node: fx.Node, a: Mapping[str, Any]) -> Any:
    given = next(iter(a.values()))
    return _expanded(writer, writer.value(given), given.meta["val"].shape, node.meta["val"].shape)


def repeat(writer: Writer, node: fx.Node, a: Mapping[str, Any]) -> Any:
    """An axis of one is expanded, also as often as the batch is large; every other is repeated as a whole."""
    given, before, times = writer.value(a["self"]), a["self"].meta["val"].shape, a["repeats"]
    old = (1,) * (len(times) - len(before)) + tuple(before)
    whole = tuple(1 if _is_one(size) else count for size, count in zip(old, times, strict=True))
    after = node.meta["val"].shape
    if any(count != 1 for count in whole):
        given = writer.call(Tensor.repeat, given, writer.value(whole))
        before = tuple(1 if _is_one(size) else wanted for size, wanted in zip(old, after, strict=True))
    return _expanded(writer, given, before, after)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _expanded(writer: Writer, given: Any, before: Sequence[Any], after: Sequence[Any]) -> Any:
    if tuple(before) == tuple(after):
        return given
    old = (None,) * (len(after) - len(before)) + tuple(before)
    sizes = (-1 if one is not None and one == two else writer.number(two) for one, two in zip(old, after, strict=True))
    return writer.call(Tensor.expand, given, tuple(sizes))
