"""SEQ: weights of one or two bits on levels without a zero, as many above as below, with a step that is trained.

Paper: Liu et al., "ParetoQ: Scaling Laws in Extremely Low-bit LLM Quantization" (2025), section 3.3: stretched elastic
quantization at two bits, elastic binarization at one. With k = 2**bits levels and the distance s between two of them
(the paper's alpha is s * k / 2):

    y = s * (round(clip(w / s - 1/2, -k/2, k/2 - 1)) + 1/2)
    dy/dw = 1 for |w| < s * k / 2, else 0
    dy/ds = (y - w) / s inside, y / s outside; times 1 / sqrt(N * Qp), as in LSQ

At two bits LSQ's levels are -2, -1, 0 and 1 steps: one of four is zero, and only one is above it. Here they are -3/2,
-1/2, 1/2 and 3/2 steps. With three bits and more a zero costs little, so such a layer has LSQ's levels; activations
have them too. `reference` is the formula with its gradient, for the tests.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from r2cli.qat import ewgs, lsq
from r2cli.qat.qat_method import EpochStart, QatMethod
from r2cli.qat.quantizer_placement import Prepared
from r2cli.quantized import fake_quant
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid

MOST_BITS = 2  # with more, the levels are LSQ's


def reference(w: Tensor, s: Tensor, bits: int, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y of `w` (any shape) for the step `s` (), and the gradients by w and s where `g` is that by y.

    The formulas of this module's text, with N the number of weights, and Qp = k/2 - 1 but at least 1.
    """
    half = 2**bits / 2
    y = s * ((w / s - 0.5).clamp(-half, half - 1).round() + 0.5)
    inside = w.abs() < s * half
    slope = torch.where(inside, (y - w) / s, y / s)
    return y, g * inside, (g * slope).sum() / (w.numel() * max(half - 1, 1)) ** 0.5


class SeqWeight(lsq.LsqWeight):
    """SEQ's quantizer of a weight of one or two bits. It trains `step` (); with more bits it is LSQ's."""

    @torch.no_grad()
    def start(self, w: Tensor) -> None:
        if self.bits > MOST_BITS:
            super().start(w)
            return
        # `best_end` is where the last level is, (2**bits - 1) / 2 steps from 0.
        if self.fitted:
            self.step.copy_(ewgs.best_end(w, self.bits) * 2 / (2**self.bits - 1))
        else:
            self.step.copy_(first_step(w, self.bits))
        self.least.copy_(self.step * lsq.SMALLEST)

    def freeze(self, w: Tensor) -> Coded:
        if self.bits > MOST_BITS:
            return super().freeze(w)
        grid = _grid(self.used_step(), self.bits)
        return Coded(grid, grid.encode(w.detach()))

    def forward(self, w: Tensor) -> Tensor:
        if self.bits > MOST_BITS:
            return super().forward(w)
        found: Tensor = _Rounded.apply(w, self.step, self.used_step(), self.bits)
        return found


class _Rounded(torch.autograd.Function):
    """Weights on their levels, with the gradients of the module's text."""

    @staticmethod
    def forward(ctx: FunctionCtx, w: Tensor, parameter: Tensor, step: Tensor, bits: int) -> Tensor:
        grid = _grid(step, bits)
        y = grid.decode(grid.encode(w)).to(w.dtype)
        ctx.save_for_backward(w, y, step)
        ctx.half = 2 ** (bits - 1)  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *given: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (g,), (w, y, step), half = given, ctx.saved_tensors, ctx.half  # type: ignore[attr-defined]
        inside = torch.where(w.abs() < step * half, g, 0.0)
        moved = (g * y).sum() - (inside * w).sum()
        return inside, moved / (step * (w.numel() * max(half - 1, 1)) ** 0.5), None, None


def _grid(step: Tensor, bits: int) -> Grid:
    """The levels: odd multiples of half a step."""
    return Grid(step / 2, torch.zeros_like(step, dtype=torch.int32), bits, signed=True, midrise=True)


def first_step(w: Tensor, bits: int) -> Tensor:
    """Return the step () that the authors start from: the levels' range holds max|w|, and at one bit 2 * mean|w|."""
    found: Tensor = 2 * w.abs().mean() if bits == 1 else w.abs().amax() / 2 ** (bits - 1)
    return found.clamp_min(fake_quant.FLOOR)


def add_gradients(prepared: Prepared, epoch: EpochStart) -> None:
    lsq.bound_steps(prepared)


METHOD = QatMethod(SeqWeight, lsq.LsqActivation, add_gradients=add_gradients, collapsed=lsq.collapsed)
