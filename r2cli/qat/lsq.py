"""LSQ: the step of the levels is learned with the weights.

Paper: Esser et al., "Learned Step Size Quantization" (2020), equations 1 to 3 and section 2.2.

`reference` is the formula with its gradient. In training `fake_quant.quantize` rounds and keeps x and y alone, and
`slope` and `rule` give the same gradient (tests/test_qat_methods.py holds them equal). A step of ResNet-18 takes 1.05
float steps, and 1.42 with a quantizer in autograd's plain operations, as Brevitas has it (benchmarks/qat.md).

s starts as 2 * mean|x| / sqrt(Qp), or with `fitted` where least is lost.
"""

import torch
from torch import Tensor, nn

from r2cli.qat import quantizers
from r2cli.qat.qat_method import EpochStart, QatMethod
from r2cli.qat.quantizer_placement import Prepared
from r2cli.quantized import fake_quant
from r2cli.quantized.coded import Coded
from r2cli.quantized.fake_quant import Bound, Codes, Rule
from r2cli.quantized.grid import Grid

BINS_FROM = 0.5  # share of the epochs after which bin regularization sets in


def reference(x: Tensor, s: Tensor, codes: Codes, count: int, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y of x (any shape) and the step s (), and for its gradient `g` those of x and of s: equations 1 to 3.

    `codes` are -Qn and Qp: -2**(b-1) and 2**(b-1) - 1 of weights, 0 and 2**b - 1 of activations. `count` is N, the
    number of a layer's weights, or of a sample's activations.
    """
    lowest, highest = codes
    v = x / s
    y = s * v.clamp(lowest, highest).round()
    inside = (v > lowest) & (v < highest)
    dy_dx = torch.where(inside, 1.0, 0.0)  # 0 at the bounds too
    dy_ds = torch.where(inside, v.round() - v, v.clamp(lowest, highest))
    return y, g * dy_dx, (g * dy_ds).sum() / (count * highest) ** 0.5


def slope(g: Tensor, x: Tensor, y: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
    """The gradient of x of `reference`, into `out`, and s * sum(g * dy/ds) of one chunk.

    s * dy/ds is y - x inside and y elsewhere: the sum of g * y less that of g * x inside, two dot products.
    """
    fake_quant.inside(g, x, low, high, out)
    return torch.dot(g, y) - torch.dot(out, x)


def rule(count: int, highest: int, step: Tensor) -> Rule:
    """What `fake_quant.quantize` does with it: the chunks' sum times 1 / s and 1 / sqrt(N * Qp)."""
    return Rule(slope, 1 / (step * max(count * highest, 1) ** 0.5))


def first_step(x: Tensor, highest: int) -> Tensor:
    """The step () to start from, for values of any shape and Qp."""
    found: Tensor = (2 * x.abs().mean() / max(highest, 1) ** 0.5).clamp_min(fake_quant.FLOOR)
    return found


class LsqWeight(quantizers.WeightQuantizer):
    def __init__(self, w: Tensor, bits: int, fitted: bool = False) -> None:
        super().__init__(w, bits, fitted)
        self.step = nn.Parameter(torch.empty((), dtype=w.dtype, device=w.device))
        self.start(w)

    @torch.no_grad()
    def start(self, w: Tensor) -> None:
        if self.fitted:
            self.step.copy_(quantizers.best_range(w, self.bits, -self.codes[0]) / (2**self.bits - 1))
        else:
            self.step.copy_(first_step(w, self.codes[1]))

    @property
    def codes(self) -> Codes:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def freeze(self, w: Tensor) -> Coded:
        step = quantizers.positive(self.step)
        grid = Grid(step, torch.zeros_like(step, dtype=torch.int32), self.bits, signed=True)
        return Coded(grid, grid.encode(w.detach()))

    def forward(self, w: Tensor) -> Tensor:
        step = quantizers.positive(self.step)
        return fake_quant.quantize(w, self.step, step, self.codes, rule(w.numel(), self.codes[1], step))


class LsqActivation(quantizers.ActivationQuantizer):
    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.parameter = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        super().start(x)
        if self.fitted:
            self.parameter.copy_(quantizers.best_range(x, self.bits, self.zero) / (2**self.bits - 1))
        else:
            self.parameter.copy_(first_step(x, self.codes[1]))

    def step(self) -> Tensor:
        return quantizers.positive(self.parameter)

    def rule(self, x: Tensor) -> Rule:
        return rule(x[0].numel(), self.codes[1], self.step())


# --- bin regularization --------------------------------------------------------------------------------------------


def bins(w: Tensor, step: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Bin regularization of a weight of any shape, (), and its gradient by the weight.

    Paper: Han et al., "Improving Low-Precision Network Quantization via Bin Regularization" (2021), equation 5. Every
    code's weights are drawn to its level t: (mean(w) - t)**2 + var(w), which is their mean of (w - t)**2. Levels are
    constants to the gradient; codes that no weight has count for nothing.
    """
    away = w - fake_quant.to_levels(w, step, codes, torch.empty_like(w))
    index = ((w - away) / step).round_().sub_(codes[0]).long().flatten()
    count = torch.bincount(index, minlength=codes[1] - codes[0] + 1).clamp_min_(1).to(w.dtype)
    share = away / count[index].reshape(w.shape)
    return (away * share).sum(), 2 * share


@torch.no_grad()
def draw_to_levels(prepared: Prepared, epoch: EpochStart) -> None:
    """Add bin regularization's gradients, in the second half of the epochs."""
    strength: float = epoch.options.bin_reg
    if not strength or epoch.number <= BINS_FROM * epoch.epochs:
        return
    for layer, learner, weight in prepared.each():
        assert isinstance(learner, LsqWeight) and weight.grad is not None, layer.name
        _, gradient = bins(weight, quantizers.positive(learner.step), learner.codes)
        weight.grad.add_(gradient, alpha=strength)


METHOD = QatMethod(LsqWeight, LsqActivation, add_gradients=draw_to_levels)
