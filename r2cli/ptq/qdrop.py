"""QDrop: activations are rounded by chance while a block learns, and the steps of their grids are learned with it.

Paper: Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization" (2022),
section 3. In each step of learning, each element of an activation a is, with probability 1/2 each,

    a    or    s * (clip(round(a / s) + z, 0, n) - z)

and each element of the block's input is what the float network gives, or what the quantized one does.
Learning with all of them rounded fits the noise of the calibration images, and with none of them does not know of it.
The gradient of the step s is LSQ's (Esser et al., 2020): the code that was rounded minus the one that was not, inside
the range, and the code at the end of the range, beyond it.

Where we differ from the paper: the logarithm of the step is learned, so that one rate fits steps of all sizes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from r2cli.quantized.grid import Grid

PROBABILITY = 0.5  # of an element to be rounded
SLOWNESS = 0.1  # of steps beside the scales of weights: as fast as those, they fit the calibration images
BELOW = 8  # bits of activations: with 8 their noise is next to nothing beside the weights'

Change = Callable[[fx.Node, Tensor], Tensor]  # what becomes of the value (n, ...) of a node


@dataclass(frozen=True)
class LearnedStep:
    """The grid of an activation, with the step times exp(SLOWNESS * `size`), ()."""

    grid: Grid
    size: Tensor

    def step(self) -> Tensor:
        return self.grid.scale * (SLOWNESS * self.size).exp()

    def hard(self) -> Grid:
        return replace(self.grid, scale=self.step().detach())


def start(grids: Mapping[str, Grid]) -> dict[str, LearnedStep]:
    """Return steps that start at those of `grids`, by node."""
    return {name: LearnedStep(grid, torch.zeros_like(grid.scale).requires_grad_()) for name, grid in grids.items()}


def rounded(x: Tensor, grid: Grid, step: Tensor) -> Tensor:
    """Return x (n, ...) on `grid` with another `step`, (). Rounding has the gradient 1."""
    real = x / step
    codes = real + (torch.round(real) - real).detach() + grid.zero_point
    return (codes.clamp(grid.lowest, grid.highest) - grid.zero_point) * step


def unchanged(node: fx.Node, x: Tensor) -> Tensor:
    return x


def on_grids(grids: Mapping[str, Grid]) -> Change:
    """Round every value that has a grid."""
    return lambda node, x: rounded(x, grids[node.name], grids[node.name].scale) if node.name in grids else x


def by_chance(steps: Mapping[str, LearnedStep], draw: torch.Generator) -> Change:
    """Round every element of a value that has a step with PROBABILITY."""

    def change(node: fx.Node, x: Tensor) -> Tensor:
        own = steps.get(node.name)
        return x if own is None else mixed(rounded(x, own.grid, own.step()), x, draw)

    return change


def mixed(quantized: Tensor, real: Tensor, draw: torch.Generator) -> Tensor:
    """Return each element of `quantized` with PROBABILITY, and else that of `real`; all (n, ...)."""
    chosen = torch.rand(real.shape, generator=draw, device=real.device) < PROBABILITY
    return torch.where(chosen, quantized, real)
