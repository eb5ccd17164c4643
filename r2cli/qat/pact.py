"""PACT: activations are clipped at a bound that is trained. The weights are quantized as in DoReFa.

Paper: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks" (2018), equations 1 to 3.

    y = round(clip(x, 0, a) * n / a) * a / n,    n = 2**b - 1
    dy/dx = 1 for 0 <= x < a, else 0             dy/da = 1 for x >= a, else 0

`reference` is the formula with its gradient. `slope` gives the same from x and y alone; tests/test_qat_methods.py holds
the two equal. A training step of ResNet-18 takes as long as 1.09 steps in float; with a quantizer written in autograd's
operations, as in Brevitas, it takes 1.42 (benchmarks/qat.md).

`a` has the weight decay of the weights, as in the paper. Where we differ: it starts at the bound that loses least of
the first images, not at 10. A short schedule does not come down from 10.
"""

import torch
from torch import Tensor, nn

from r2cli.qat import dorefa, quantizers
from r2cli.qat.qat_method import QatMethod
from r2cli.quantized import fake_quant
from r2cli.quantized.fake_quant import Bound, SlopeRule

FLOOR = 1e-3  # the least `a`: at 0 the step would be 0, and the integers would be x / 0


def reference(x: Tensor, a: Tensor, bits: int, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y of `x` (any shape) for the bound `a` (), and the gradients by x and a where `g` is that by y.

    Equations 1 to 3. The gradients are written out: autograd, given y with a straight-through rounding, would add the
    gradient of `a` as a scale, which is LSQ's and not PACT's.
    """
    n = 2**bits - 1
    y = (x.clamp(min=0).minimum(a) * n / a).round() * a / n  # `minimum`, because clamp takes no tensor beside a number
    dy_dx = torch.where((x >= 0) & (x < a), 1.0, 0.0)
    dy_da = torch.where(x >= a, 1.0, 0.0)
    return y, g * dy_dx, (g * dy_da).sum()


def slope(g: Tensor, x: Tensor, y: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
    """Write `reference`'s gradient by x to `out`, and return a * sum(g * dy/da) of one chunk, ().

    Outside the range y is a bound, which is a constant times a, so a * dy/da is y there.
    """
    # `below`, because the paper passes the gradient at x = 0 too.
    fake_quant.inside(g, x, fake_quant.below(low, x), high, out)
    return torch.dot(g, y) - torch.dot(out, y)


class PactActivation(quantizers.ActivationQuantizer):
    """PACT's quantizer of an activation. `parameter` () is a, the width of a range that begins at 0.

    Where values are negative the range begins below 0, and `parameter` is still its width. The levels are LSQ's, whose
    parameter is the step; only the gradients differ.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.parameter = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        super().start(x)
        self.parameter.copy_(quantizers.best_range(x, self.bits, self.zero))

    def step(self) -> Tensor:
        found: Tensor = quantizers.positive(self.parameter, FLOOR) / (2**self.bits - 1)
        return found

    def rule(self, x: Tensor) -> SlopeRule:
        return SlopeRule(slope, 1 / quantizers.positive(self.parameter, FLOOR))


METHOD = QatMethod(dorefa.DorefaWeight, PactActivation, decays=True)
