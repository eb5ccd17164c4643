"""Weights that swing between two levels: what dampens them, and what holds them still.

Paper: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (2022), sections 4.2 and 4.3.

A weight near the middle between two levels is pushed over it by one step and back by the next. It ends on either side
by chance, and statistics of BatchNorm are wrong at once. Few bits and depthwise layers suffer most.
"""

import math

import torch
from torch import Tensor, nn

from r2cli.quantized import fake_quant
from r2cli.quantized.fake_quant import Codes

MEMORY = 0.01  # share of the newest step in the averages (the paper's m)
FIRST = 4  # the threshold begins at so many times the one it ends at: the paper's 0.04 and 0.01


def dampening(w: Tensor, step: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Return the loss () of weights `w` (any shape) that are away from their levels, and its gradient by w: equation 6.

    Weights beyond the last level count as on it: there is no other level to swing to. The levels are constants.
    """
    lowest, highest = codes
    away = w.clamp(step * lowest, step * highest) - fake_quant.to_levels(w, step, codes, torch.empty_like(w))
    return away.square().sum(), 2 * away


def share_at(number: int, epochs: int) -> float:
    """Return how far epoch `number` (from 1) of `epochs` is, from 0 to 1 by half a cosine."""
    return 0.5 * (1 - math.cos(math.pi * (number - 1) / max(1, epochs - 1)))


def threshold(end: float, number: int, epochs: int) -> float:
    """Return the greatest share of steps in which a weight may turn back, in epoch `number` (from 1) of `epochs`."""
    return end * (FIRST - (FIRST - 1) * share_at(number, epochs))


class Oscillation(nn.Module):
    """How often each weight of a layer turns back, and which weights are held: algorithm 1.

    All are buffers of the weight's shape, so that a resumed run goes on with them. A weight that is held keeps its
    code; the step between levels is still learned.
    """

    code: Tensor
    way: Tensor
    rate: Tensor
    mean: Tensor
    held: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("code", torch.empty_like(codes, dtype=torch.int16))
        self.register_buffer("way", torch.empty_like(codes, dtype=torch.int16))  # of the last move: -1, 0 or 1
        self.register_buffer("rate", torch.empty_like(codes, dtype=torch.float32))  # of turns per step
        self.register_buffer("mean", torch.empty_like(codes, dtype=torch.float32))  # of the code
        self.register_buffer("held", torch.empty_like(codes, dtype=torch.bool))
        self.start(codes)

    @torch.no_grad()
    def start(self, codes: Tensor) -> None:
        """Begin with the weights at these codes, and hold none."""
        self.code.copy_(codes)
        self.mean.copy_(codes)
        for buffer in (self.way, self.rate, self.held):
            buffer.zero_()

    @torch.no_grad()
    def observe(self, codes: Tensor, most: float) -> None:
        """Take the codes after a step, and hold the weights that turn back in more than the share `most` of steps.

        They are held at the code where they were most of the time.
        """
        move = (codes - self.code).sign().to(torch.int16)
        turned = (move == -self.way) & (move != 0)
        self.rate.lerp_(turned.float(), MEMORY)
        self.mean.copy_(torch.where(self.held, self.mean, self.mean.lerp(codes.float(), MEMORY)))
        self.way.copy_(torch.where(move == 0, self.way, move))
        self.code.copy_(codes)
        held = self.held | (self.rate > most)
        self.mean.copy_(torch.where(held, self.mean.round(), self.mean))
        self.held.copy_(held)

    def used(self, w: Tensor, step: Tensor) -> Tensor:
        """Return the weights (any shape), with those that are held on their level. These get no gradient."""
        return torch.where(self.held, self.mean.to(w.dtype) * step, w)
