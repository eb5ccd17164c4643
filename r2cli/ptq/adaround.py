"""AdaRound: round every weight up or down so that the output of its layer changes least.

Paper: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020), equations 21 to 25.

    code = clip(floor(w / s) + h(V), lowest, highest)    h(V) = clip(1.2 * sigmoid(V) - 0.1, 0, 1)
    loss = |act(W x) - act(code * s * x^)|^2 + weight * sum(1 - |2 h(V) - 1|^beta)

x is the layer's input in the float network, and x^ its input in the network whose earlier layers are rounded already.
act is the ReLU after the layer. The squared error is summed over the channels and averaged over images and positions.

Where we differ from the paper:

- `weight` (lambda) is relative to the error of nearest rounding. With the paper's absolute 0.01, h stays undecided
  where the error is large: at 2 bits, and in the last layer.
- A minibatch is rows of a matrix: patches of the input, drawn once from all images and positions. So a step is two
  matrix products.
- The gradient is written out, which is faster than autograd.
- beta falls from 20 to 2 along half a cosine.
- The optimization ends as soon as every h is 0 or 1. If nearest rounding is better on the rows, its codes are kept.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2cli.graph.operators import MATRICES
from r2cli.graph.transposed import TransposedConv
from r2cli.ptq.layer_sweep import LayerSample
from r2cli.ptq.ptq_method import PtqMethod
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | TransposedConv
# h is stretched beyond 0 and 1 and clipped there, so that it reaches both at a finite V, as in the paper.
ZETA, GAMMA = 1.1, -0.1
BETA_START, BETA_END = 20.0, 2.0
WARM_UP = 0.2  # share of the steps before the term that drives h to 0 or 1 begins
MEMORY = 256 * 2**20  # bytes that the rows of one layer may take


@dataclass(frozen=True)
class AdaroundSettings:
    """`weight` is lambda, in units of the error of nearest rounding per weight. A step uses `batch` of `rows` rows.

    A step of a grouped convolution uses `grouped` rows, since its filters have few weights each.
    """

    steps: int = 500
    lr: float = 0.2
    weight: float = 60.0
    batch: int = 512
    grouped: int = 64
    rows: int = 32768
    seed: int = 0


def stretched(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return sigmoid(V), and 1.2 * sigmoid(V) - 0.1, which h(V) clips to 0 and 1. V has any shape."""
    sigmoid = torch.sigmoid(v)
    return sigmoid, sigmoid * (ZETA - GAMMA) + GAMMA


def start(fraction: Tensor) -> Tensor:
    """Return the V with h(V) = `fraction`, 0 <= fraction < 1, so that the optimization starts at the float weight."""
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def beta_at(progress: float) -> float:
    """Return beta at `progress` 0 to 1 after the warm-up: half a cosine from 20 to 2."""
    return BETA_END + 0.5 * (BETA_START - BETA_END) * (1 + math.cos(math.pi * progress))


def push(sigmoid: Tensor, raw: Tensor, beta: float) -> Tensor:
    """Return the gradient of sum(1 - |2 h(V) - 1|^beta) by V, given the result of `stretched`. V has any shape."""
    centred = 2 * raw.clamp(0, 1) - 1
    slope = (ZETA - GAMMA) * sigmoid * (1 - sigmoid) * ((raw > 0) & (raw < 1))
    return -2 * beta * centred.abs() ** (beta - 1) * centred.sign() * slope


@torch.no_grad()
def round_layer(seen: LayerSample, coded: Coded, settings: AdaroundSettings = AdaroundSettings()) -> Coded:
    """Return `coded` with codes chosen for the layer's output, on the same grid.

    Each code is the floor or the ceiling of the float weight. So a bad scale cannot be repaired here.
    """
    assert isinstance(coded.codec, Grid)
    rows = sample_rows(seen, settings)
    real = coded.codec.unrounded(seen.module.weight.detach())
    low = real.floor().clamp(coded.codec.lowest, coded.codec.highest)
    before = output_error(rows, coded.decode())
    up = _optimize(rows, real, low, coded.codec, settings, before / real.numel())
    chosen = Coded(coded.codec, (low + up).clamp(coded.codec.lowest, coded.codec.highest).to(coded.codes.dtype))
    return chosen if output_error(rows, chosen.decode()) <= before else coded


