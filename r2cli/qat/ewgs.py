"""EWGS: the gradient of rounding scaled element by element, by what rounding took away.

Paper: Lee et al., "Network Quantization with Element-wise Gradient Scaling" (2021), equations 1 to 5 and 11.

    x_n = clip((x - l) / (u - l), 0, 1)    x_q = round(n * x_n) / n    n = 2**b - 1
    weights: 2 * (x_q - 1/2); activations: x_q; the layer's output times |o|; l, u and o are learned
    gradient of rounding: g * (1 + delta * sign(g) * (x_n - x_q)); what is clipped has none, nor does its range

`reference` is the formula with its gradient. The kernels give the same from x and y alone (tests/test_qat_methods.py
holds them equal). A step of ResNet-18 takes 1.12 float steps, and 1.42 with a plain quantizer in autograd's plain
operations, as Brevitas has it (benchmarks/qat.md).

Here an activation has its natural scale, (u - l) * x_q, and the weight after it the factor |o| / (u - l) in turn, u - l
a constant to the gradient in both: the same function and the same gradients, in the form that integers have. The lower
end of an activation's range is 0, or a level where something is negative, and u - l is what is learned.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from r2cli.qat import quantizers
from r2cli.qat.qat_method import EpochStart, QatMethod
from r2cli.qat.quantizer_placement import Prepared
from r2cli.quantized import fake_quant
from r2cli.quantized.coded import Coded
from r2cli.quantized.fake_quant import Bound, Rule, round_with_gradient
from r2cli.quantized.grid import Grid
from r2cli.registry import EwgsOptions

HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # standard deviation of |x| for x of deviation 1
DELTA = EwgsOptions().delta or 0.0
TRACED = 3  # batches that the Hessian is taken over


def reference(x: Tensor, low: Tensor, high: Tensor, bits: int, delta: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """x_q of x (any shape) and the range's ends l and u (), and for its gradient `g` those of x, l and u: equations 1
    to 5."""
    n, width = 2**bits - 1, high - low
    x_n = ((x - low) / width).clamp(0, 1)
    x_q = (n * x_n).round() / n
    inside = (low < x) & (x < high)
    g_n = torch.where(inside, g * (1 + delta * g.sign() * (x_n - x_q)), 0.0)
    # dx_n/dx is 1 / width, dx_n/dl is (x_n - 1) / width, dx_n/du is -x_n / width.
    return x_q, g_n / width, (g_n * (x_n - 1)).sum() / width, -(g_n * x_n).sum() / width


class EwgsWeight(quantizers.WeightQuantizer):
    delta: Tensor
    tracing = False  # compute so that the Hessian can be had, and keep x_q
    discretized: Tensor | None = None

    def __init__(self, w: Tensor, bits: int, fitted: bool = False) -> None:
        super().__init__(w, bits, fitted)
        one = torch.ones((), dtype=w.dtype, device=w.device)
        self.low, self.high, self.output = (nn.Parameter(one.clone()) for _ in range(3))
        self.register_buffer("delta", one * DELTA)
        self.start(w)

    @torch.no_grad()
    def start(self, w: Tensor) -> None:
        spread = best_end(w, self.bits) if self.fitted else 3 * w.std().clamp_min(fake_quant.FLOOR)
        self.low.copy_(-spread)
        self.high.copy_(spread)
        rounded = self.normal(w)
        self.output.copy_((w * rounded).sum() / rounded.square().sum().clamp_min(1e-12) * self.unit())

    @torch.no_grad()
    def match(self, exact: Tensor, rounded: Tensor) -> None:
        """Scale the output as the authors do: to the mean size that it has with floats."""
        self.output.mul_(exact.abs().mean() / rounded.abs().mean().clamp_min(1e-12))

    def unit(self) -> Tensor:
        """The range () of the layer's input, by which the output's scale is divided."""
        one = self.low.detach().new_ones(())
        return self.reads[0].width().to(one) if self.reads and isinstance(self.reads[0], EwgsActivation) else one

    def scale(self) -> Tensor:
        """What the odd integers -n .. n are multiplied by, ()."""
        found: Tensor = quantizers.positive(self.output.abs()) / ((2**self.bits - 1) * self.unit())
        return found

    def ends(self) -> tuple[Tensor, Tensor]:
        """The least weight and the width of the range, both ()."""
        low = self.low.detach()
        return low, quantizers.positive(self.high - low)

    def to_codes(self, w: Tensor, out: Tensor) -> Tensor:
        """n * x_q, 0 to n, into `out`."""
        (low, width), n = self.ends(), 2**self.bits - 1
        return torch.sub(w, low, out=out).mul_(n / width).round_().clamp_(0, n)

    def normal(self, w: Tensor) -> Tensor:
        """The authors' quantized weight, -1 to 1, without a gradient."""
        n = 2**self.bits - 1
        return self.to_codes(w, torch.empty_like(w)).mul_(2).sub_(n).div_(n)

    def freeze(self, w: Tensor) -> Coded:
        scale = self.scale()
        grid = Grid(scale, torch.zeros_like(scale, dtype=torch.int32), self.bits, signed=True, midrise=True)
        return Coded(grid, self.to_codes(w.detach(), torch.empty_like(w)).to(torch.uint8))

    def forward(self, w: Tensor) -> Tensor:
        if self.tracing:
            self.discretized, written = self.written_out(w)
            return written
        out: Tensor = _Quantized.apply(w, self.low, self.high, self.output, self)
        return out

    def written_out(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` in operations that can be differentiated twice, and the x_q in it."""
        n = 2**self.bits - 1
        normal = ((w - self.low) / (self.high - self.low)).clamp(0, 1)
        rounded = round_with_gradient(normal * n, self.delta / n) / n
        return rounded, (2 * rounded - 1) * (self.output.abs() / self.unit())


def best_end(w: Tensor, bits: int) -> Tensor:
    """The u () for which 2**bits levels from -u to u lose least of the weight: least squares."""
    n = 2**bits - 1
    ends = w.abs().amax().clamp_min(fake_quant.FLOOR) * torch.arange(1, 65, device=w.device) / 64
    odd = [(w / end * n + n).div_(2).round_().clamp_(0, n).mul_(2).sub_(n).mul_(end / n) for end in ends]
    return ends[int(torch.stack([(each - w).square().sum() for each in odd]).argmin())].clone()


class _Quantized(torch.autograd.Function):
    """The weight 2 * (x_q - 1/2) * |o| / unit: `reference` in one pass over w and y, whose gradient is g there."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, low: Tensor, high: Tensor, output: Tensor, learner: EwgsWeight) -> Tensor:
        w = fake_quant.dense(w)
        y, scale, n = torch.empty_like(w), learner.scale(), 2**learner.bits - 1
        for a, b in fake_quant.chunks(w, y):
            learner.to_codes(a, b).mul_(2).sub_(n).mul_(scale)
        ctx.save_for_backward(w, y, *learner.ends(), scale, output, learner.delta)
        ctx.n = n
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, y, low, width, scale, output, delta = ctx.saved_tensors
        per_x, per_y, shift = 1 / width, -1 / (2 * ctx.n * scale), low / width + 0.5
        per_x, per_y, shift = per_x * delta, per_y * delta, shift * delta  # delta * (x_n - x_q)
        to_weight = 2 * ctx.n * scale / width  # a gradient of the output as one of the weight
        gw, ends = torch.empty_like(w), (low, low + width)
        if not w.is_cuda:
            ends = low.item(), (low + width).item()
        shares = []
        for a, b, c, out in fake_quant.chunks(fake_quant.like(g, w), w, y, gw):
            difference = torch.mul(b, per_x).add_(c * per_y).sub_(shift)
            torch.addcmul(a, a.abs(), difference, out=out)
            fake_quant.inside(out, b, *ends, out).mul_(to_weight)
            shares.append(torch.stack([out.sum(), torch.dot(out, b), torch.dot(a, c)]))
        plain, weighed, scaled = torch.stack(shares).double().sum(0).to(w.dtype)
        g_low = (weighed - (low + width) * plain) / width
        g_high = (low * plain - weighed) / width
        return gw, g_low, g_high, scaled / output, None


class EwgsActivation(quantizers.ActivationQuantizer):
    """`parameter` is u - l."""

    delta: Tensor
    discretized: Tensor | None = None  # x_q, kept while `tracing`

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.parameter = nn.Parameter(torch.ones(()))
        self.register_buffer("delta", torch.full((), DELTA))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        super().start(x)
        spread = 3 * x.std().clamp_min(fake_quant.FLOOR)
        # What rectifies leaves half of a normal distribution; of a whole one the range is two-sided.
        usual = 2 * spread if self.zero else spread / HALF_NORMAL
        self.parameter.copy_(quantizers.best_range(x, self.bits, self.zero) if self.fitted else usual)

    def width(self) -> Tensor:
        """u - l as a constant, ()."""
        return quantizers.positive(self.parameter)

    def step(self) -> Tensor:
        found: Tensor = self.width() / (2**self.bits - 1)
        return found

    def rule(self, x: Tensor) -> Rule:
        width = self.width()
        share = self.delta / width  # delta * (x_n - x_q) = share * (x - y)

        # `reference` for l = 0: of u the sum of g_n * x, over -width.
        def slope(g: Tensor, x: Tensor, y: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
            torch.addcmul(g, g.abs(), (x - y).mul_(share), out=out)
            fake_quant.inside(out, x, low, high, out)
            return torch.dot(out, x)

        return Rule(slope, -1 / width)

    def forward(self, x: Tensor) -> Tensor:
        if self.tracing:
            self.discretized, written = self.written_out(x)
            return written
        return super().forward(x)

    def written_out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` in operations that can be differentiated twice, and the x_q in it."""
        n, width = 2**self.bits - 1, self.parameter
        normal = (self.rectified(x) / width + self.zero / n).clamp(0, 1)
        rounded = round_with_gradient(normal * n, self.delta / n) / n
        return rounded, (rounded - self.zero / n) * width.detach()


# --- delta from the Hessian ----------------------------------------------------------------------------------------

# Random vectors, at least and at most, and the relative change of the mean at which they are enough.
LEAST, PROBES, ENOUGH = 10, 50, 1e-3


def delta_of(trace: float, gradient: Tensor) -> float:
    """The delta of one quantizer, from the trace of the Hessian of its output and that output's gradient, any shape.

    Equation 11: (Tr(H) / N) / (3 * std(g)), not below 0.
    """
    return max(0.0, trace / gradient.numel() / (3 * float(gradient.std().clamp_min(1e-12))))


def traces(gradients: Sequence[Tensor], values: Sequence[Tensor], generator: torch.Generator) -> list[float]:
    """Traces of the Hessian's blocks of `values`, whose gradients (with a graph) these are: Hutchinson's estimator.

    All blocks share a probe: what lies between two of them has mean zero.
    """
    sums = [0.0] * len(values)
    before = 0.0
    for count in range(1, PROBES + 1):
        signs = [torch.randint(0, 2, v.shape, generator=generator).to(v).mul_(2).sub_(1) for v in values]
        along = torch.autograd.grad(gradients, values, signs, retain_graph=True, allow_unused=True)
        for i, (sign, row) in enumerate(zip(signs, along, strict=True)):
            sums[i] += float((sign * row).sum()) if row is not None else 0.0
        now = sum(sums) / count
        if count >= LEAST and abs(now - before) < ENOUGH * abs(before):
            break
        before = now
    return [each / count for each in sums]


def set_deltas(
    learners: Sequence[EwgsWeight | EwgsActivation], losses: Sequence[Callable[[], Tensor]], seed: int
) -> None:
    """Set every learner's delta to the mean over `losses`, each of one batch through the network that has them."""
    generator = torch.Generator().manual_seed(seed)
    for learner in learners:
        learner.tracing = True
    found = torch.zeros(len(learners))
    for loss in losses:
        value = loss()
        outputs = [learner.discretized for learner in learners]
        assert all(isinstance(output, Tensor) for output in outputs)
        gradients = torch.autograd.grad(value, outputs, create_graph=True)  # type: ignore[arg-type]
        each = traces(gradients, outputs, generator)  # type: ignore[arg-type]
        pairs = zip(each, gradients, strict=True)
        found += torch.tensor([delta_of(trace, gradient.detach()) for trace, gradient in pairs]) / len(losses)
    for learner, delta in zip(learners, found.tolist(), strict=True):
        learner.tracing, learner.discretized = False, None
        learner.delta.fill_(delta)


def before_epoch(prepared: Prepared, epoch: EpochStart) -> None:
    """Set the delta of this epoch: the fixed one, or from the Hessian, 0 in the first epoch."""
    every = [
        learner
        for learner in (*prepared.weights.values(), *prepared.activations)
        if isinstance(learner, EwgsWeight | EwgsActivation)
    ]
    fixed: float | None = epoch.options.delta
    if fixed is not None or epoch.number == 1:
        for learner in every:
            learner.delta.fill_(0.0 if fixed is None else fixed)
        return
    net = prepared.net.eval()
    batches = [batch for batch, _ in zip(epoch.batches(), range(TRACED), strict=False)]
    losses = [lambda b=batch: nn.functional.cross_entropy(net(b[0]), b[1]) for batch in batches]
    set_deltas(every, losses, epoch.seed + epoch.number)


METHOD = QatMethod(EwgsWeight, EwgsActivation, adam=True, before_epoch=before_epoch)
