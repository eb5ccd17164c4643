"""DoReFa: weights squeezed by a tanh onto odd levels, and activations clipped at a fixed bound.

Paper: Zhou et al., "DoReFa-Net" (2016), equations 5 to 10.

    W_q = 2 * round(n * x) / n - 1,  x = tanh(W) / (2 max|tanh W|) + 1/2,  n = 2**b - 1      1 bit: mean|W| * sign(W)
    dW_q/dW = (1 - tanh(W)**2) / max|tanh W|, the rounding straight through and the maximum a constant    1 bit: 1
    activations: round(n * clip(x, 0, 1)) / n

`reference` is the formula with its gradient. The kernel gives the same from the weight alone, in chunks that stay in
cache (tests/test_qat_methods.py holds them equal); its time beside the formula's is not measured.

Levels reach from -1 to 1 whatever the weights' scale: a BatchNorm behind the layer takes it back, and where there is
none a constant factor does, the least-squares one of the weights as they are at first. Ours: activations are clipped at
a constant that loses least of the first images, not at 1: the paper trains from scratch, where 1 is as good as any.
"""

from typing import Any

import torch
from torch import Tensor

from r2cli.qat import quantizers
from r2cli.qat.qat_method import QatMethod
from r2cli.quantized import fake_quant
from r2cli.quantized.coded import Coded
from r2cli.quantized.fake_quant import Bound, Rule
from r2cli.quantized.grid import Grid


def reference(w: Tensor, bits: int, g: Tensor) -> tuple[Tensor, Tensor]:
    """W_q of w (any shape), and for its gradient `g` that of w: equations 5 to 9."""
    if bits == 1:
        return torch.where(w >= 0, 1.0, -1.0).to(w) * w.abs().mean(), g
    n, tanh = 2**bits - 1, w.tanh()
    most = tanh.abs().max()
    x = tanh / (2 * most) + 1 / 2
    return 2 * (n * x).round() / n - 1, g * (1 - tanh**2) / most


def quantized(w: Tensor, bits: int, factor: Tensor) -> Tensor:
    """DoReFa's weight times `factor` (), any shape: `reference` times that."""
    out: Tensor = _Quantized.apply(w, factor, bits)
    return out


def top(w: Tensor) -> Tensor:
    """max|tanh W| (): tanh is monotone."""
    low, high = torch.aminmax(w.detach())
    return torch.maximum(-low, high).tanh().clamp_min(fake_quant.FLOOR)


def to_codes(w: Tensor, bits: int, most: Tensor, out: Tensor) -> Tensor:
    """round(n * x), 0 to n, of weights of any shape whose max|tanh| is `most` (), into `out`."""
    if bits == 1:
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
            tanh = torch.tanh(b)
            torch.ops.aten.tanh_backward.grad_input(a, tanh, grad_input=out).mul_(factor / most)
        return gw, None, None


def scale_of(w: Tensor, bits: int, factor: Tensor) -> Tensor:
    """What the odd integers -n .. n are multiplied by, ()."""
    return w.detach().abs().mean().clamp_min(fake_quant.FLOOR) if bits == 1 else factor / (2**bits - 1)


class DorefaWeight(quantizers.WeightQuantizer):
    factor: Tensor

    def __init__(self, w: Tensor, bits: int, fitted: bool = False) -> None:
        super().__init__(w, bits, fitted)
        self.register_buffer("factor", torch.ones((), dtype=w.dtype, device=w.device))

    @torch.no_grad()
    def keep_scale(self, w: Tensor) -> None:
        """Choose the factor for which the levels are nearest to the weight: no BatchNorm takes another one back."""
        rounded = quantized(w, self.bits, torch.ones_like(self.factor))
        self.factor.copy_((w * rounded).sum() / rounded.square().sum())

    def freeze(self, w: Tensor) -> Coded:
        w = w.detach()
        scale = scale_of(w, self.bits, self.factor).clone()
        grid = Grid(scale, torch.zeros_like(scale, dtype=torch.int32), self.bits, signed=True, midrise=True)
        return Coded(grid, to_codes(w, self.bits, top(w), torch.empty_like(w)).to(torch.uint8))

    def forward(self, w: Tensor) -> Tensor:
        return quantized(w, self.bits, self.factor)


def slope(g: Tensor, x: Tensor, y: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
    """Straight through inside; the bound is no parameter."""
    fake_quant.inside(g, x, fake_quant.below(low, x), high, out)
    return g.new_zeros(())


class DorefaActivation(quantizers.ActivationQuantizer):
    """`parameter` is the width of the range, a constant."""

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

    def rule(self, x: Tensor) -> Rule:
        return Rule(slope, torch.zeros_like(self.parameter))


METHOD = QatMethod(DorefaWeight, DorefaActivation)
