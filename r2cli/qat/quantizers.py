"""What the quantizers of all methods share: the base classes for weights and for activations, and the wide grid.

A quantizer of a weight stands between the float weight and the layer. What it gives, in training as in evaluation, is
`freeze(w).decode()` bit for bit. A quantizer of an activation stands on an edge of the graph, and gives the value as
its `grid()` encodes and decodes it. What they keep from step to step is in buffers and parameters, so that a resumed
run continues with it.

All activations have unsigned codes with a zero point z. It is fixed when the quantizer starts, and is 0 where no value
is negative. With n + 1 levels, the papers' range [0, u] becomes [-u z / n, u (n - z) / n].
"""

import torch
from torch import Tensor, nn

from r2cli.calibration.calibrate import activation_grid
from r2cli.quantized import fake_quant
from r2cli.quantized.coded import Coded
from r2cli.quantized.fake_quant import Codes, SlopeRule
from r2cli.quantized.grid import Grid

CANDIDATES = 64  # how many ranges `best_range` tries
SAMPLE = 1 << 15  # how many values it tries them on: a batch's activations can be many millions


class WeightQuantizer(nn.Module):
    """A quantizer of a weight. With `fitted` it starts at the range that loses least of it, not where the paper starts.

    `reads` has the quantizer of what the layer reads, or nothing where that has no low bits. It is a tuple, because
    nn.Module would register a module that is an attribute, and that quantizer is registered on its own edge.
    """

    def __init__(self, w: Tensor, bits: int, fitted: bool = False) -> None:
        super().__init__()
        self.bits, self.fitted = bits, fitted
        self.reads: tuple[ActivationQuantizer, ...] = ()

    def start(self, w: Tensor) -> None:
        """Set the parameters from the weight (channels, ...) as it is now."""

    def freeze(self, w: Tensor) -> Coded:
        """Return the codes of the float weight (channels, ...), with the grid that decodes them."""
        raise NotImplementedError

    def forward(self, w: Tensor) -> Tensor:
        """Return the weight (channels, ...) that the layer computes with."""
        raise NotImplementedError

    def match(self, exact: Tensor, rounded: Tensor) -> None:
        """Take the layer's output on the first images: `exact` in float, `rounded` with quantized input and weight.

        Called once, when the quantizers start. Both outputs are without the bias.
        """

    def keep_scale(self, w: Tensor) -> None:
        """Keep the scale of the float weight (channels, ...). Called where no BatchNorm follows to undo a change."""


class _OnEdge(nn.Module):
    """A quantizer of an activation: its zero point, and whether it does the work of the ReLU before it too.

    The zero point is part of the state, so that a resumed run finds it again.
    """

    symmetric = False  # the zero point is the middle code, whatever the values

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.zero, self.rectifies = bits, 0, False

    @property
    def codes(self) -> Codes:
        """The lowest and the highest code, with the zero point taken off."""
        return -self.zero, 2**self.bits - 1 - self.zero

    # A plain number and no buffer, because the operations take the codes as Python numbers.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.zero)

    def set_extra_state(self, state: Tensor) -> None:
        self.zero = int(state)

    def rectified(self, x: Tensor) -> Tensor:
        """Return x (any shape) after the ReLU, where that was left to this quantizer."""
        return x.clamp_min(0) if self.rectifies else x


