"""LSQ: the step between the levels is a parameter, which is trained with the weights.

Paper: Esser et al., "Learned Step Size Quantization" (2020), equations 1 to 3 and section 2.2.

    y = s * round(clip(x / s, -Qn, Qp))
    dy/dx = 1 for -Qn < x / s < Qp, else 0
    dy/ds = round(x / s) - x / s inside, -Qn below and Qp above; times 1 / sqrt(N * Qp)

`reference` is the formula with its gradient. In training, `fake_quant.quantize` rounds and keeps only x and y, and
`slope` and `rule` give the same gradient; tests/test_qat_methods.py holds the two equal. A training step of ResNet-18
takes as long as 1.05 steps in float; with a quantizer written in autograd's operations, as in Brevitas, it takes 1.42
(benchmarks/qat.md).

The step starts at 2 * mean|x| / sqrt(Qp), as in the paper; with `fitted`, which is ours, at the step that loses least.
"""

import torch
from torch import Tensor, nn

from r2cli.qat import oscillation, quantizers
from r2cli.qat.qat_method import EpochStart, QatMethod
from r2cli.qat.quantizer_placement import Prepared
from r2cli.quantized import fake_quant
from r2cli.quantized.coded import Coded
from r2cli.quantized.fake_quant import Bound, Codes, SlopeRule
from r2cli.quantized.grid import Grid
from r2cli.registry import LsqOptions

# The share of the epochs after which bin regularization begins. The paper too trains without it first: until the steps
# have settled, the levels that it draws weights to still move.
BINS_FROM = 0.5
# No step becomes smaller than this share of its first one. On few images, or where no ReLU bounds the values, a step
# may fall until all values are clipped: then no weight has a gradient any more, and the run ends in nonsense.
SMALLEST = 1 / 32


