"""An analysis as plain values for JSON. docs/analyze-json.md explains each key, and a test compares the two."""

from collections.abc import Mapping
from typing import Any

from r2cli.analysis.layer_table import Analysis, AnalyzedLayer


def sheet(made: Analysis) -> dict[str, Any]:
    """Return the values of one file, or of one view of it."""
    return {
        "file": made.file,
        "view": made.view,
        "note": made.note,
        "layers": [layer(row) for row in made.rows],
        "others": [
            {"name": other.name, "shape": list(other.shape), "dtype": other.dtype, "reason": other.reason}
            for other in made.others
        ],
    }


def layer(row: AnalyzedLayer) -> dict[str, Any]:
    """Return the values of one layer."""
    return {
        "layer": row.layer,
        "shape": list(row.shape),
        "dtype": row.dtype,
        "count": row.count,
        "nan": row.nan,
        "inf": row.inf,
        "min": row.low,
        "max": row.high,
        "mean": row.mean,
        "std": row.std,
        "kurtosis": row.kurtosis,
        "range_ratio": row.ratio,
        "outliers": row.outliers,
        "outlier_share": row.outlier_share,
        "saved_bits": row.saved_bits,
        "sqnr_db": None if row.losses is None else {name: _of_rules(own) for name, own in row.losses.sqnr.items()},
        "empty_levels": None if row.losses is None else {str(b): share for b, share in row.losses.empty.items()},
        "channels": _channels(row),
        "histogram": {
            "step": row.histogram.step,
            "first": row.histogram.first,
            "counts": list(row.histogram.counts),
        },
    }


def _of_rules(own: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {rule.replace("-", "_"): {str(bits): value for bits, value in of.items()} for rule, of in own.items()}


def _channels(row: AnalyzedLayer) -> dict[str, Any] | None:
    if row.channels is None:
        return None
    return {
        "count": row.channels.count,
        "group": row.channels.group,
        "min": list(row.channels.low),
        "max": list(row.channels.high),
        "median_max_abs": row.channels.median,
        "over_half": row.channels.over_half,
        "drivers": [{"channel": channel, "max_abs": reach} for channel, reach in row.channels.drivers],
    }
