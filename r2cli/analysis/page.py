"""An analysis as a web page: one file that contains everything and loads nothing. page.html is its template.

Tensor names come from files that anybody may have written: they are only ever text, in JSON whose every `<` is escaped,
so that no name can end the script that holds it, and the page puts them into elements as text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from r2cli.analysis.layer_table import Analysis, AnalyzedLayer
from r2cli.analysis.rounding_pass import BITS
from r2cli.console import escaped

PLACE, STYLE = "/*DATA*/", "/*STYLE*/"
DIGITS = 6  # significant digits of every number that is not a count


def to_bytes(sheets: Sequence[Analysis], shown_first: Mapping[str, object], *, sigma: float, advice: str) -> bytes:
    """The page over `sheets`, whose rows are in the order of their files. The same bytes for the same weights.

    `shown_first` are the `bits`, `granularity` and `sort` with which it opens.
    """
    names = list(dict.fromkeys(row.layer for sheet in sheets for row in sheet.rows))
    found = [{row.layer: row for row in sheet.rows} for sheet in sheets]
    first_views = sorted({next(i for i, other in enumerate(sheets) if other.file == sheet.file) for sheet in sheets})
    by_hue = [*first_views, *(i for i in range(len(sheets)) if i not in first_views)]  # colours as in the pictures
    data = {
        "sigma": sigma,
        **shown_first,
        "advice": advice,
        # Of several files the first views, as trained, are enough at first.
        "shown": [len(sheets) <= 2 or i in first_views for i in range(len(sheets))],
        "sheets": [
            {"file": s.file, "view": s.view, "title": s.title, "note": s.note, "hue": by_hue.index(i)}
            for i, s in enumerate(sheets)
        ],
        "layers": [
            {"name": name, "records": [_record(rows[name]) if name in rows else None for rows in found]}
            for name in names
        ],
    }
    return filled("page.html", data)


def filled(name: str, data: Mapping[str, Any]) -> bytes:
    """The template `name` with the page's style and with `data`, which its script reads."""
    text = json.dumps(_compact(data), separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    template, own = (files("r2cli.analysis").joinpath(one).read_text(encoding="utf-8") for one in (name, "page.html"))
    style = own.partition("<style>")[2].partition("</style>")[0]
    return template.replace(STYLE, style).replace(PLACE, text).encode()


def _record(row: AnalyzedLayer) -> dict[str, Any]:
    made: dict[str, Any] = {
        "shape": row.shape,
        "dtype": row.dtype,
        "count": row.count,
        "nan": row.nan,
        "inf": row.inf,
        "min": row.low,
        "max": row.high,
        "mean": row.mean,
        "mean_abs": row.mean_abs,
        "std": row.std,
        "kurtosis": row.kurtosis,
        "ratio": row.ratio,
        "outliers": row.outliers,
        "share": row.outlier_share,
        "saved": row.saved_bits,
        "bins": {"step": row.histogram.step, "first": row.histogram.first, "counts": row.histogram.counts},
    }
    if row.losses is not None and row.channels is not None:
        made["sqnr"] = {
            granularity: {rule.replace("-", "_"): [of[bits] for bits in BITS] for rule, of in own.items()}
            for granularity, own in row.losses.sqnr.items()
        }
        made["empty"] = [row.losses.empty[bits] for bits in BITS]
        made["channels"] = {
            "count": row.channels.count,
            "group": row.channels.group,
            "min": row.channels.low,
            "max": row.channels.high,
            "median": row.channels.median,
            "drivers": row.channels.drivers,
            "over_half": row.channels.over_half,
        }
        bins = row.losses.channels
        made["map"] = {"group": bins.group, "step": bins.step, "first": bins.first, "counts": bins.counts}
    return made


def _compact(value: Any) -> Any:
    """Shorten the numbers in `value` to what the page needs. NaN and infinities, which JSON lacks, become null."""
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_compact(item) for item in value]
    if isinstance(value, str):
        return escaped(value)
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
