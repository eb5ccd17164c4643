"""PACT: activations clipped at a learned bound. Its weights are DoReFa's.

Paper: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks" (2018), equations 1 to 3.

    y = round(clip(x, 0, a) * n / a) * a / n,    n = 2**b - 1
    dy/dx = 1 for 0 <= x < a, else 0             dy/da = 1 for x >= a, else 0

`reference` is the formula with its gradient; `slope` gives the same from x and y alone (tests/test_qat_methods.py holds
them equal). A step of ResNet-18 takes 1.09 float steps, and 1.42 with a quantizer in autograd's plain operations, as
Brevitas has it (benchmarks/qat.md).

`a` decays as the weights do. It starts where least is lost of the first images, at 10 in the paper: a short schedule
does not come down from there.
"""

import torch
from torch import Tensor, nn

from r2cli.qat import dorefa, quantizers
from r2cli.qat.qat_method import QatMethod
from r2cli.quantized import fake_quant
from r2cli.quantized.fake_quant import Bound, Rule

FLOOR = 1e-3  # of a


def reference(x: Tensor, a: Tensor, bits: int, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y of x (any shape) and the bound a (), and for its gradient `g` those of x and of a: equations 1 to 3."""
    n = 2**bits - 1
    y = (x.clamp(min=0).minimum(a) * n / a).round() * a / n
    dy_dx = torch.where((x >= 0) & (x < a), 1.0, 0.0)
    dy_da = torch.where(x >= a, 1.0, 0.0)
    return y, g * dy_dx, (g * dy_da).sum()


def slope(g: Tensor, x: Tensor, y: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
    """The gradient of x of `reference`, into `out`, and a * sum(g * dy/da) of one chunk: y outside is a bound, which is
    a constant times a."""
    fake_quant.inside(g, x, fake_quant.below(low, x), high, out)
    return torch.dot(g, y) - torch.dot(out, y)


class PactActivation(quantizers.ActivationQuantizer):
    """`parameter` is a: the width of the range, which begins at 0 where nothing is negative."""

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

    def rule(self, x: Tensor) -> Rule:
        return Rule(slope, 1 / quantizers.positive(self.parameter, FLOOR))


METHOD = QatMethod(dorefa.DorefaWeight, PactActivation, decays=True)
