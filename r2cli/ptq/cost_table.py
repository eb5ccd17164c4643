"""What each layer costs at each width, from a file: cycles, microseconds, energy, bytes, or anything that adds up.

    layer,width,cost
    conv1,W8A8,120.5
    blocks.*,W4A8,31
    Conv 16x16x3x3,W4A8,28.4

A layer is named, or meant by a pattern of names, or by its operator and the shape of its weight. A name counts before
patterns, and of patterns the last one. A width is what --keep takes: 4, W4A8, float.
"""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from r2cli.config import layer_form
from r2cli.config.layer_form import LayerForm
from r2cli.errors import InputError, unknown
from r2cli.graph.operators import LayerModule

COLUMNS = ("layer", "width", "cost")


@dataclass(frozen=True)
class CostTable:
    """The rows of a file, `origin`: (layer or pattern, width, cost)."""

    origin: str
    rows: tuple[tuple[str, int | str, float], ...]

    @property
    def widths(self) -> list[int | str]:
        """All widths, as `LayerForm.word` has them, in the order of the file."""
        return list(dict.fromkeys(width for _, width, _ in self.rows))


def kind(module: LayerModule) -> str:
    """A layer's operator and the shape of its weight, as a table may name it: 'Conv 16x16x3x3'."""
    operator = "Gemm" if isinstance(module, nn.Linear) else "Conv"
    return f"{operator} {'x'.join(map(str, module.weight.shape))}"


def read(path: Path) -> CostTable:
    """Read a table. Raises InputError for a file that is none, with its line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--cost {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not lines or not set(COLUMNS) <= lines[0].keys():
        raise InputError(f"--cost {path} is no table of costs: its first line is {','.join(COLUMNS)}, and rows follow")
    rows = []
    for number, line in enumerate(lines, 2):
        name, width, text = (str(line[column] or "").strip() for column in COLUMNS)
        try:
            cost = float(text)
        except ValueError:
            cost = math.nan
        if not name or not 0 <= cost < math.inf:
            raise InputError(
                f"--cost {path} has no layer with a cost from 0 up in line {number}: {name},{width},{text}"
            )
        try:
            rows.append((name, layer_form.of(width).word, cost))
        except InputError as error:
            told = f"--cost {path} has no width in line {number}: '{width}' is none, give 8, W4A8, W8A16 or float"
            raise InputError(told) from error
    return CostTable(str(path), tuple(rows))


def of_layers(table: CostTable, layers: Mapping[str, str]) -> dict[str, dict[int | str, float]]:
    """Return the cost of every layer at every width of the table. `layers` are their `kind`s by name.

    Raises InputError for a row that means no layer, and for a layer and a width without a cost.
    """
    found: dict[str, dict[int | str, float]] = {name: {} for name in layers}
    exact: set[tuple[str, int | str]] = set()
    for pattern, width, cost in table.rows:
        meant = [name for name, own in layers.items() if fnmatchcase(name, pattern) or own == pattern]
        if not meant:
            raise unknown(f"layer in {table.origin}", pattern, [*layers, *layers.values()])
        for name in meant:
            if name == pattern or (name, width) not in exact:
                found[name][width] = cost
        if pattern in layers:
            exact.add((pattern, width))
    _require_all(table, found)
    return found


def at(own: Mapping[int | str, float], form: LayerForm) -> float | None:
    """What a layer with these costs takes in a form; None for a width that is not among them.

    A width that says nothing of what the layer reads holds for all but 16 bits.
    """
    for width, cost in own.items():
        one = layer_form.of(width)
        reads = one.act_bits == form.act_bits or (one.act_bits is None and form.act_bits != layer_form.WIDE_BITS)
        if one.is_float if form.is_float else reads and one.weight_bits == form.weight_bits:
            return cost
    return None


def _require_all(table: CostTable, found: Mapping[str, Mapping[int | str, float]]) -> None:
    holes = [f"'{name}' at {width}" for name, own in found.items() for width in table.widths if width not in own]
    if holes:
        more = f" and {len(holes) - 3} more" if len(holes) > 3 else ""
        raise InputError(f"{table.origin} has no cost of {', '.join(holes[:3])}{more}: add them, or a pattern as *")


def written(rows: Iterable[tuple[str, int | str, float]]) -> str:
    """The text of a table."""
    lines = [",".join(COLUMNS), *(f"{name},{width},{cost:.6g}" for name, width, cost in rows)]
    return "\n".join(lines) + "\n"
