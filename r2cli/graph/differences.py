"""Differences along an axis, `torch.diff`, as slices and a subtraction."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from r2cli.graph.functions import SLICE
from r2cli.graph.writer import Unknown, Writer


def differences(writer: Writer, node: fx.Node, a: Mapping[str, Any]) -> Any:
    """x[1:] - x[:-1] along an axis, `n` times, with what is put before and behind it."""
    times, dim = a.get("n", 1), a.get("dim", -1) % node.meta["val"].ndim
    parts = [a[key] for key in ("prepend", "self", "append") if a.get(key) is not None]
    size, given = sum(part.meta["val"].shape[dim] for part in parts), [writer.value(part) for part in parts]
    x = writer.call(torch.cat, tuple(given), dim) if len(given) > 1 else given[0]
    if not isinstance(size, int):
        raise Unknown("'diff' along the batch has no form: write it another way")
    for length in range(size, size - times, -1):
        later, earlier = (writer.part(SLICE, x, dim, first, length - 1 + first, 1) for first in (1, 0))
        x = writer.part(torch.sub, later, earlier)
    return x
