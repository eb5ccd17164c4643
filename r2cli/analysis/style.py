"""How every picture of ours looks: for pages that are light or dark, and for people who see few colours.

The background is transparent, and the ink a grey that stands out from white and from black alike. Colours are those of
Okabe and Ito ("Color Universal Design", 2008), without the yellow, which is lost on white.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

from r2cli import console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK = "#7a7a7a"
DPI = 150  # pixels per inch
# No dates, and a fixed salt for the ids in an SVG: so the same numbers give the same bytes.
DATELESS = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
SETTINGS: Any = {
    "font.size": 7,
    "svg.hashsalt": "r2",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
PLOTS: Any = {
    **SETTINGS,
    **dict.fromkeys(_INKED, INK),
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
}


@contextmanager
def drawing(width: float, height: float) -> Iterator["tuple[Figure, BytesIO]"]:
    """A new figure of so many inches in our style, and what its PNG is written to when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    out = BytesIO()
    with matplotlib.rc_context(PLOTS):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, out
        figure.savefig(out, format="png", dpi=DPI, transparent=True)


def plain(name: str) -> str:
    """Escape `name` as for a terminal, and for matplotlib: dollars are formulas, labels that start with _ hidden."""
    shown = console.escaped(name).replace("$", r"\$")
    return f" {shown}" if name.startswith("_") else shown
