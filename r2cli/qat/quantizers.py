"""What the learners of all methods have: trainable quantizers of weights and of activations, and the wide grid.

A learner of weights stands between a layer's weight and what the layer computes with; what it gives, in training as in
evaluation, is `freeze(w).decode()` bit for bit. A learner of activations stands on an edge of the graph; it gives what
its `grid()` makes of the value. What they keep from step to step is in buffers and parameters, so that a resumed run
goes on with it.

All activations are unsigned with a zero point, which is 0 where nothing is negative and fixed when the learner starts;
with another one the papers' ranges [0, u] become [-u z / n, u (n - z) / n].
"""

import torch
from torch import Tensor, nn

from r2cli.calibration.calibrate import activation_grid
from r2cli.quantized import fake_quant
from r2cli.quantized.coded import Coded
from r2cli.quantized.fake_quant import Codes, Rule
from r2cli.quantized.grid import Grid

CANDIDATES = 64  # ranges that `best_range` tries
SAMPLE = 1 << 15  # values that it tries them on


class WeightQuantizer(nn.Module):
    """A quantizer of a weight. `fitted`: start where least is lost of the weight, in place of where the paper does.

    `reads` is the quantizer of what the layer reads, alone in a tuple; empty where there is none of low bits.
    """

    def __init__(self, w: Tensor, bits: int, fitted: bool = False) -> None:
        super().__init__()
        self.bits, self.fitted = bits, fitted
        self.reads: tuple[ActivationQuantizer, ...] = ()

    def start(self, w: Tensor) -> None:
        """Set what is trained from the weight (channels, ...) as it is."""

    def freeze(self, w: Tensor) -> Coded:
        """The codes of the float weight (channels, ...)."""
        raise NotImplementedError

    def forward(self, w: Tensor) -> Tensor:
        """The weight (channels, ...) that the layer computes with."""
        raise NotImplementedError

    def match(self, exact: Tensor, rounded: Tensor) -> None:
        """Told once what the layer makes of its first images: with floats, and with its quantized input and weight."""

    def keep_scale(self, w: Tensor) -> None:
        """Told of the float weight where no BatchNorm follows, which would take another scale back."""


class _OnEdge(nn.Module):
    """A zero point that a resumed run finds again, and whether a ReLU before this was left to it."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.zero, self.rectifies = bits, 0, False

    @property
    def codes(self) -> Codes:
        return -self.zero, 2**self.bits - 1 - self.zero

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.zero)

    def set_extra_state(self, state: Tensor) -> None:
        self.zero = int(state)

    def rectified(self, x: Tensor) -> Tensor:
        return x.clamp_min(0) if self.rectifies else x


class ActivationQuantizer(_OnEdge):
    """A quantizer of an activation: levels of one step, whose trained number is `parameter` ()."""

    parameter: Tensor
    fitted = False  # start where least is lost of the first values, in place of where the paper does
    starting = False  # the next values set the range
    tracing = False  # gradients of gradients are wanted: operations one by one
    seen: Tensor | None = None  # those values

    def start(self, x: Tensor) -> None:
        """Set the zero point and what is trained from values of any shape."""
        low, high = (float(end) for end in torch.aminmax(x))
        width, levels = max(high, 0.0) - min(low, 0.0), 2**self.bits - 1
        # One level at least on either side of the zero that is used.
        self.zero = 0 if low >= 0 else min(max(round(-low / width * levels), 1), max(levels - 1, 1))

    def step(self) -> Tensor:
        """The distance () of two levels."""
        raise NotImplementedError

    def rule(self, x: Tensor) -> Rule:
        """The gradient, for values as x."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.starting:
            self.seen = self.rectified(x)
            self.start(self.seen)
        return fake_quant.quantize(x, self.parameter, self.step(), self.codes, self.rule(x))

    def grid(self) -> Grid:
        zero = torch.tensor(self.zero, dtype=torch.int32)
        return Grid(self.step().detach().cpu().clone(), zero, self.bits, signed=False)


class WideQuantizer(_OnEdge):
    """An 8-bit grid over all that it saw when it last watched: for the input, sums, and what else is no layer's alone.

    Its gradient passes straight through: no value of those that it watched is clipped.
    """

    size: Tensor

    def __init__(self) -> None:
        super().__init__(8)
        self.watching, self.low, self.high = False, 0.0, 0.0
        self.register_buffer("size", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.watching:
            return self.watch(x)
        return fake_quant.quantize_straight(x, self.size, self.codes)

    def watch(self, x: Tensor) -> Tensor:
        x = self.rectified(x)
        low, high = torch.aminmax(x.detach())
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        return x

    def settle(self) -> None:
        """End watching: the grid over what was seen."""
        grid = activation_grid(self.low, self.high, self.bits)
        self.size.copy_(grid.scale)
        self.zero = int(grid.zero_point)
        self.watching, self.low, self.high = False, 0.0, 0.0

    def grid(self) -> Grid:
        zero = torch.tensor(self.zero, dtype=torch.int32)
        return Grid(self.size.cpu().clone(), zero, self.bits, signed=False)


class TwoGrids(nn.Module):
    """The wide grid, and behind it the levels that low-bit layers read: two values of one."""

    def __init__(self, wide: WideQuantizer, low: ActivationQuantizer) -> None:
        super().__init__()
        self.wide, self.low = wide, low

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide, low = self.wide, self.low
        if wide.watching or low.starting or low.tracing:
            first = wide(wide.rectified(x))
            return first, low(first)
        step = low.step()
        return fake_quant.quantize_behind(x, (wide.size, wide.codes), low.parameter, step, low.codes, low.rule(x))


def positive(number: Tensor, floor: float = fake_quant.FLOOR) -> Tensor:
    """A trained number () as it is used: what has left the positive side is held at its edge, and may come back."""
    return number.detach().clamp_min(floor)


def best_range(x: Tensor, bits: int, zero: int) -> Tensor:
    """The width () of the range of 2**bits levels, zero point given, that loses least of x: least squares."""
    flat = x.detach().flatten()
    sample = flat[:: max(1, len(flat) // SAMPLE)]
    levels = 2**bits - 1
    # The width that just holds everything, and shares of it.
    sides = [sample.amax() / (levels - zero)] if levels > zero else []
    sides += [-sample.amin() / zero] if zero else []
    widest = (torch.stack(sides).amax() * levels).clamp_min(1e-6)
    widths = widest * torch.arange(1, CANDIDATES + 1, device=x.device) / CANDIDATES
    codes = (-zero, levels - zero)
    errors = [
        (fake_quant.to_levels(sample, width / levels, codes, torch.empty_like(sample)) - sample).square().sum()
        for width in widths
    ]
    found: Tensor = widths[int(torch.stack(errors).argmin())]
    return found
