"""Mixed precision: choose the bits of every layer so that the loss grows least within a budget of bytes.

Paper: Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks" (2020).

    sensitivity of a layer at b bits = mean of the Hessian's diagonal * |Q_b(w) - w|^2

The mean of the diagonal is trace / n, and the trace Hutchinson's: the mean of v' H v over v of random signs. Without
labels, `sqnr`: |Q_b(w) - w|^2 / |w|^2, the noise that a layer's output gets from rounding.

Where we differ from the paper:

- Q_b is the grid that the layer will really have. Sizes are those of packed codes, so only widths that save bytes are
  tried.
- Sensitivities and bytes add up, so the choice is an exact one (`knapsack.py`).
- The Hessian describes small changes only, and few bits are no small change. To leave out widths whose noise is a large
  share of the weights was worse (benchmarks/mixed.md): `outputs` measures them as they are (`output_change.py`).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from r2cli.data import Batch, losses
from r2cli.data.losses import Learned
from r2cli.data.task import Task
from r2cli.errors import InputError
from r2cli.storage.input_spec import count, places

WIDTHS = (8, 4, 3, 2, 1)  # codes of 7 to 5 bits take a byte, as those of 8 bits do
OUTPUTS, BEST = "outputs", "best"
SENSITIVITIES = ("hessian", "sqnr", OUTPUTS, BEST)
IMAGES = 256  # the trace is averaged over at most this many images
DRAWS = 2  # random sign vectors for each batch

CROSS_ENTROPY = losses.of_target(losses.CROSS_ENTROPY, ())


def curvature(
    net: fx.GraphModule,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    seed: int,
    learned: Learned = CROSS_ENTROPY,
) -> dict[str, float]:
    """Return, for each weight by name, the mean of the diagonal of the loss's Hessian, times |w|^2.

    `net` is on the device of the images. An estimate below 0, which is noise, becomes the least of the others. Raises
    InputError where there is no image.
    """
    draw = torch.Generator().manual_seed(seed)
    found, seen = dict.fromkeys(weights, 0.0), 0
    own = list(weights.values())
    for images, labels in batches:
        # torch's fused kernels for attention have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            # The sum and not the mean: batches of different sizes then add up, and the end divides by all images.
            loss = learned(images, net(*places(images)), labels) * count(images)
            slopes = torch.autograd.grad(loss, own, create_graph=True)
            for _ in range(DRAWS):
                signs = [(2 * torch.randint(2, w.shape, generator=draw) - 1).to(w) for w in own]
                bent = torch.autograd.grad(slopes, own, signs, retain_graph=True)
                for name, sign, product in zip(weights, signs, bent, strict=True):
                    found[name] += float((sign * product).sum(dtype=torch.float64)) / sign.numel()
        seen += count(images)
        if seen >= IMAGES:
            break
    if not seen:
        raise InputError("--sensitivity hessian needs labelled images, and there are none: give --sensitivity sqnr")
    means = {name: value / (seen * DRAWS) for name, value in found.items()}
    least = min((value for value in means.values() if value > 0), default=1.0)
    return {name: max(value, least) * _power(weights[name]) for name, value in means.items()}


def learned_by(net: fx.GraphModule, task: Task, outputs: Sequence[str]) -> Learned:
    """What the Hessian is of: the task's loss, or the distance to what the network itself gives."""
    if task.loss.distils:
        return losses.of_teacher(net, decides=task.logits)
    return losses.of_target(task.loss, outputs)


def noise(rounded: Tensor, weight: Tensor) -> float:
    """Return |Q(w) - w|^2 / |w|^2."""
    return _power(rounded - weight) / max(_power(weight), 1e-30)


def _power(w: Tensor) -> float:
    return float(w.detach().double().square().sum())
