"""An analysis as text for 80 columns: a table with the worst layers first and a small histogram in each line."""

import math
from collections.abc import Sequence
from statistics import median

from r2cli import console
from r2cli.analysis.layer_table import Analysis, AnalyzedLayer
from r2cli.analysis.rounding_pass import CHANNEL, TENSOR

NAME, CELLS = 22, 13  # characters


def lines(made: Analysis, rows: Sequence[AnalyzedLayer], *, limit: int, bits: int, sigma: float) -> list[console.Line]:
    """Return a title, the table of the first `limit` rows (0: all), and lines about what was left out."""
    weights = sum(row.count for row in rows)
    shown: list[console.Line] = [f"{made.title}: {len(rows)} layers, {weights:,} weights"]
    if made.note:
        shown.append(made.note)
    first = rows[:limit] if limit else rows
    if first:
        head = ("layer", "size", "max/std", f">{sigma:g} std", f"{bits}b dB", "/ch dB", "-max  0  +max")
        shown.append(console.table(head, [_cells(row, bits, sigma) for row in first]))
    left = []
    if len(rows) > len(first):
        left.append(f"{len(rows) - len(first)} more layers: --limit 0 shows all")
    if made.others:
        left.append(f"{len(made.others)} tensors are no layers ({_reasons(made)}): --json lists them")
    return [*shown, *left]


def comparison(sheets: Sequence[Analysis], bits: int) -> list[console.Line]:
    """Return a table that compares files: medians over the layers that each has in common with the first."""
    rows = []
    first = {row.layer: row for row in sheets[0].rows} if sheets else {}
    for other in sheets:
        pairs = [(first[row.layer], row) for row in other.rows if row.layer in first]
        ratios = [(a.ratio, b.ratio) for a, b in pairs if a.ratio and b.ratio]
        if not ratios:
            continue
        known = [value for _, b in pairs if (value := b.sqnr(bits, TENSOR)) is not None and math.isfinite(value)]
        narrower = "-" if other is sheets[0] else f"{sum(b < a for a, b in ratios)} of {len(ratios)}"
        decibel = f"{median(known):.1f}" if known else "-"
        rows.append((other.title, narrower, f"{median(b for _, b in ratios):.1f}", decibel))
    return [console.table(("medians", "narrower", "max/std", f"{bits}b dB"), rows)] if len(rows) > 1 else []


def _cells(row: AnalyzedLayer, bits: int, sigma: float) -> tuple[object, ...]:
    broken = f"{row.nan + row.inf} bad" if row.nan or row.inf else None
    share = f"{100 * row.outlier_share:.2g} %" if row.outliers else "-"
    ratio = "-" if row.ratio is None else f"{row.ratio:.1f}" if row.ratio < 1e4 else f"{row.ratio:.0e}"
    decibels = (_decibel(row.sqnr(bits, TENSOR)), _decibel(row.sqnr(bits, CHANNEL)))
    return (
        console.ending(row.name, NAME),
        _size(row.count),
        broken or ratio,
        share,
        *decibels,
        console.histogram(*cells(row, sigma)),
    )


def cells(row: AnalyzedLayer, sigma: float, count: int = CELLS) -> tuple[list[float], list[bool]]:
    """Return `count` bars from -max|w| to max|w|: logarithmic heights from 0 to 1, and which bars hold outliers."""
    totals, marked = [0] * count, [False] * count
    reach = row.reach
    if not row.count or not reach:
        totals[count // 2] = row.count - row.nan - row.inf
    else:
        edge = sigma * (row.std or 0.0)
        for index, number in enumerate(row.histogram.counts):
            left = (row.histogram.first + index) * row.histogram.step
            center = left + row.histogram.step / 2
            cell = min(count - 1, max(0, int((center / reach + 1) / 2 * count)))
            totals[cell] += number
            far = max(abs(left - (row.mean or 0.0)), abs(left + row.histogram.step - (row.mean or 0.0)))
            marked[cell] |= bool(number and row.outliers and far > edge)
    most = math.log(1 + max(totals))
    return [math.log(1 + number) / most if most else 0.0 for number in totals], marked


def _size(count: int) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def _decibel(value: float | None) -> str:
    return "-" if value is None else "exact" if math.isinf(value) else f"{value:.1f}"


def _reasons(made: Analysis) -> str:
    counted: dict[str, int] = {}
    for other in made.others:
        counted[other.reason] = counted.get(other.reason, 0) + 1
    return ", ".join(f"{reason}: {number}" for reason, number in sorted(counted.items()))
