"""The paper's Figure 2 for any network: a small histogram of each layer's weights, outliers as red dots.

Counts are logarithmic, weights are in standard deviations of their own layer, and the dotted lines mark the range that
a min-max grid has to span. The panels of one layer, one for each file or view, share their axes.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from r2cli import console
from r2cli.analysis.layer_table import Analysis, AnalyzedLayer
from r2cli.analysis.rounding_pass import TENSOR
from r2cli.analysis.style import DATELESS, DPI, SETTINGS, plain
from r2cli.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#4c6a8a", "#2a9d8f", "#8a6fae", "#b5833b", "#6b7280", "#3d8ab8")
OUTLIER, INK, FAINT = "#d62828", "#222222", "#777777"
PANELS = 6  # panels in a line
TALL = 1.5  # height of a line of panels in inches
MOST_LINES = 250  # some 60,000 pixels high: matplotlib refuses pictures of 65,536 pixels or more


def to_bytes(sheets: Sequence[Analysis], kind: str, *, limit: int, bits: int, sigma: float) -> bytes:
    """A picture as 'png', 'svg' or 'pdf' of the first `limit` layers of the first sheet; 0 for all.

    Of several files it shows the first view of each: as trained. Raises InputError for more than fit.
    """
    import matplotlib
    from matplotlib.figure import Figure

    sheets = _side_by_side(sheets)
    first = sheets[0].rows[:limit] if limit else sheets[0].rows
    layers = [row.layer for row in first if row.std]
    found = [{row.layer: row for row in sheet.rows} for sheet in sheets]
    blocks = max(1, PANELS // len(sheets))  # layers in a line
    lines = max(1, -(-len(layers) // blocks))
    if lines > MOST_LINES:
        raise InputError(f"{len(layers)} layers are too many for a picture: give a smaller --limit, or a page (.html)")
    with matplotlib.rc_context(SETTINGS):
        width = blocks * len(sheets)
        figure = Figure(figsize=(1.75 * width, TALL * lines + 0.7), layout="constrained")
        axes = figure.subplots(lines, width, squeeze=False)
        for panel in axes.flat:
            panel.set_visible(False)
        for index, layer in enumerate(layers):
            line, block = divmod(index, blocks)
            own = [rows.get(layer) for rows in found]
            reach = 1.06 * max(row.reach / row.std for row in own if row is not None and row.std)
            most = max(max(row.histogram.counts) for row in own if row is not None and row.std)
            for place, row in enumerate(own):
                panel = axes[line, block * len(sheets) + place]
                if row is not None and row.std:
                    _panel(panel, row, COLOURS[place % len(COLOURS)], bits, sigma)
                    panel.set(xlim=(-reach, reach), ylim=(0.6, 3 * most), visible=True)
                    panel.tick_params(labelleft=place == 0)
        _legend(figure, sheets, shown=len(layers), sigma=sigma)
        out = BytesIO()
        figure.savefig(out, format=kind, dpi=DPI, metadata=DATELESS.get(kind))
    return out.getvalue()


def _side_by_side(sheets: Sequence[Analysis]) -> Sequence[Analysis]:
    files = list(dict.fromkeys(sheet.file for sheet in sheets))
    if len(files) == 1:
        return sheets
    return [next(sheet for sheet in sheets if sheet.file == file) for file in files]


def _panel(panel: "Axes", row: AnalyzedLayer, colour: str, bits: int, sigma: float) -> None:
    std, step, mean = row.std or 1.0, row.histogram.step, row.mean or 0.0
    edges = [(row.histogram.first + index) * step for index in range(len(row.histogram.counts) + 1)]
    dots, bars = [], []
    for left, right, number in zip(edges, edges[1:], row.histogram.counts, strict=False):
        center = (left + right) / 2
        outside = row.outliers and abs(center - mean) > sigma * std
        bars.append(0 if outside else number)
        if outside and number:
            dots.append((center / std, number))
    panel.set_yscale("log")
    panel.stairs(bars, [edge / std for edge in edges], fill=True, color=colour, alpha=0.85, baseline=0.5)
    if dots:
        panel.plot(*zip(*dots, strict=True), ".", color=OUTLIER, markersize=3.5)
    for end in (row.low, row.high):
        panel.axvline((end or 0.0) / std, color=FAINT, linestyle=":", linewidth=0.8)
    panel.set_title(_short(row.name), fontsize=7, color=INK, loc="left", pad=10)
    measured = row.sqnr(bits, TENSOR)
    told = f"max/std {row.ratio:.1f}" + ("" if measured is None else f", {bits} bit {measured:.1f} dB")
    panel.text(0, 1.02, told, transform=panel.transAxes, fontsize=6, color=FAINT, va="bottom")
    panel.tick_params(length=2, width=0.5, labelsize=6, colors=FAINT)
    panel.minorticks_off()
    for spine in panel.spines.values():
        spine.set(linewidth=0.5, color=FAINT)


def _short(name: str, most: int = 26) -> str:
    return plain(console.ending(name, most))


def _legend(figure: "object", sheets: Sequence[Analysis], *, shown: int, sigma: float) -> None:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    assert isinstance(figure, Figure)
    handles: list[object] = [Patch(color=COLOURS[i % len(COLOURS)], label=plain(s.title)) for i, s in enumerate(sheets)]
    handles.append(Line2D([], [], color=OUTLIER, marker=".", linestyle="", label=f"beyond {sigma:g} std"))
    handles.append(Line2D([], [], color=FAINT, linestyle=":", linewidth=0.8, label="range"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=7)
    all_layers = len(sheets[0].rows)
    rest = f"{shown} of {all_layers} layers, worst first; " if shown < all_layers else ""
    figure.supxlabel(f"{rest}weight / its layer's standard deviation", fontsize=7, color=FAINT)
    figure.supylabel("weights (log)", fontsize=7, color=FAINT)
