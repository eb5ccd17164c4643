"""Quantization-aware training: from a float checkpoint to one whose codes were trained.

make BatchNorm's factors positive -> quantizers on weights and edges, started on one batch -> training -> codes and
grids -> BatchNorm, live until then, into per-channel scales -> biases onto their int32 grid.

The codes are those of training. Folding multiplies the scales only; where a channel's factor has become negative, it
also changes the sign of the channel's integers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from r2cli import models, registry
from r2cli.calibration import biases, deployed
from r2cli.calibration.apart import apart
from r2cli.config import targets
from r2cli.data import losses
from r2cli.data.losses import Learned
from r2cli.data.task import CLASSIFICATION, Task
from r2cli.errors import InputError
from r2cli.graph import batchnorm, edit, equivalence, lone_norms, operators, structure
from r2cli.qat import qat_method, quantizer_placement
from r2cli.qat.qat_method import Batches
from r2cli.qat.quantizer_placement import Prepared
from r2cli.quantized.channels import per_channel
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage.checkpoint import Checkpoint, require_float
from r2cli.train import loop

OUTPUTS, INPUTS = "outputs", "inputs"
PAPER, FITTED = "paper", "fitted"


@dataclass(frozen=True)
class QatSettings:
    """What is asked of quantization-aware training.

    `keep` maps patterns of layer names to what --keep says of them: bits of weights, and at least so many of what they
    read unless it says other ones; or that they stay float.
    `act_bits` None leaves activations in float. `activations` says where they are rounded: OUTPUTS or INPUTS of layers.
    `start` says where steps and ranges begin: as in the PAPER, or FITTED, where the squared error is least.
    """

    method: str
    weight_bits: int
    act_bits: int | None
    keep: Mapping[str, int | str]
    activations: str = OUTPUTS
    start: str = FITTED
    target: str = targets.DEFAULT


@dataclass(frozen=True)
class QatTask:
    """A float checkpoint and the settings for it. With `scratch` only its architecture is used, with new weights.

    `batches` gives training images, the same in every process. The quantizers start on the first batch.
    """

    checkpoint: Checkpoint
    settings: QatSettings
    batches: Batches
    device: torch.device
    scratch: bool = False
    task: Task = CLASSIFICATION

    def learned(self) -> Learned:
        """What is learned: the task's loss, or the distance to the float network."""
        if self.task.loss.distils:
            teacher = loop.to_device(deployed.network(self.checkpoint), self.device)
            return losses.of_teacher(teacher, decides=self.task.logits)
        return losses.of_target(self.task.loss, self.checkpoint.outputs)


@dataclass(frozen=True)
class TrainedLayer:
    """What became of one layer.

    `act_bits` are the bits of what it reads, None for float. `levels` is how many levels its weights use.
    """

    layer: str
    shape: tuple[int, ...]
    bits: int
    act_bits: int | None
    levels: int
    scale: float
    note: str = ""


def prepare(work: QatTask) -> Prepared:
    """Return the checkpoint's network with quantizers, on the device of `work`, started on the first batch.

    Raises InputError for a coded checkpoint, bits that the method does not have, a pattern that names no layer, a graph
    that cannot be read, and a layer that cannot be quantized.
    """
    made, settings = work.checkpoint, work.settings
    require_float(made)
    model = deployed.network(made) if not work.scratch else models.build(made.model)
    model = models.called(model, made.model, made.input)
    # The graph is what is trained and exported. It must compute what the user's module computes.
    graph = quantizer_placement.read(model, made.input.blank(2), deployed.architecture(made))
    net = equivalence.require_same(graph, model, made.input)
    lone_norms.into_layers(net, on_grids=bool(settings.act_bits))
    names = [layer.name for layer in structure.layers(net)]
    if not names:
        raise InputError(f"{made.origin} has no convolution or linear layer to quantize")
    forms = {name: form for name, form in structure.forms(names, settings.keep).items() if not form.is_float}
    if not forms:
        raise InputError("--keep leaves every layer float: give bits to some")
    bits = {name: form.weight_bits or settings.weight_bits for name, form in forms.items()}
    for name, own in bits.items():
        registry.require_bits(settings.method, own, f"{own}-bit weights ('{name}')")
    target = targets.get(settings.target)
    method, acts = qat_method.method(settings.method), settings.act_bits
    # A layer that --keep spares with more bits would lose them again on an input of fewer.
    reads = {name: max(acts or 0, own) if own != settings.weight_bits else acts or 0 for name, own in bits.items()}
    reads |= {name: form.act_bits for name, form in forms.items() if form.act_bits is not None}
    prepared = quantizer_placement.prepare(
        net,
        made.input.shape,
        lambda name, weight: method.weight(weight, bits[name], settings.start == FITTED),
        method.activation if acts else None,
        reads,
        inputs=settings.activations == INPUTS,
        result=target.codes_of_result,
    )
    keep_scales(prepared)
    for edge in prepared.edges.values():
        edge.symmetric = target.symmetric
    for trained in prepared.activations:
        trained.fitted = settings.start == FITTED
    # Weights are scaled before the first images pass, because activations start on what these weights compute.
    prepared.net.to(work.device)
    images, _ = next(iter(work.batches()))
    quantizer_placement.start(prepared, images)
    return prepared


