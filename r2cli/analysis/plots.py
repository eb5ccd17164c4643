"""Pictures of what a command reports: curves of a training, the dB of layers or along the depth, the tables of a recipe
as bars."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from r2cli.analysis.depth import Depth
from r2cli.analysis.style import COLOURS, INK, MARKERS, drawing, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TableRecord = Mapping[str, Any]  # of a table: the variables of its row, `column`, `mean`, `least`, `greatest`, `values`
# What an epoch tells, by the title of its panel.
PANELS: Mapping[str, Sequence[tuple[str, str]]] = {
    "loss": (("loss", "training loss"), ("penalty", "penalty")),
    "metric": (("value", "test half"),),
    "max|w| / std": (("range_mean", "mean of the layers"), ("range_max", "worst layer")),
}
BAR, MOST_LAYERS = 0.16, 400  # inches; a picture of more layers would be taller than matplotlib draws


def of_report(report: Mapping[str, Any]) -> bytes | None:
    """The PNG of a command's report: curves where it has epochs, else the dB of its layers; None where neither."""
    name = str(report.get("checkpoint") or report.get("output") or "")
    if report.get("epochs"):
        metric = (report.get("metric") or {}).get("name") or "metric"
        return curves(report["epochs"], title=name, metric=str(metric))
    measured = [layer for layer in report.get("layers", ()) if layer.get("sqnr") is not None]
    return layers(measured, title=name) if measured else None


def curves(epochs: Sequence[Mapping[str, Any]], *, title: str, metric: str) -> bytes:
    """A PNG of a training, a panel for each of `PANELS` that was measured, over the epochs. `metric` is its name."""
    found = {
        head: [(label, _numbers(epochs, key)) for key, label in lines if any(epoch.get(key) for epoch in epochs)]
        for head, lines in PANELS.items()
    }
    shown = {head: lines for head, lines in found.items() if lines}
    with drawing(2.6 * len(shown), 2.2) as (figure, out):
        figure.suptitle(plain(title), x=0.01, ha="left")
        for panel, (head, lines) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            for place, (label, values) in enumerate(lines):
                panel.plot(
                    [epoch["epoch"] for epoch in epochs],
                    values,
                    color=COLOURS[place],
                    marker=MARKERS[place] if len(epochs) <= 40 else "",
                    label=label,
                )
            panel.set(title=plain(metric) if head == "metric" else head, xlabel="epoch")
            panel.xaxis.get_major_locator().set_params(integer=True)
            if len(lines) > 1:
                panel.legend()
    return out.getvalue()


