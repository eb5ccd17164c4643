"""PACT: activations clipped at a learned bound. Its weights are DoReFa's.

Paper: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks" (2018), equations 1 to 3.

    y = round(clip(x, 0, a) * n / a) * a / n,    n = 2**b - 1
    dy/dx = 1 for 0 <= x < a, else 0             dy/da = 1 for x >= a, else 0

`a` decays as the weights do. It starts where least is lost of the first images, at 10 in the paper: a short schedule
does not come down from there.
"""

import torch
from torch import Tensor, nn

from r2cli import rounding
from r2cli.qat import learners
from r2cli.rounding import Bound, Rule

FLOOR = 1e-3  # of a


def slope(g: Tensor, x: Tensor, y: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
    """The sum of g * dy/da where nothing is negative."""
    rounding.inside(g, x, rounding.below(low, x), high, out)
    return rounding.from_above(g, x, high)


class Activation(learners.Activation):
    """`parameter` is a: the width of the range, which begins at 0 where nothing is negative."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.parameter = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        super().start(x)
        self.parameter.copy_(learners.best_range(x, self.bits, self.zero))

    def step(self) -> Tensor:
        found: Tensor = learners.positive(self.parameter, FLOOR) / (2**self.bits - 1)
        return found

    def rule(self, x: Tensor) -> Rule:
        one = self.parameter.detach().new_ones(())
        if not self.zero:
            return Rule(slope, one)
        share = self.zero / (2**self.bits - 1)

        def two_sided(g: Tensor, x: Tensor, y: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
            above = slope(g, x, y, low, high, out)
            under = g.sum() - out.sum() - above
            found: Tensor = (1 - share) * above - share * under
            return found

        return Rule(two_sided, one)