def keep_scales(prepared: Prepared) -> None:
    """Let the weights keep their scale where no BatchNorm follows, which would undo a change of scale; in place."""
    for layer, learner, weight in prepared.each():
        if layer.norm is None:
            learner.keep_scale(weight.detach())


@torch.no_grad()
def finish(work: QatTask, prepared: Prepared, *, round_biases: bool = True) -> tuple[Checkpoint, list[TrainedLayer]]:
    """Return the coded checkpoint of a trained network, and a row for every layer. Takes the quantizers out of it.

    Without `round_biases` the biases stay as trained, and not on the int32 grids of an ONNX file.
    """
    model = prepared.model.cpu().eval()
    prepared.net.cpu()
    coded = {layer.name: learner.freeze(weight) for layer, learner, weight in prepared.each()}
    grids = {name: edge.grid() for name, edge in prepared.edges.items()}
    # The codes are in `coded`, so the modules get their float weights back: folding needs plain weights.
    for layer in prepared.layers:
        parametrize.remove_parametrizations(model.get_submodule(layer.name), "weight", leave_parametrized=False)
    # A new graph, without the quantizers on the edges: their grids come back as those of a checkpoint.
    net = edit.over_same_modules(model)
    norms = {layer.name: structure.norm_module(model, layer) for layer in prepared.layers}
    # Which channels a BatchNorm negates, (channels,) bool. `prepare` made the factors positive, but training may have
    # moved one below 0. It is read here because `remove_norms` returns factors without their sign.
    negative = {name: batchnorm.affine(norm)[0] < 0 for name, norm in norms.items() if norm is not None}
    factors = batchnorm.remove_norms(net)
    grids = apart(net, grids, symmetric=targets.get(work.settings.target).symmetric)
    deployed.insert_grids(net, grids)
    folded, rows = {}, []
    for layer, module in structure.named_layers(net):
        if layer.name not in coded:
            module.weight.copy_(batchnorm.folded(module.weight, factors.get(layer.name)))
            rows.append(TrainedLayer(layer.name, tuple(module.weight.shape), 32, None, 0, 1.0, operators.ASKED))
            continue
        one = fold(coded[layer.name], factors.get(layer.name), negative.get(layer.name))
        folded[layer.weight] = one
        module.weight.copy_(one.decode())
        reads = edit.source(net, structure.node_of(net, layer))
        turned = int(negative[layer.name].sum()) if layer.name in negative else 0
        note = f"{turned} channels turned around" if turned else ""
        rows.append(_row(layer.name, coded[layer.name], grids[reads].bits if reads else None, note))
    if grids and round_biases:
        shown = (images for images, _ in work.batches())
        raised = biases.round_biases(net, folded, grids, shown, learned=True)
        told = {name: biases.raised_note(folded[name], one) for name, one in raised.items()}
        notes = [filter(None, (row.note, told.get(f"{row.layer}.weight"))) for row in rows]
        rows = [replace(row, note="; ".join(note)) for row, note in zip(rows, notes, strict=True)]
        folded |= raised
    floats = {name: tensor for name, tensor in net.state_dict().items() if name not in folded}
    made = replace(work.checkpoint, floats=floats, coded=folded, activations=grids, folded=True)
    return replace(made, target=work.settings.target), rows


def fold(coded: Coded, factor: Tensor | None, negative: Tensor | None) -> Coded:
    """Return a weight with BatchNorm's factor (channels,) in per-channel scales; the integers keep their size.

    `negative` (channels,) says where the factor is below 0. A scale must be positive, so there the integers change
    their sign. The negatives of midrise integers are on the same grid, and so are those of a plain grid unless its
    lowest code is in use, which has no negative: -8 to 7 at 4 bits. Such a channel gets the codes ~q = -q - 1 and the
    zero point -1, which together are -q.
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
