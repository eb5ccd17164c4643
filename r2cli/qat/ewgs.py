"""EWGS: the gradient that passes rounding is scaled for each element, by that element's rounding error.

Paper: Lee et al., "Network Quantization with Element-wise Gradient Scaling" (2021), equations 1 to 5 and 11.

    x_n = clip((x - l) / (u - l), 0, 1)    x_q = round(n * x_n) / n    n = 2**b - 1
    weights: 2 * (x_q - 1/2)    activations: x_q    the layer's output is multiplied by |o|    l, u and o are learned
    gradient of rounding: g * (1 + delta * sign(g) * (x_n - x_q))

A clipped value passes no gradient, neither to itself nor to l and u.

`reference` is the formula with its gradient. The kernels compute the same from x and y alone; tests/test_qat_methods.py
holds the two equal. A training step of ResNet-18 takes as long as 1.12 steps in float; with a plain quantizer written
in autograd's operations, as in Brevitas, it takes 1.42 (benchmarks/qat.md).

We write the function in another way, the one that integers have. An activation keeps its natural scale, (u - l) * x_q,
and the weight after it has the factor |o| / (u - l) in turn. In both places the gradient treats u - l as a constant, so
the function and all gradients are those of the paper. The lower end of an activation's range is fixed: at 0, or at a
level below 0 where values are negative. Then u - l alone is learned.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from r2cli.data import losses
from r2cli.qat import quantizers
from r2cli.qat.qat_method import EpochStart, QatMethod
from r2cli.qat.quantizer_placement import Prepared
from r2cli.quantized import fake_quant
from r2cli.quantized.coded import Coded
from r2cli.quantized.fake_quant import Bound, SlopeRule, round_with_gradient
from r2cli.quantized.grid import Grid
from r2cli.registry import EwgsOptions
from r2cli.storage.checkpoint import LOGITS
from r2cli.storage.input_spec import places

HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # standard deviation of |x| for x of deviation 1
DELTA = EwgsOptions().delta or 0.0
TRACED = 3  # batches that the Hessian is averaged over, as in the authors' runs on CIFAR


def reference(x: Tensor, low: Tensor, high: Tensor, bits: int, delta: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Return x_q of `x` (any shape), and the gradients by x, l and u where `g` is that by x_q: equations 1 to 5.

    `low` and `high` are l and u, both ().
    """
    n, width = 2**bits - 1, high - low
    x_n = ((x - low) / width).clamp(0, 1)
    x_q = (n * x_n).round() / n
    inside = (low < x) & (x < high)
    g_n = torch.where(inside, g * (1 + delta * g.sign() * (x_n - x_q)), 0.0)
    # dx_n/dx is 1 / width, dx_n/dl is (x_n - 1) / width, dx_n/du is -x_n / width.
    return x_q, g_n / width, (g_n * (x_n - 1)).sum() / width, -(g_n * x_n).sum() / width