@dataclass(frozen=True)
class Rows:
    """Patches of the input in the rounded network, and the outputs of the float layer at the same positions.

    `inputs` are (groups, rows, inputs of a filter). `targets` are (groups, rows, filters of a group), after the
    activation.
    """

    inputs: Tensor
    targets: Tensor
    bias: Tensor | None  # (groups, 1, filters of a group)
    most: Tensor | None  # the bound of the ReLU that follows, () or (groups, 1, filters of a group); None without one

    def act(self, outputs: Tensor) -> Tensor:
        """Return `outputs`, (groups, rows, filters of a group), after the activation that follows the layer."""
        return outputs if self.most is None else outputs.relu().minimum(self.most)


def _optimize(rows: Rows, real: Tensor, low: Tensor, grid: Grid, settings: AdaroundSettings, unit: float) -> Tensor:
    """Return whether each weight is rounded up: 0 or 1, in the shape of the weight. Errors are in units of `unit`."""
    groups = rows.inputs.shape[0]
    # A weight is `value0` + code * `step`, so that grids of both kinds, with any zero point, are optimized alike.
    step = grid.along(grid.scale, real.ndim).expand_as(real) * (2 if grid.midrise else 1)  # value of one code more
    value0 = grid.decode(torch.zeros_like(real, dtype=torch.int32))
    base, size, offset = (t.reshape(groups, -1, rows.inputs.shape[2]) for t in (low, step, value0))
    # A weight beyond the grid is more than 1 above `low`, where V would be the logarithm of a negative number.
    v = start((real - low).clamp(0, 1 - 1e-6)).reshape(base.shape)
    adam = torch.optim.Adam([v], settings.lr)
    draw = torch.Generator().manual_seed(settings.seed)
    count = rows.inputs.shape[1]
    batch = min(settings.batch if groups == 1 else settings.grouped, count)
    warm, weight = int(WARM_UP * settings.steps), settings.weight * unit
    for number in range(1, settings.steps + 1):
        index = torch.randint(count, (batch,), generator=draw).to(v.device)
        sigmoid, raw = stretched(v)
        soft = base + raw.clamp(0, 1)
        inside = (raw > 0) & (raw < 1) & (soft < grid.highest)  # where h or the code is clipped, V changes nothing
        gradient = error_slope(rows, index, (soft.clamp(grid.lowest, grid.highest) * size + offset))
        gradient = gradient * size * (ZETA - GAMMA) * sigmoid * (1 - sigmoid) * inside
        if number > warm:
            beta = beta_at((number - warm) / (settings.steps - warm))
            gradient += weight * push(sigmoid, raw, beta)
        v.grad = gradient
        adam.step()
        # Checked now and then only: the answer must be waited for on a GPU.
        if number > warm and number % 50 == 0 and bool(((raw <= 0) | (raw >= 1)).all()):
            break
    # V >= 0 is h >= 1/2: a weight that stayed undecided goes to the nearer side of its soft value.
    return (v >= 0).to(low.dtype).reshape(low.shape)


