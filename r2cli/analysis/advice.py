"""One line of advice that follows from the numbers of an analysis."""

from collections.abc import Sequence

from r2cli.analysis.layer_table import AnalyzedLayer
from r2cli.analysis.rounding_pass import CHANNEL, TENSOR

WORTH_BITS = 0.5  # clipping is advised if it saves at least this many bits of range
WORTH_DB = 3.0  # a grid per channel is advised if it gains at least this, which is half a bit


def advice(rows: Sequence[AnalyzedLayer], bits: int) -> str:
    """Say what to do about `rows`. The worst row comes first."""
    if not rows:
        return "there is no layer to quantize"
    broken = [row for row in rows if row.nan or row.inf]
    if broken:
        row = broken[0]
        more = f" ({len(broken)} layers have some)" if len(broken) > 1 else ""
        return f"{row.name}: {row.nan} NaN and {row.inf} infinite of {row.count:,} weights{more}: train again"
    wide = [row for row in rows if row.outliers and row.saved_bits >= WORTH_BITS]
    if wide:
        row = wide[0]
        share = f"{row.outliers:,} of {row.count:,} weights ({100 * row.outlier_share:.2g} %)"
        verb = "set" if row.outliers > 1 else "sets"
        them = "them" if row.outliers > 1 else "it"
        saved = f"clipping {them} saves {row.saved_bits:.1f} bits"
        remedy = "try `r2 pretrain --reg margin` or `r2 ptq --method adaround`"
        return f"{row.name}: {share} {verb} the range; {saved}; {remedy}"
    gains = [(_gain(row, bits), row) for row in rows]
    gain, row = max(gains, key=lambda pair: pair[0])
    if gain >= WORTH_DB and row.channels is not None:
        channel, reach = row.channels.drivers[0]
        times = f"{reach / row.channels.median:.1f} times" if row.channels.median else "beyond"
        grids = f"one grid per channel gains {gain:.1f} dB at {bits} bits"
        return f"{row.name}: channel {channel} reaches {times} the median channel; {grids}: `--granularity channel`"
    ratio, row = max(((row.ratio or 0.0, row) for row in rows), key=lambda pair: pair[0])
    return f"no layer's range is set by outliers: the widest, {row.name}, reaches {ratio:.1f} standard deviations"


def _gain(row: AnalyzedLayer, bits: int) -> float:
    """Return the gain in dB of a grid per channel over one per tensor, or 0 if it is unknown or infinite."""
    tensor, channel = row.sqnr(bits, TENSOR), row.sqnr(bits, CHANNEL)
    if tensor is None or channel is None or channel == float("inf"):
        return 0.0
    return channel - tensor