def reference(x: Tensor, s: Tensor, codes: Codes, count: int, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y of `x` (any shape) for the step `s` (), and the gradients by x and s where `g` is that by y.

    Equations 1 to 3. `codes` are -Qn and Qp: -2**(b-1) and 2**(b-1) - 1 for weights, 0 and 2**b - 1 for activations.
    `count` is N, the number of a layer's weights, or of the activations of one sample.
    """
    lowest, highest = codes
    v = x / s
    y = s * v.clamp(lowest, highest).round()
    inside = (v > lowest) & (v < highest)
    dy_dx = torch.where(inside, 1.0, 0.0)  # 0 at the bounds too
    dy_ds = torch.where(inside, v.round() - v, v.clamp(lowest, highest))
    # Section 2.2: the step gets a gradient from every value, so its relative change would be far larger than that of a
    # weight; 1 / sqrt(N Qp) balances the two.
    return y, g * dy_dx, (g * dy_ds).sum() / (count * highest) ** 0.5


def slope(g: Tensor, x: Tensor, y: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
    """Write `reference`'s gradient by x to `out`, and return s * sum(g * dy/ds) of one chunk, ().

    s * dy/ds is y - x inside the range and y outside. So the sum is that of g * y, minus that of g * x inside.
    """
    fake_quant.inside(g, x, low, high, out)
    return torch.dot(g, y) - torch.dot(out, x)


def rule(count: int, highest: int, step: Tensor) -> SlopeRule:
    """Return the gradient's rule for `fake_quant.quantize`: the sum over all chunks, times 1 / s and 1 / sqrt(N * Qp).

    `count` is N, and `highest` is Qp, which is 0 where the zero point is the highest code.
    """
    return SlopeRule(slope, 1 / (step * max(count * highest, 1) ** 0.5))


def first_step(x: Tensor, highest: int) -> Tensor:
    """Return the step () that the paper starts from, 2 * mean|x| / sqrt(Qp), for values `x` of any shape."""
    # The floor is for an input that is 0 everywhere: values are divided by the step.
    found: Tensor = (2 * x.abs().mean() / max(highest, 1) ** 0.5).clamp_min(fake_quant.FLOOR)
    return found


class LsqWeight(quantizers.WeightQuantizer):
    """LSQ's quantizer of a weight. It trains `step` ()."""

    least: Tensor

    def __init__(self, w: Tensor, bits: int, fitted: bool = False) -> None:
        super().__init__(w, bits, fitted)
        self.step = nn.Parameter(torch.empty((), dtype=w.dtype, device=w.device))
        self.register_buffer("least", torch.zeros_like(self.step))
        self.oscillation: oscillation.Oscillation | None = None  # with `freeze`, which holds weights that swing
        # Weights are known when the quantizer is made; an activation starts on the first images (`starting`).
        self.start(w)

    @torch.no_grad()
    def start(self, w: Tensor) -> None:
        if self.fitted:
            # Signed codes from -Qn are unsigned ones with the zero point Qn, for which `best_range` is.
            self.step.copy_(quantizers.best_range(w, self.bits, -self.codes[0]) / (2**self.bits - 1))
        else:
            self.step.copy_(first_step(w, self.codes[1]))
        self.least.copy_(self.step * SMALLEST)
        if self.oscillation is not None:
            self.oscillation.start(self.encode(w))

    def encode(self, w: Tensor) -> Tensor:
        """Return the codes of the weights (any shape), as floats."""
        return (w.detach() / self.used_step()).round_().clamp_(*self.codes)

    def used(self, w: Tensor) -> Tensor:
        """Return the weights (any shape) that are rounded: `w`, but for those that are held."""
        return w if self.oscillation is None else self.oscillation.used(w, self.used_step())

    @property
    def codes(self) -> Codes:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def freeze(self, w: Tensor) -> Coded:
        step = self.used_step()
        grid = Grid(step, torch.zeros_like(step, dtype=torch.int32), self.bits, signed=True)
        return Coded(grid, grid.encode(self.used(w.detach())))

    def used_step(self) -> Tensor:
        """Return the step () that weights are rounded to: the trained one, and at least `SMALLEST` of the first."""
        return quantizers.positive(self.step, self.least)

    def forward(self, w: Tensor) -> Tensor:
        step = self.used_step()
        return fake_quant.quantize(self.used(w), self.step, step, self.codes, rule(w.numel(), self.codes[1], step))


class LsqActivation(quantizers.ActivationQuantizer):
    """LSQ's quantizer of an activation. `parameter` () is the step."""

    least: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.parameter = nn.Parameter(torch.ones(()))
        self.register_buffer("least", torch.zeros(()))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        super().start(x)
        if self.fitted:
            self.parameter.copy_(quantizers.best_range(x, self.bits, self.zero) / (2**self.bits - 1))
        else:
            self.parameter.copy_(first_step(x, self.codes[1]))
        self.least.copy_(self.parameter * SMALLEST)

    def step(self) -> Tensor:
        return quantizers.positive(self.parameter, self.least)

    def rule(self, x: Tensor) -> SlopeRule:
        # One sample's values: N must not depend on the batch, over which the loss is a mean.
        return rule(x[0].numel(), self.codes[1], self.step())


# --- bin regularization --------------------------------------------------------------------------------------------


def bins(w: Tensor, step: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Return the bin regularization () of the weight `w` (any shape), and its gradient by the weight.

    Paper: Han et al., "Improving Low-Precision Network Quantization via Bin Regularization" (2021), equation 5. The
    weights of each code are drawn to its level t, by (mean(w) - t)**2 + var(w), summed over the codes. That is the mean
    of (w - t)**2 over the weights of the code. The gradient treats t as a constant. A code without weights adds
    nothing.
    """
    away = w - fake_quant.to_levels(w, step, codes, torch.empty_like(w))
    # w - away is the level, so this is an integer up to float32's error, which round_ removes before .long() cuts off.
    index = ((w - away) / step).round_().sub_(codes[0]).long().flatten()
    count = torch.bincount(index, minlength=codes[1] - codes[0] + 1).clamp_min_(1).to(w.dtype)
    share = away / count[index].reshape(w.shape)
    # d/dw of (w - t)^2 / count. The mean and the variance of a bin need not be told apart.
    return (away * share).sum(), 2 * share


@torch.no_grad()
def draw_to_levels(prepared: Prepared, epoch: EpochStart) -> None:
    """Add the gradients of bin regularization to the weights' gradients, in the second half of the epochs."""
    strength: float = epoch.options.bin_reg
    if not strength or epoch.number <= BINS_FROM * epoch.epochs:
        return
    for layer, learner, weight in prepared.each():
        assert isinstance(learner, LsqWeight) and weight.grad is not None, layer.name
        _, gradient = bins(weight, learner.used_step(), learner.codes)
        weight.grad.add_(gradient, alpha=strength)


# --- oscillations ----------------------------------------------------------------------------------------------------


def ready(prepared: Prepared, options: LsqOptions) -> None:
    """Watch every weight for oscillations, where `freeze` asks for it."""
    for _, learner, weight in prepared.each():
        assert isinstance(learner, LsqWeight)
        learner.oscillation = oscillation.Oscillation(learner.encode(weight)) if options.freeze else None


@torch.no_grad()
def calm(prepared: Prepared, epoch: EpochStart) -> None:
    """Dampen the weights that swing between two levels, by their gradients, and hold those that swing too often."""
    options: LsqOptions = epoch.options
    if not (options.dampen or options.freeze):
        return
    strength = options.dampen * oscillation.share_at(epoch.number, epoch.epochs)
    for layer, learner, weight in prepared.each():
        assert isinstance(learner, LsqWeight) and weight.grad is not None, layer.name
        if strength:
            _, gradient = oscillation.dampening(weight, learner.used_step(), learner.codes)
            weight.grad.add_(gradient, alpha=strength)
        if learner.oscillation is not None:
            most = oscillation.threshold(options.freeze, epoch.number, epoch.epochs)
            learner.oscillation.observe(learner.encode(learner.used(weight)), most)


# --- steps that do not run away ------------------------------------------------------------------------------------


def _steps(prepared: Prepared) -> dict[str, tuple[Tensor, Tensor]]:
    """Return every step () that is trained, with the least that it may be, by the name of its layer or value."""
    weights = {name: (one.step, one.least) for name, one in prepared.weights.items() if isinstance(one, LsqWeight)}
    edges = {name: (one.parameter, one.least) for name, one in prepared.edges.items() if isinstance(one, LsqActivation)}
    return weights | edges


@torch.no_grad()
def bound_steps(prepared: Prepared) -> None:
    """Cut the gradient of every step to the size of the step, in place.

    It is far below that where a BatchNorm keeps gradients small. Without one, at the usual rate, a step jumped to 141
    times its first value, or through 0, where no weight has a gradient any more.
    """
    for parameter, least in _steps(prepared).values():
        if parameter.grad is not None:
            most = quantizers.positive(parameter, least)
            parameter.grad.clamp_(-most, most)


def collapsed(prepared: Prepared) -> list[str]:
    """Return the names of the steps that are at their least, or below it."""
    return [name for name, (parameter, least) in _steps(prepared).items() if bool(parameter <= least)]


def add_gradients(prepared: Prepared, epoch: EpochStart) -> None:
    bound_steps(prepared)
    draw_to_levels(prepared, epoch)
    calm(prepared, epoch)


METHOD = QatMethod(LsqWeight, LsqActivation, ready=ready, add_gradients=add_gradients, collapsed=collapsed)