class ActivationQuantizer(_OnEdge):
    """A quantizer of an activation onto evenly spaced levels. `parameter` () is what a method trains of them."""

    parameter: Tensor
    fitted = False  # start at the range that loses least of the first values, not where the paper starts
    starting = False  # the next values set the range
    tracing = False  # gradients of gradients are wanted, so operations run one by one
    seen: Tensor | None = None  # the values that set the range, while `starting`

    def start(self, x: Tensor) -> None:
        """Set the zero point and the parameter from values of any shape."""
        low, high = (float(end) for end in torch.aminmax(x))
        width, levels = max(high, 0.0) - min(low, 0.0), 2**self.bits - 1
        # Negative values get one level at least, and so do positive ones, however few they are.
        self.zero = 0 if low >= 0 else min(max(round(-low / width * levels), 1), max(levels - 1, 1))
        if self.bits == 1:  # there is one level beside 0: it is on the side where more would be lost
            self.zero = int(x.clamp_max(0).norm() > x.clamp_min(0).norm())
        if self.symmetric:
            self.zero = 1 << (self.bits - 1)

    def step(self) -> Tensor:
        """Return the distance () between two levels."""
        raise NotImplementedError

    def rule(self, x: Tensor) -> SlopeRule:
        """Return the rule for the gradient, for values of the shape of x."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.starting:
            self.seen = self.rectified(x)
            self.start(self.seen)
        return fake_quant.quantize(x, self.parameter, self.step(), self.codes, self.rule(x))

    def grid(self) -> Grid:
        """Return the grid that the activation is deployed on."""
        zero = torch.tensor(self.zero, dtype=torch.int32)
        return Grid(self.step().detach().cpu().clone(), zero, self.bits, signed=False)


class WideQuantizer(_OnEdge):
    """A grid of 8 or 16 bits over all values that it saw when it last watched.

    It is for the network's input, for sums, and for every other value that not only layers read, or with 16 bits. Its
    gradient passes straight through everywhere: no value that it watched is clipped.
    """

    size: Tensor

    def __init__(self, bits: int = 8) -> None:
        super().__init__(bits)
        self.watching, self.low, self.high = False, 0.0, 0.0
        self.register_buffer("size", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.watching:
            return self.watch(x)
        return fake_quant.quantize_straight(x, self.size, self.codes)

    def watch(self, x: Tensor) -> Tensor:
        """Widen the range to hold x (any shape), and return x, after the ReLU that was left to this quantizer."""
        x = self.rectified(x)
        low, high = torch.aminmax(x.detach())
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        return x

    def settle(self) -> None:
        """End watching, and set the grid to the range that was seen."""
        grid = activation_grid(self.low, self.high, self.bits, symmetric=self.symmetric)
        self.size.copy_(grid.scale)
        self.zero = int(grid.zero_point)
        self.watching, self.low, self.high = False, 0.0, 0.0

    def grid(self) -> Grid:
        """Return the grid that the activation is deployed on."""
        zero = torch.tensor(self.zero, dtype=torch.int32)
        return Grid(self.size.cpu().clone(), zero, self.bits, signed=False)


class TwoGrids(nn.Module):
    """A wide grid, and after it the levels that low-bit layers read. It gives both values."""

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


def positive(number: Tensor, floor: float | Tensor = fake_quant.FLOOR) -> Tensor:
    """Return a trained number () as it is used, which is at least `floor`, a number or (), and `fake_quant.FLOOR`.

    The parameter itself is not clamped: a step below zero may come back by its gradient.
    """
    return number.detach().clamp_min(floor).clamp_min(fake_quant.FLOOR)


def best_range(x: Tensor, bits: int, zero: int) -> Tensor:
    """Return the width () of the range of 2**bits levels that has the least squared error on x (any shape).

    `zero` is the zero point, and 0 for a range that begins at 0.
    """
    sample = x.detach().flatten()
    low, high = torch.aminmax(sample)
    if len(sample) > SAMPLE:
        # Places by chance: even steps meet the same column of every image, or the same place of every kernel. The
        # generator is of its own, so that they are the same in every run.
        places = torch.randint(len(sample), (SAMPLE,), generator=torch.Generator().manual_seed(0))
        sample = sample[places.to(x.device)]
    levels = 2**bits - 1
    # The width that just holds everything, and shares of it. A search, because the error has several minima.
    sides = [high / (levels - zero)] if levels > zero else []
    sides += [-low / zero] if zero else []
    widest = (torch.stack(sides).amax() * levels).clamp_min(1e-6)
    widths = widest * torch.arange(1, CANDIDATES + 1, device=x.device) / CANDIDATES
    codes = (-zero, levels - zero)
    errors = [
        (fake_quant.to_levels(sample, width / levels, codes, torch.empty_like(sample)) - sample).square().sum()
        for width in widths
    ]
    found: Tensor = widths[int(torch.stack(errors).argmin())]
    return found
