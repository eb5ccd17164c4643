"""Which bits each layer gets within a budget, for the grids that post-training quantization will give it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from r2cli.config import layer_form
from r2cli.config.layer_form import LayerForm
from r2cli.data import Batch
from r2cli.data.task import CLASSIFICATION, Task
from r2cli.graph import batchnorm, structure
from r2cli.ptq import mixed_precision, post_training
from r2cli.ptq.post_training import PtqSettings
from r2cli.quantized.packing import packed_bytes
from r2cli.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class ChosenBits:
    """One layer of a choice of mixed precision: its bits, and its sensitivity at every width that was tried."""

    layer: str
    bits: int
    sensitivity: Mapping[int, float]


@dataclass(frozen=True)
class BitTarget:
    """A budget, and the `sensitivity` that it is spent by, one of `mixed_precision.SENSITIVITIES`.

    The budget is the mean number of `bits` per weight, or else the `size` of codes, scales and zero points in bytes.
    """

    bits: float | None
    size: int | None
    sensitivity: str


@torch.no_grad()
def choose_bits(
    checkpoint: Checkpoint,
    settings: PtqSettings,
    target: BitTarget,
    batches: Iterable[Batch],
    device: torch.device,
    seed: int,
    task: Task = CLASSIFICATION,
) -> tuple[PtqSettings, list[ChosenBits]]:
    """Return `settings` with the bits that keep the loss lowest within `target`, and the choice for every layer.

    The most common bits become `weight_bits`, and the others `keep`. Layers that `settings.keep` names have the bits
    that it says, and their size counts. `batches` of labelled images are read for the sensitivity 'hessian' only.
    Raises InputError as `quantize` does, and for a target that is out of reach.
    """
    net, factors, *_ = post_training.prepare(checkpoint, settings)
    forms = post_training.forms([layer.name for layer in structure.layers(net)], replace(settings, weight_bits=0))
    weights, tried = {}, {}
    for layer, module in structure.named_layers(net):
        weight, own, form = structure.float_weight(module), {}, forms.get(layer.name)
        if form is None:  # it stays float
            weight.copy_(batchnorm.folded(weight, factors.get(layer.name)))
            continue
        usual = [bits for bits in mixed_precision.WIDTHS if form.symmetric or bits > 1]  # one bit has no zero point
        for bits in [form.weight_bits] if form.weight_bits else usual:
            # The grid that the layer will have, so that its real error counts.
            coded, folded = post_training.on_grid(weight, bits, form, factors.get(layer.name))
            size = coded.payload_bytes() if target.size else packed_bytes(weight.numel(), bits)
            own[bits] = size, mixed_precision.noise(coded.decode(), folded)
        weight.copy_(folded)
        weights[layer.name], tried[layer.name] = weight, own
    factor = dict.fromkeys(weights, 1.0)
    if target.sensitivity == "hessian":
        net.to(device)
        learned = mixed_precision.learned_by(net, task, checkpoint.outputs)
        factor = mixed_precision.curvature(net, weights, batches, seed, learned)
    count = sum(w.numel() for w in weights.values())
    chosen = mixed_precision.allot(tried, factor, target.size or int((target.bits or 0) * count / 8))
    # The most common bits become the default, which makes the `--keep` options for the same result as few as possible.
    common = max(mixed_precision.WIDTHS, key=lambda width: sum(own == width for own in chosen.values()))
    keep = dict(settings.keep)
    for name, width in chosen.items():
        if forms[name].weight_bits == 0 and width != common:
            keep[name] = layer_form.of(keep[name]).then(LayerForm(width)).word if name in keep else width
    rows = [
        ChosenBits(name, own, {bits: factor[name] * noise for bits, (_, noise) in tried[name].items()})
        for name, own in chosen.items()
    ]
    return replace(settings, weight_bits=common, keep=keep), rows
