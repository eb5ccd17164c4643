"""DoReFa: a tanh maps the weights to [-1, 1], onto odd levels; activations are clipped at a fixed bound.

Paper: Zhou et al., "DoReFa-Net" (2016), equations 5 to 10.

    W_q = 2 * round(n * x) / n - 1,  x = tanh(W) / (2 max|tanh W|) + 1/2,  n = 2**b - 1      1 bit: mean|W| * sign(W)
    dW_q/dW = (1 - tanh(W)**2) / max|tanh W|, with rounding straight through and the maximum constant    1 bit: 1
    activations: round(n * clip(x, 0, 1)) / n

`reference` is the formula with its gradient. The kernel computes the same from the weight alone, in chunks that stay in
cache; tests/test_qat_methods.py holds the two equal. Its time has not been compared with the formula's.

Where we differ from the paper:

- The levels reach from -1 to 1 whatever the scale of the weights. A BatchNorm after the layer undoes that. Where there
  is none, a constant factor does: the least-squares factor of the weights at the start.
- Activations are clipped at the constant that loses least of the first images, not at 1. The paper trains from scratch,
  where the network can adapt to 1; a trained network has ranges of its own.
"""

from typing import Any

import torch
from torch import Tensor

from r2cli.qat import quantizers
from r2cli.qat.qat_method import QatMethod
from r2cli.quantized import fake_quant
from r2cli.quantized.coded import Coded
from r2cli.quantized.fake_quant import Bound, SlopeRule
from r2cli.quantized.grid import Grid


def reference(w: Tensor, bits: int, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return W_q of `w` (any shape), and the gradient by `w` where `g` is the gradient by W_q: equations 5 to 9."""
    if bits == 1:
        return torch.where(w >= 0, 1.0, -1.0).to(w) * w.abs().mean(), g
    n, tanh = 2**bits - 1, w.tanh()
    # A constant to the gradient. Differentiated, it would change the gradient of the largest weight alone.
    most = tanh.abs().max()
    x = tanh / (2 * most) + 1 / 2
    return 2 * (n * x).round() / n - 1, g * (1 - tanh**2) / most


def quantized(w: Tensor, bits: int, factor: Tensor) -> Tensor:
    """Return W_q of `w` (any shape) times `factor` (), with `reference`'s gradient. At 1 bit `factor` is not used."""
    out: Tensor = _Quantized.apply(w, factor, bits)
    return out


def top(w: Tensor) -> Tensor:
    """Return max|tanh W| (), which is tanh(max|W|) because tanh is monotone."""
    low, high = torch.aminmax(w.detach())
    return torch.maximum(-low, high).tanh().clamp_min(fake_quant.FLOOR)


def to_codes(w: Tensor, bits: int, most: Tensor, out: Tensor) -> Tensor:
    """Write round(n * x), which is 0 to n, to `out`: for weights of any shape, whose max|tanh| is `most` ()."""
    if bits == 1:
        # Not sign(): that has a third value, 0, for a weight of exactly 0.
        return out.copy_(w >= 0)
    n = 2**bits - 1
    return torch.tanh(w, out=out).mul_(n / (2 * most)).add_(n / 2).round_().clamp_(0, n)


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, factor: Tensor, bits: int) -> Tensor:
        w = fake_quant.dense(w)
        most, scale = top(w), scale_of(w, bits, factor)
        y = torch.empty_like(w)
        for a, b in fake_quant.chunks(w, y):
            # In this order it is what a mid-rise Grid decodes, bit for bit: training computes with the exported weight.
            to_codes(a, bits, most, b).mul_(2).sub_(2**bits - 1).mul_(scale)
        ctx.save_for_backward(w, most, factor)
        ctx.bits = bits
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        w, most, factor = ctx.saved_tensors
        if ctx.bits == 1:
            return g, None, None
        gw = torch.empty_like(w)
        for a, b, out in fake_quant.chunks(fake_quant.like(g, w), w, gw):
            # tanh again: keeping it from the forward pass would hold one more tensor of each layer in memory.
            tanh = torch.tanh(b)
            torch.ops.aten.tanh_backward.grad_input(a, tanh, grad_input=out).mul_(factor / most)
        return gw, None, None


def scale_of(w: Tensor, bits: int, factor: Tensor) -> Tensor:
    """Return the number () that the odd integers -n .. n are multiplied by."""
    # At 1 bit the levels are -mean|W| and mean|W| already, so they need no factor.
    return w.detach().abs().mean().clamp_min(fake_quant.FLOOR) if bits == 1 else factor / (2**bits - 1)


class DorefaWeight(quantizers.WeightQuantizer):
    """DoReFa's quantizer of a weight. It has nothing to train: `factor` () is constant."""

    factor: Tensor

    def __init__(self, w: Tensor, bits: int, fitted: bool = False) -> None:
        super().__init__(w, bits, fitted)
        self.register_buffer("factor", torch.ones((), dtype=w.dtype, device=w.device))

    @torch.no_grad()
    def keep_scale(self, w: Tensor) -> None:
        """Set the factor to sum(W W_q) / sum(W_q**2), for which the levels are nearest to the weight `w`."""
        # Without it, the weights of such a layer would be as large as 1, and its output many times too large.
        rounded = quantized(w, self.bits, torch.ones_like(self.factor))
        self.factor.copy_(((w * rounded).sum() / rounded.square().sum()).clamp_min(fake_quant.FLOOR))

    def freeze(self, w: Tensor) -> Coded:
        w = w.detach()
        scale = scale_of(w, self.bits, self.factor).clone()
        # Odd levels have none at 0 and would need a zero point of n / 2, which is no integer: hence a mid-rise grid.
        grid = Grid(scale, torch.zeros_like(scale, dtype=torch.int32), self.bits, signed=True, midrise=True)
        return Coded(grid, to_codes(w, self.bits, top(w), torch.empty_like(w)).to(torch.uint8))

    def forward(self, w: Tensor) -> Tensor:
        return quantized(w, self.bits, self.factor)


def slope(g: Tensor, x: Tensor, y: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
    """Write `g` to `out` where x is inside the range, else 0. Returns 0: the bound is not trained."""
    # `below`, so that x = low passes the gradient too, as in PACT's 0 <= x < a.
    fake_quant.inside(g, x, fake_quant.below(low, x), high, out)
    return g.new_zeros(())


class DorefaActivation(quantizers.ActivationQuantizer):
    """DoReFa's quantizer of an activation. `parameter` () is the width of the range, a constant."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("parameter", torch.ones(()))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        super().start(x)
        self.parameter.copy_(quantizers.best_range(x, self.bits, self.zero))

    def step(self) -> Tensor:
        found: Tensor = quantizers.positive(self.parameter) / (2**self.bits - 1)
        return found

    def rule(self, x: Tensor) -> SlopeRule:
        return SlopeRule(slope, torch.zeros_like(self.parameter))


METHOD = QatMethod(DorefaWeight, DorefaActivation)