def _numbers(epochs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """What `key` is in each epoch; NaN, which is not drawn, where it was not measured."""
    return [float("nan") if epoch.get(key) is None else float(epoch[key]) for epoch in epochs]


def layers(measured: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """A PNG of the signal to noise of each layer's weights in dB, in the network's order; a colour for each width."""
    shown = measured[:MOST_LAYERS]
    widths = sorted({layer["bits"] for layer in shown}, reverse=True)
    with drawing(5.5, 0.9 + BAR * len(shown)) as (figure, out):
        panel = figure.subplots()
        for place, bits in enumerate(widths):
            own = [(line, layer) for line, layer in enumerate(shown) if layer["bits"] == bits]
            panel.barh(
                [line for line, _ in own],
                [min(layer["sqnr"], 200.0) for _, layer in own],  # a layer that loses nothing has infinitely many
                color=COLOURS[place % len(COLOURS)],
                label=f"{bits} bits",
            )
        _named(panel, [layer["layer"] for layer in shown])
        more = f", the first {MOST_LAYERS} of {len(measured)} layers" if len(measured) > len(shown) else ""
        panel.set(title=plain(title), xlabel=f"weights: signal to noise, dB{more}")
        panel.grid(axis="y", visible=False)
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return out.getvalue()


def front(report: Mapping[str, Any]) -> bytes:
    """A PNG of what is lost at the outputs over what is spent, of all choices of bits that no other beats."""
    points = report["front"]
    with drawing(5.5, 3.4) as (figure, out):
        panel = figure.subplots()
        panel.plot([each["cost"] for each in points], [each["loss"] for each in points], color=COLOURS[0], marker=".")
        own = [each for each in points if each["chosen"]]
        panel.plot(
            [each["cost"] for each in own], [each["loss"] for each in own], "o", color=COLOURS[1], label="chosen"
        )
        panel.set(title=plain(str(report["output"])), xlabel="spent", ylabel="lost, sum over layers")
        panel.set_yscale("log" if all(each["loss"] > 0 for each in points) else "linear")
        panel.legend()
    return out.getvalue()


def depth(found: Depth, *, title: str) -> bytes:
    """A PNG of what each value of a network loses, in the order in which they run: arriving, own, and its cost."""
    shown = found.values[:MOST_LAYERS]
    lines = {"arrives": "arriving", "own": "own", "costs the outputs": "cost"}
    with drawing(max(5.5, 0.8 + BAR * len(shown)), 3.4) as (figure, out):
        panel = figure.subplots()
        for place, (label, part) in enumerate(lines.items()):
            values = [float(getattr(value, part)) for value in shown]
            panel.plot(values, color=COLOURS[place], marker=MARKERS[place], label=label)
        panel.axhline(min(found.outputs), color=INK, linestyle=":", linewidth=0.8, label="at the outputs")
        panel.set_xticks(range(len(shown)), [plain(value.name) for value in shown], rotation=90)
        panel.set(title=plain(title), ylabel="signal to noise, dB", xlim=(-0.6, len(shown) - 0.4))
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return out.getvalue()


def tables(given: Sequence[tuple[str, Sequence[str], Sequence[TableRecord]]]) -> bytes | None:
    """A PNG of tables, each a title, the names of its metrics, and its records; None where no metric is a number.

    A line of panels for each table, one for each metric: bars of the mean, with whiskers from the least to the greatest
    and a dot for every single value.
    """
    panels: list[tuple[str, str, list[TableRecord]]] = []
    for title, metrics, records in given:
        drawn = [(metric, own) for metric in metrics if (own := _of(metric, records))]
        panels += [("" if place else title, metric, own) for place, (metric, own) in enumerate(drawn)]
    if not panels:
        return None
    heights = [0.9 + BAR * len(own) + 0.05 * len({_row(one) for one in own}) for _, _, own in panels]
    with drawing(5.5, sum(heights)) as (figure, out):
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (title, metric, own) in zip(axes, panels, strict=True):
            _bars(panel, own, metric)
            panel.set(title=plain(title), xlabel=plain(metric))
    return out.getvalue()


def _of(metric: str, records: Sequence[TableRecord]) -> list[TableRecord]:
    """The records of a metric whose cells are numbers: its column is named as the metric is, or ends in its name."""
    return [
        one
        for one in records
        if one.get("mean") is not None and (one["column"] == metric or one["column"].endswith(f" {metric}"))
    ]


def _row(record: TableRecord) -> str:
    names = ("column", "n", "mean", "sd", "least", "greatest", "values")
    return ", ".join(str(value) for key, value in record.items() if key not in names)


def _bars(panel: "Axes", records: Sequence[TableRecord], metric: str) -> None:
    heads = list(dict.fromkeys(one["column"] for one in records))
    rows = list(dict.fromkeys(map(_row, records)))
    thick = 0.8 / len(heads)
    for one in records:
        place = heads.index(one["column"])
        y = rows.index(_row(one)) + (place - (len(heads) - 1) / 2) * thick
        colour = COLOURS[place % len(COLOURS)]
        ends = [[one["mean"] - one["least"]], [one["greatest"] - one["mean"]]]
        spread: Any = {"xerr": ends, "ecolor": INK, "capsize": 2, "error_kw": {"elinewidth": 0.8}}
        panel.barh(y, one["mean"], thick * 0.9, color=colour, alpha=0.85, **(spread if one["n"] > 1 else {}))
        if one["n"] > 1:
            panel.plot(one["values"], [y] * one["n"], ".", color=INK, markersize=3)
    _named(panel, rows)
    panel.grid(axis="y", visible=False)
    if len(heads) > 1:
        from matplotlib.patches import Patch

        found = [
            Patch(color=COLOURS[i % len(COLOURS)], label=plain(head.removesuffix(metric).strip()))
            for i, head in enumerate(heads)
        ]
        panel.legend(handles=found, loc="upper left", bbox_to_anchor=(1, 1))


def _named(panel: "Axes", names: Sequence[str]) -> None:
    """Name the lines of horizontal bars, the first at the top."""
    panel.set_yticks(range(len(names)), [plain(name) for name in names])
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.tick_params(length=0)