def error_slope(rows: Rows, index: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the mean squared error over the rows at `index` by `weight` (groups, filters, inputs)."""
    inputs, targets = rows.inputs[:, index], rows.targets[:, index]
    outputs = inputs @ weight.transpose(1, 2)
    if rows.bias is not None:
        outputs += rows.bias
    error = rows.act(outputs) - targets
    if rows.most is not None:  # the slope of the activation
        error *= (outputs > 0) & (outputs < rows.most)
    # The mean is over rows only. A mean over the filters too would weaken it against the term that drives h to 0 or 1,
    # by their number.
    return 2 / len(index) * error.transpose(1, 2) @ inputs


def output_error(rows: Rows, weight: Tensor) -> float:
    """Return the squared error, summed over the channels and averaged over all rows."""
    outputs = rows.inputs @ weight.reshape(rows.inputs.shape[0], -1, rows.inputs.shape[2]).transpose(1, 2)
    outputs = outputs if rows.bias is None else outputs + rows.bias
    return float((rows.act(outputs) - rows.targets).square().sum(2).mean(1).sum())


def sample_rows(seen: LayerSample, settings: AdaroundSettings) -> Rows:
    """Draw the rows of a layer from all images and positions."""
    module = seen.module
    outputs = module(seen.inputs)
    bias = None if module.bias is None else module.bias.detach()
    groups = 1 if isinstance(module, MATRICES) else module.groups
    draw = torch.Generator().manual_seed(settings.seed)
    places = outputs.flatten(0, -2) if isinstance(module, MATRICES) else outputs.movedim(1, -1).flatten(0, -2)
    limit = max(settings.batch, MEMORY // (4 * groups * module.weight[0].numel()))
    index = torch.randperm(len(places), generator=draw)[: min(settings.rows, limit)].to(places.device)
    if isinstance(module, MATRICES):
        inputs = seen.rounded_inputs.flatten(0, -2)[index].unsqueeze(0)
    else:
        inputs = patches(seen.rounded_inputs, module, outputs.shape[2:], index)
    targets = places[index].reshape(len(index), groups, -1).transpose(0, 1).contiguous()
    most = seen.bound if seen.bound is None or not seen.bound.ndim else seen.bound.reshape(groups, 1, -1)
    rows = Rows(inputs, targets, None if bias is None else bias.reshape(groups, 1, -1), most)
    return replace(rows, targets=rows.act(targets))


def patches(x: Tensor, conv: Convolution, out: torch.Size, index: Tensor) -> Tensor:
    """Return the input patches of `conv` for the output positions `index` in (images, *out).

    Their shape is (groups, rows, inputs of a filter).
    """
    steps = [range(0, size * apart, apart) for size, apart in zip(conv.kernel_size, conv.dilation, strict=True)]
    stride = conv.stride
    if isinstance(conv, TransposedConv):  # the convolution of the stretched input with the kernel turned around
        x, stride, steps = _stretched(x, conv), (1,) * len(out), [step[::-1] for step in steps]
    else:
        x = F.pad(x, conv._reversed_padding_repeated_twice)
    image, *corner = torch.unravel_index(index, (len(x), *out))
    corner = [place * step for place, step in zip(corner, stride, strict=True)]
    seen = []
    for kernel in itertools.product(*steps):
        place: Any = (image, slice(None), *(c + k for c, k in zip(corner, kernel, strict=True)))
        seen.append(x[place])
    return torch.stack(seen, dim=2).reshape(len(index), conv.groups, -1).transpose(0, 1).contiguous()


def _stretched(x: Tensor, conv: TransposedConv) -> Tensor:
    """Return x (n, channels, ...) with zeros between its values and around them, as `conv` reads it with stride 1."""
    apart = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], conv.stride, strict=True)))
    steps: Any = (..., *(slice(None, None, s) for s in conv.stride))
    apart[steps] = x
    around = [d * (k - 1) - p for d, k, p in zip(conv.dilation, conv.kernel_size, conv.padding, strict=True)]
    ends = [(each, each + more) for each, more in zip(around, conv.output_padding, strict=True)]
    return F.pad(apart, [size for pair in reversed(ends) for size in pair])


def with_steps(steps: int) -> PtqMethod:
    """Return AdaRound with so many steps for a layer."""
    return PtqMethod(functools.partial(round_layer, settings=AdaroundSettings(steps=steps)), with_steps=with_steps)


METHOD = PtqMethod(round_layer, with_steps=with_steps)
