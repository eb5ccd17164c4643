"""Quantization-aware training: a float checkpoint to one of codes that were trained as such.

make BatchNorm's factors positive -> learners on weights and edges, started on one batch -> training -> codes and grids
-> BatchNorm, live until then, into per-channel scales -> biases onto their int32 grid. The codes never change after
training: folding multiplies scales, and turns a channel's codes around where its factor has become negative.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from r2cli import models, registry
from r2cli.calibration import calibrate, deployed
from r2cli.errors import InputError
from r2cli.graph import batchnorm, edit, equivalence, structure
from r2cli.qat import qat_method, quantizer_placement
from r2cli.qat.qat_method import Batches
from r2cli.qat.quantizer_placement import Prepared
from r2cli.quantized.channels import per_channel
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage.checkpoint import Checkpoint, require_float

OUTPUTS, INPUTS = "outputs", "inputs"
PAPER, FITTED = "paper", "fitted"


@dataclass(frozen=True)
class QatSettings:
    """`keep` maps layer-name patterns to other bits, of weights and at least of what the layers read.

    `act_bits` None leaves activations float; `activations` is where they are rounded, OUTPUTS or INPUTS. `start` is
    where steps and ranges begin: as in the PAPER, or FITTED, where least is lost.
    """

    method: str
    weight_bits: int
    act_bits: int | None
    keep: Mapping[str, int]
    activations: str = OUTPUTS
    start: str = FITTED


@dataclass(frozen=True)
class QatTask:
    """A float checkpoint, and what is to become of it; `scratch`: of its architecture, with fresh weights.

    `batches` gives training images, the same in every process: learners start on the first of them.
    """

    checkpoint: Checkpoint
    settings: QatSettings
    batches: Batches
    device: torch.device
    scratch: bool = False


@dataclass(frozen=True)
class TrainedLayer:
    """What became of one layer. `act_bits` are those of what it reads, None for float; `levels` are those in use."""

    layer: str
    shape: tuple[int, ...]
    bits: int
    act_bits: int | None
    levels: int
    scale: float
    note: str = ""


def prepare(work: QatTask) -> Prepared:
    """The checkpoint's network with learners, on the device of the work, started on the first of its images.

    Raises InputError for a coded checkpoint, bits that the method does not have, a pattern that names no layer, a graph
    that cannot be read, and a layer that cannot be quantized.
    """
    made, settings = work.checkpoint, work.settings
    require_float(made)
    model = models.build(made.model) if work.scratch else deployed.network(made)
    net = equivalence.require_same(quantizer_placement.read(model, made.input.blank(2)), model, made.input)
    names = [layer.name for layer in structure.layers(net)]
    if not names:
        raise InputError(f"{made.model.name} has no convolution or linear layer to quantize")
    bits = structure.by_pattern(names, settings.weight_bits, settings.keep)
    for name, own in bits.items():
        registry.require_bits(settings.method, own, f"{own}-bit weights ('{name}')")
    method, acts = qat_method.method(settings.method), settings.act_bits
    reads = {name: max(acts or 0, own) if own != settings.weight_bits else acts or 0 for name, own in bits.items()}
    prepared = quantizer_placement.prepare(
        net,
        made.input.shape,
        lambda name, weight: method.weight(weight, bits[name], settings.start == FITTED),
        method.activation if acts else None,
        reads,
        inputs=settings.activations == INPUTS,
    )
    keep_scales(prepared)
    for edge in prepared.activations:
        edge.fitted = settings.start == FITTED
    prepared.net.to(work.device)
    images, _ = next(iter(work.batches()))
    quantizer_placement.start(prepared, images)
    return prepared


def keep_scales(prepared: Prepared) -> None:
    """Weights keep their scale where no BatchNorm would take another one back."""
    for layer, learner, weight in prepared.each():
        if layer.norm is None:
            learner.keep_scale(weight.detach())


@torch.no_grad()
def finish(work: QatTask, prepared: Prepared, *, round_biases: bool = True) -> tuple[Checkpoint, list[TrainedLayer]]:
    """The coded checkpoint of a trained network; its learners are gone from `prepared` after.

    Without `round_biases` they stay as trained, off the int32 grids that a file wants. Raises R2Error where a bias
    does not fit.
    """
    model = prepared.model.cpu().eval()
    prepared.net.cpu()
    coded = {layer.name: learner.freeze(weight) for layer, learner, weight in prepared.each()}
    grids = {name: edge.grid() for name, edge in prepared.edges.items()}
    for layer in prepared.layers:
        parametrize.remove_parametrizations(model.get_submodule(layer.name), "weight", leave_parametrized=False)
    net = edit.over_same_modules(model)
    norms = {layer.name: structure.norm_module(model, layer) for layer in prepared.layers}
    # Which channels a BatchNorm negates, (channels,) bool.
    negative = {name: batchnorm.affine(norm)[0] < 0 for name, norm in norms.items() if norm is not None}
    factors = batchnorm.remove_norms(net)
    deployed.insert_grids(net, grids)
    folded, rows = {}, []
    for layer, module in structure.named_layers(net):
        one = fold(coded[layer.name], factors.get(layer.name), negative.get(layer.name))
        folded[layer.weight] = one
        module.weight.copy_(one.decode())
        reads = edit.source(net, structure.node_of(net, layer))
        turned = int(negative[layer.name].sum()) if layer.name in negative else 0
        note = f"{turned} channels turned around" if turned else ""
        rows.append(_row(layer.name, coded[layer.name], grids[reads].bits if reads else None, note))
    if grids and round_biases:
        calibrate.round_biases(net, folded, grids)
    floats = {name: tensor for name, tensor in net.state_dict().items() if name not in folded}
    return replace(work.checkpoint, floats=floats, coded=folded, activations=grids, folded=True), rows


def fold(coded: Coded, factor: Tensor | None, negative: Tensor | None) -> Coded:
    """A weight with BatchNorm's factor (channels,), its sign given apart, in per-channel scales: the same integers.

    Where the factor is negative the integers change sign: midrise ones and those without the lowest code have their
    negatives on the same grid; else codes q become ~q about a zero point of -1, which is -q.
    """
    grid, codes = coded.codec, coded.codes
    assert isinstance(grid, Grid)
    if factor is None or negative is None:
        return coded
    scale, _ = batchnorm.folded_scale(grid.scale, factor)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    turned = per_channel(negative, codes.ndim)
    if grid.midrise:
        return Coded(
            replace(grid, scale=scale, zero_point=zero, axis=0),
            torch.where(turned, grid.highest - codes, codes).to(codes.dtype),
        )
    lowest = (codes.flatten(1).amin(1) == grid.lowest) & negative
    zero[lowest] = -1
    flipped = torch.where(lowest.reshape(turned.shape), ~codes, -codes)
    own = replace(grid, scale=scale, zero_point=zero, axis=0)
    return Coded(own, torch.where(turned, flipped, codes).to(codes.dtype))


def _row(name: str, coded: Coded, act_bits: int | None, note: str) -> TrainedLayer:
    codes, bits = coded.codes, coded.codec.bits
    used = len(torch.unique(codes))
    return TrainedLayer(name, tuple(codes.shape), bits, act_bits, used, coded.codec.scale.item(), note)
