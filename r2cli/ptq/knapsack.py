"""The multiple-choice knapsack: one option for every layer, so that costs add up to a budget and the loss is least.

A dynamic programme over layers (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11): of all choices
for the layers so far it keeps those that no other beats in both cost and loss. What is left after the last layer is the
whole Pareto front, so one run answers every budget. It is exact as long as no more than `MOST` choices are kept;
beyond, costs are told apart only to a share of 1 / `MOST` in each layer.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from r2cli.errors import InputError

MOST = 20_000

Array = np.ndarray[Any, Any]
Options = Mapping[Any, tuple[float, float]]  # an option: (cost, loss)


@dataclass(frozen=True)
class Front:
    """Choices that no other beats, from the cheapest to the dearest. `costs` and `losses` are (choices,)."""

    costs: Array
    losses: Array
    layers: Mapping[str, Sequence[Hashable]]  # the options of each layer
    _steps: Sequence[tuple[Array, Array]]  # of each layer: which choice of the layers before, and which option

    def choice(self, place: int) -> dict[str, Any]:
        """The option of every layer in the choice at `place`."""
        found: dict[str, Any] = {}
        for name, (before, option) in zip([*self.layers][::-1], self._steps[::-1], strict=True):
            found[name] = self.layers[name][option[place]]
            place = before[place]
        return {name: found[name] for name in self.layers}

    def within(self, budget: float, unit: str = "") -> int:
        """The place of the choice with the least loss in `budget`. Raises InputError where none costs so little."""
        place = int(np.searchsorted(self.costs, budget * (1 + 1e-12), side="right")) - 1
        if place < 0:
            wanted, least = (f"{each:,.0f}" if unit else f"{each:,.6g}" for each in (budget, self.costs[0]))
            raise InputError(f"the target of {wanted}{unit} is out of reach: the layers take {least}{unit} at least")
        return place

    def thinned(self, count: int) -> list[int]:
        """The places of at most `count` choices, evenly spread over costs, both ends among them."""
        wanted = np.linspace(self.costs[0], self.costs[-1], count)
        return sorted({int(place) for place in np.searchsorted(self.costs, wanted)})


def front(layers: Mapping[str, Options]) -> Front:
    """The Pareto front of one option for every layer. Costs are at least 0."""
    costs, losses = np.zeros(1), np.zeros(1)
    steps = []
    for own in layers.values():
        more, worse = (np.array([option[part] for option in own.values()], dtype=np.float64) for part in (0, 1))
        cost, loss = (costs[:, None] + more).ravel(), (losses[:, None] + worse).ravel()
        order = np.lexsort((loss, cost))
        # Of choices in the order of their cost, those that lose less than every cheaper one.
        before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order][:-1]]))
        kept = order[loss[order] < before]
        if len(kept) > MOST:
            cell = np.ceil((cost[kept] - cost[kept[0]]) / (cost[kept[-1]] - cost[kept[0]]) * (MOST - 1))
            # The last of a cell loses least. The cheapest of all has a cell of its own.
            kept = kept[np.append(cell[1:] != cell[:-1], True)]
        costs, losses = cost[kept], loss[kept]
        steps.append((kept // len(own), kept % len(own)))
    return Front(costs, losses, {name: list(own) for name, own in layers.items()}, steps)
