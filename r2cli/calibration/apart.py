"""Grids that follow each other are one, or more than a level apart: OpenVINO takes them for one.

Where codes of one grid are rounded to the next one, with sums and products with numbers or a clip between them,
OpenVINO 2026.4 asks only whether the ends of the second are within a level of the first's ends. If they are, it leaves
the second rounding out (its EliminateFakeQuantize): the codes stay as they are. That is right up to half a level. A sum
with a number that shifts codes by 0.9 of a level loses that shift, and each value is a level away from what the file
says: a detector of text was 10 dB from ONNX Runtime by five such sums.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from r2cli.graph.edit import is_grid
from r2cli.graph.operators import ACTIVATIONS, PASSING, is_a
from r2cli.quantized.grid import MAX_BITS, Grid

LEVEL = 255 / 256  # as OpenVINO counts it
HALF = 0.49  # of a level: nearer than that to the middle of two, runtimes round as their sums of floats fall
BEYOND = 257.5 / 255  # a range of two and a half levels more: one of its ends is more than a level away


@dataclass(frozen=True)
class Affine:
    """How a value comes from the value `read`, which has a grid: times `factor`, plus `shift`; and clipped perhaps."""

    read: str
    factor: float = 1.0
    shift: float = 0.0

    def ends(self, grids: Mapping[str, Grid], grid: Grid) -> tuple[float, float]:
        """Where the first and the last level of `grid` lie, in levels from the first and the last of what is read."""
        own = grids[self.read]
        least, most = (
            ((code - int(grid.zero_point)) * float(grid.scale) - self.shift) / (self.factor * float(own.scale))
            + int(own.zero_point)
            for code in (grid.lowest, grid.highest)
        )
        return least - own.lowest, most - own.highest


def apart(net: fx.GraphModule, grids: Mapping[str, Grid], *, symmetric: bool = False) -> dict[str, Grid]:
    """`grids` by node of `net`, without those of 8 bits whose ends are between half a level and one from those that
    their values come from. They take that grid's levels over, or where they cannot, have steps of 1 % more.

    Levels that are taken over are as many as before, and their steps the same. In a `symmetric` grid the middle code
    stays 0.
    """
    found = dict(grids)
    for node in net.graph.nodes:
        steps = list(_steps(net, node, found)) if node.name in found else []
        if steps and all(found[one.read].bits == found[node.name].bits == MAX_BITS for one in steps):
            found[node.name] = _of_steps(steps, found, found[node.name], symmetric)
    return found


def shifted(net: fx.GraphModule, grids: Mapping[str, Grid]) -> set[str]:
    """The values, by name, that are a sum of a value on one of `grids` with a number, and are on one themselves."""
    nodes = [node for node in net.graph.nodes if node.name in grids]
    return {node.name for node in nodes if any(one.shift for one in _steps(net, node, grids))}


def _of_steps(steps: list[Affine], grids: Mapping[str, Grid], grid: Grid, symmetric: bool) -> Grid:
    far = [abs(end) for step in steps for end in step.ends(grids, grid)]
    if max(far) > LEVEL or max(far) <= HALF:
        return grid
    if len(steps) == 1 and not symmetric:
        step, own = steps[0], grids[steps[0].read]
        scale = own.scale * step.factor
        zero = round(int(own.zero_point) - step.shift / float(scale))
        taken = replace(grid, scale=scale, zero_point=torch.tensor(zero, dtype=torch.int32))
        if grid.lowest <= zero <= grid.highest and max(map(abs, step.ends(grids, taken))) <= HALF:
            return taken
    return replace(grid, scale=grid.scale * BEYOND)


def _steps(net: fx.GraphModule, node: fx.Node, grids: Mapping[str, Grid]) -> Iterator[Affine]:
    """From which values on grids the value of `node` comes, where only numbers, clips and joining lie between."""
    if is_a(net, node, (torch.add, torch.mul)):
        number = node.args[1]
        if not isinstance(number, int | float) or (node.target is torch.mul and number <= 0):
            return
        factor, shift = (float(number), 0.0) if node.target is torch.mul else (1.0, float(number))
    elif is_a(net, node, (*ACTIVATIONS, torch.clamp, torch.cat)):
        factor, shift = 1.0, 0.0
    else:
        return
    for value in node.all_input_nodes:
        read = value
        while is_grid(read) or (read.name not in grids and is_a(net, read, PASSING)):
            read = read.all_input_nodes[0]
        if read.name not in grids:
            return
        yield Affine(read.name, factor, shift)
