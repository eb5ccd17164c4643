"""A comparison as a web page: one file, as page.py writes it; depth_page.html is its template."""

from typing import Any

import torch
from torch import Tensor, fx

from r2cli.analysis import page
from r2cli.analysis.depth import Comparison, energy
from r2cli.calibration.deployed import FakeQuantize
from r2cli.console import escaped
from r2cli.graph import edit
from r2cli.graph.operators import module_of
from r2cli.quantized.decibels import decibels

BINS, CHANNELS = 64, 8


class Gallery:
    """What the page draws of every row, from the first batch."""

    def __init__(self, plain: fx.GraphModule, made: fx.GraphModule) -> None:
        self.plain, self.made = plain, made
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, name: str, node: fx.Node, reference: Tensor, alone: Tensor, arriving: Tensor) -> None:
        """Take the row `name`, whose last node is `node`: values of floats, of the row alone, and of the candidate."""
        if name in self.found:
            return
        values = _histograms(reference, arriving)
        grid = module_of(self.made, node)
        if edit.is_grid(node) and isinstance(grid, FakeQuantize):
            own = grid.grid
            values["ends"] = [float((code - own.zero_point) * own.scale) for code in (own.lowest, own.highest)]
            values["bits"] = own.bits
        weights = None
        if isinstance(getattr(_module(self.made, name), "weight", None), Tensor):
            weights = _histograms(*(_module(net, name).weight.detach() for net in (self.plain, self.made)))
        self.found[name] = {"values": values, "weights": weights, "channels": _channels(reference, alone - reference)}


def _module(net: fx.GraphModule, name: str) -> Any:
    return dict(net.named_modules()).get(name)


def _histograms(reference: Tensor, other: Tensor) -> dict[str, Any]:
    """The counts of both over the same range."""
    both = [one.float().reshape(-1) for one in (reference, other)]
    low, high = min(float(one.min()) for one in both), max(float(one.max()) for one in both)
    high = high if high > low else low + 1.0
    floats, codes = (torch.histc(one, BINS, low, high).long().tolist() for one in both)
    return {"low": low, "high": high, "floats": floats, "codes": codes, "ends": None, "bits": None}


def _channels(reference: Tensor, noise: Tensor) -> list[list[float]]:
    """The channels that lose most: number, dB, and percent of the noise of all."""
    if reference.ndim < 2 or not noise.any():
        return []
    axis = 1 if reference.ndim != 3 else 2
    of = [one.movedim(axis, 0).flatten(1) for one in (reference, noise)]
    lost = of[1].double().square().sum(1)
    most = lost.topk(min(CHANNELS, len(lost))).indices.tolist()
    total = float(lost.sum())
    return [[n, decibels(energy(of[0][n]), float(lost[n])), 100 * float(lost[n]) / total] for n in most]


def to_bytes(found: Comparison, title: str) -> bytes:
    """The page over a comparison that was made with pictures; `title` is the candidate's name."""
    layers = [{**value.__dict__, **found.pictures[value.name]} for value in found.depth.values]
    measured = "" if found.before is None else f"{found.before} → {found.after}"
    data = {
        "title": escaped(title),
        "samples": found.samples,
        "outputs": list(found.depth.outputs),
        "metric": measured,
        "begins": found.depth.begins,
        "worst": [value.name for value in found.depth.worst()],
        "layers": layers,
        "mends": [mend.told() for mend in found.mends],
    }
    return page.filled("depth_page.html", data)