class EwgsWeight(quantizers.WeightQuantizer):
    """EWGS's quantizer of a weight. It trains l (`low`), u (`high`) and o (`output`), all ()."""

    delta: Tensor
    tracing = False  # compute in operations that can be differentiated twice, and keep x_q
    discretized: Tensor | None = None

    def __init__(self, w: Tensor, bits: int, fitted: bool = False) -> None:
        super().__init__(w, bits, fitted)
        one = torch.ones((), dtype=w.dtype, device=w.device)
        self.low, self.high, self.output = (nn.Parameter(one.clone()) for _ in range(3))
        self.register_buffer("delta", one * DELTA)
        self.start(w)

    @torch.no_grad()
    def start(self, w: Tensor) -> None:
        # Three standard deviations to each side are the authors' start. At their learning rate, 1e-5, Adam hardly moves
        # the ends in a short run, so `fitted` begins at the best ones.
        spread = best_end(w, self.bits) if self.fitted else 3 * fake_quant.deviation(w)
        self.low.copy_(-spread)
        self.high.copy_(spread)
        rounded = self.normal(w)
        # The least-squares factor of the weight; `match` replaces it where images are at hand. Times the unit, by which
        # `scale` divides.
        self.output.copy_((w * rounded).sum() / rounded.square().sum().clamp_min(1e-12) * self.unit())

    @torch.no_grad()
    def match(self, exact: Tensor, rounded: Tensor) -> None:
        """Scale o as the authors do, so that the layer's output keeps the mean size that it has with floats."""
        self.output.mul_(exact.abs().mean() / rounded.abs().mean().clamp_min(1e-12))

    def unit(self) -> Tensor:
        """Return u - l () of the quantizer that the layer reads, by which |o| is divided; 1 without one."""
        one = self.low.detach().new_ones(())
        return self.reads[0].width().to(one) if self.reads and isinstance(self.reads[0], EwgsActivation) else one

    def scale(self) -> Tensor:
        """Return the number () that the odd integers -n .. n are multiplied by."""
        found: Tensor = quantizers.positive(self.output.abs()) / ((2**self.bits - 1) * self.unit())
        return found

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return l, the lower end of the range, and its width u - l, both ()."""
        low = self.low.detach()
        return low, quantizers.positive(self.high - low)

    def to_codes(self, w: Tensor, out: Tensor) -> Tensor:
        """Write n * x_q of `w` (any shape), which is 0 to n, to `out`."""
        (low, width), n = self.ends(), 2**self.bits - 1
        return torch.sub(w, low, out=out).mul_(n / width).round_().clamp_(0, n)

    def normal(self, w: Tensor) -> Tensor:
        """Return the authors' quantized weight, from -1 to 1, without a gradient."""
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
        """Return x_q, and `forward`'s result, computed in operations that can be differentiated twice."""
        n = 2**self.bits - 1
        # delta / n, because here the values are rounded as n * x_n: their rounding error is n times that of x_n.
        normal = ((w - self.low) / (self.high - self.low)).clamp(0, 1)
        rounded = round_with_gradient(normal * n, self.delta / n) / n
        return rounded, (2 * rounded - 1) * (self.output.abs() / self.unit())


def best_end(w: Tensor, bits: int) -> Tensor:
    """Return the u () for which 2**bits levels from -u to u have the least squared error on the weight `w`."""
    n = 2**bits - 1
    # A search over 64 shares of max|w|: the error has several minima, and the search runs once for each layer.
    ends = w.abs().amax().clamp_min(fake_quant.FLOOR) * torch.arange(1, 65, device=w.device) / 64
    odd = [(w / end * n + n).div_(2).round_().clamp_(0, n).mul_(2).sub_(n).mul_(end / n) for end in ends]
    return ends[int(torch.stack([(each - w).square().sum() for each in odd]).argmin())].clone()


class _Quantized(torch.autograd.Function):
    """The weight 2 * (x_q - 1/2) * |o| / unit: `reference`, and the scale after it, in one pass over w and y."""

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
        # x_q is not kept: y = scale * n * (2 x_q - 1), so x_n - x_q = w / width - y / (2 n scale) - (l / width + 1/2).
        per_x, per_y, shift = 1 / width, -1 / (2 * ctx.n * scale), low / width + 0.5
        per_x, per_y, shift = per_x * delta, per_y * delta, shift * delta  # delta * (x_n - x_q)
        to_weight = 2 * ctx.n * scale / width  # dy/dx_q times dx_n/dw
        gw, ends = torch.empty_like(w), (low, low + width)
        if not w.is_cuda:  # on a GPU, reading a number would wait for all work that is queued
            ends = low.item(), (low + width).item()
        shares = []
        for a, b, c, out in fake_quant.chunks(fake_quant.like(g, w), w, y, gw):
            difference = torch.mul(b, per_x).add_(c * per_y).sub_(shift)
            # g * (1 + delta * sign(g) * (x_n - x_q)) without a sign: g + |g| * delta * (x_n - x_q).
            torch.addcmul(a, a.abs(), difference, out=out)
            fake_quant.inside(out, b, *ends, out).mul_(to_weight)
            shares.append(torch.stack([out.sum(), torch.dot(out, b), torch.dot(a, c)]))
        plain, weighed, scaled = torch.stack(shares).double().sum(0).to(w.dtype)
        # `out` has the factor 1 / width already, so the sums over x_n - 1 and -x_n of `reference` become these.
        g_low = (weighed - (low + width) * plain) / width
        g_high = (low * plain - weighed) / width
        # dy/do = y / o, for |o| as `scale` has it: an o of 0, of a weight that is 0 everywhere, can still grow.
        size = quantizers.positive(output.abs())
        return gw, g_low, g_high, scaled / torch.where(output < 0, -size, size), None


class EwgsActivation(quantizers.ActivationQuantizer):
    """EWGS's quantizer of an activation. `parameter` () is u - l."""

    delta: Tensor
    discretized: Tensor | None = None  # x_q, kept while `tracing`

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.parameter = nn.Parameter(torch.ones(()))
        self.register_buffer("delta", torch.full((), DELTA))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        super().start(x)
        spread = 3 * fake_quant.deviation(x)
        # The authors' start. A ReLU leaves half of a normal distribution, whose standard deviation is HALF_NORMAL of
        # that of the whole one. Where values are negative too, the range reaches 3 deviations to both sides.
        usual = 2 * spread if self.zero else spread / HALF_NORMAL
        self.parameter.copy_(quantizers.best_range(x, self.bits, self.zero) if self.fitted else usual)

    def width(self) -> Tensor:
        """Return u - l () as a constant to the gradient."""
        return quantizers.positive(self.parameter)

    def step(self) -> Tensor:
        found: Tensor = self.width() / (2**self.bits - 1)
        return found

    def rule(self, x: Tensor) -> SlopeRule:
        width = self.width()
        share = self.delta / width  # delta * (x_n - x_q) = share * (x - y)

        # `reference` for l = 0. The gradient by u is -sum(g_n * x_n) with x_n = x / width, and the factor -1 / width
        # is taken once, on the sum over all chunks.
        def slope(g: Tensor, x: Tensor, y: Tensor, low: Bound, high: Bound, out: Tensor) -> Tensor:
            torch.addcmul(g, g.abs(), (x - y).mul_(share), out=out)
            fake_quant.inside(out, x, low, high, out)
            return torch.dot(out, x)

        return SlopeRule(slope, -1 / width)

    def forward(self, x: Tensor) -> Tensor:
        if self.tracing:
            self.discretized, written = self.written_out(x)
            return written
        return super().forward(x)

    def written_out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_q, and `forward`'s result, computed in operations that can be differentiated twice."""
        n, width = 2**self.bits - 1, self.parameter
        normal = (self.rectified(x) / width + self.zero / n).clamp(0, 1)
        rounded = round_with_gradient(normal * n, self.delta / n) / n
        return rounded, (rounded - self.zero / n) * width.detach()


# --- delta from the Hessian ----------------------------------------------------------------------------------------

# How many random vectors are drawn, at least and at most, and the relative change of their mean at which they are
# enough. The most and the change are the authors'. The least is ours: two means of few vectors may be equal by chance.
LEAST, PROBES, ENOUGH = 10, 50, 1e-3


def delta_of(trace: float, gradient: Tensor) -> float:
    """Return the delta of one quantizer: (Tr(H) / N) / (3 * std(g)), and not below 0. Equation 11.

    H is the Hessian of the loss by the quantizer's output x_q, whose trace is `trace`. g is the `gradient` of the loss
    by x_q, of any shape with N elements.
    """
    return max(0.0, trace / gradient.numel() / (3 * float(gradient.std().clamp_min(1e-12))))


def traces(gradients: Sequence[Tensor], values: Sequence[Tensor], generator: torch.Generator) -> list[float]:
    """Return the trace of the Hessian's diagonal block of each of `values`, by Hutchinson's estimator.

    `gradients` are the gradients of the loss by `values`, with a graph. For a vector v of random signs, v^T H v has the
    mean Tr(H). One backward pass serves all blocks: what it mixes in from the blocks off the diagonal has mean zero.
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
    """Set every learner's delta to the mean of its deltas over `losses`.

    Each of `losses` runs one batch through the network of the learners and returns the loss ().
    """
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
    """Set every delta for this epoch: to the fixed one, else from the Hessian, or to 0 in the first epoch.

    The authors begin at 0 too: the first Hessian would be that of ranges that have not been trained.
    """
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
    net = prepared.net.eval()  # these passes must not move BatchNorm's running statistics
    batches = [batch for batch, _ in zip(epoch.batches(), range(TRACED), strict=False)]
    learned = epoch.learned or losses.of_target(losses.CROSS_ENTROPY, LOGITS)
    each = [lambda b=batch: learned(b[0], net(*places(b[0])), b[1]) for batch in batches]
    set_deltas(every, each, epoch.seed + epoch.number)


METHOD = QatMethod(EwgsWeight, EwgsActivation, adam=True, before_epoch=before_epoch)
