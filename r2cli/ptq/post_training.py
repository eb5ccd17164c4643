"""Post-training quantization: from a float checkpoint to one with codes, in one pass and without training.

fold (or keep the factor of BatchNorm for the scale) -> equalize -> grid and codes of every weight -> absorb, correct ->
ranges of the activations over calibration images, or from the BatchNorms if there are none -> biases onto their int32
grid.

A method is an entry of `registry.PTQ_METHODS`, which says how it rounds and which parts of DFQ it has.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from r2cli import registry
from r2cli.calibration import calibrate as grids
from r2cli.calibration import deployed
from r2cli.config import targets
from r2cli.errors import InputError
from r2cli.graph import batchnorm, equivalence, left_float, lone_norms, operators, placement, structure
from r2cli.graph.read import Unreadable
from r2cli.ptq import (
    batchnorm_statistics,
    bias_correction,
    equalize,
    layer_rows,
    layer_sweep,
    ptq_method,
    qdrop,
    weight_grids,
)
from r2cli.ptq.layer_rows import QuantizedLayer as QuantizedLayer  # here for whoever calls `quantize`
from r2cli.ptq.layer_sweep import LayerSample
from r2cli.ptq.ptq_method import PtqMethod
from r2cli.quantized.channels import per_channel
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage.checkpoint import Checkpoint, require_float
from r2cli.storage.input_spec import Given, NetworkInput

CHANNEL, TENSOR, UNFOLDED = "channel", "tensor", "unfolded"
GRANULARITIES = (CHANNEL, TENSOR, UNFOLDED)
EQUALIZE, ABSORB, CORRECT = DFQ = registry.DFQ_PARTS
CLIP, RELU = "clip", "relu"


@dataclass(frozen=True)
class PtqSettings:
    """What is asked of post-training quantization.

    `act_bits` None leaves activations in float. `keep` maps patterns of layer names to what --keep says of them.
    `parts` are the parts of DFQ to do; None means those of the method. `relu6` says what equalization makes of a ReLU6:
    'clip' keeps the function, and 'relu' changes it. `weight_range` is a rule of `weight_grids.RANGES`, and `act_range`
    is one of `observers.OBSERVERS`.
    """

    method: str
    weight_bits: int
    act_bits: int | None
    granularity: str
    keep: Mapping[str, int | str]
    parts: tuple[str, ...] | None = None
    relu6: str = CLIP
    weight_range: str = "minmax"
    act_range: str = "minmax"
    symmetric: bool = True
    embeddings: bool = False  # whether embeddings get codes too, which needs activations in float
    target: str = targets.DEFAULT
    group_size: int = 0  # inputs of a linear layer that share a scale, which needs activations in float; 0: all
    qdrop: bool = False  # whether BRECQ rounds activations of few bits by chance, and learns their steps
    steps: int | None = None  # of learning, for a layer or block; None: as many as the method takes by itself


@torch.no_grad()
def quantize(
    checkpoint: Checkpoint,
    settings: PtqSettings,
    images: Iterable[Given] | None,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Checkpoint, list[QuantizedLayer]]:
    """Return `checkpoint` with codes for its weights and grids for its activations, and a row for every layer.

    The ranges of activations are those on `images`, batches of inputs (n, ...), or those that the BatchNorms'
    statistics give if it is None. `images` are read more than once. Methods see as many as fit into memory, and `tell`
    is told where those are not all. `advance` is called after each layer that a method has rounded. Raises InputError
    for a coded checkpoint, a pattern that names no layer, an unreadable graph, and where a method lacks images.
    """
    method, looks = ptq_method.method(settings.method, settings.steps), _looks(settings)
    parts = _parts(settings)
    if settings.embeddings:
        return _weights_alone(checkpoint, settings)
    if looks and images is None:
        other = registry.PTQ_DATALESS
        raise InputError(f"--method {settings.method} needs data: give --data, or --method {other}, which needs none")
    try:
        net, factors, normals, notes = prepare(checkpoint, settings)
    except (Unreadable, equivalence.Misread):
        if _needs_graph(settings):
            raise
        return _weights_alone(checkpoint, settings)
    order = [layer.name for layer in structure.layers(net)]
    own = forms(order, settings)
    rows = _leave_float(net, own, factors)
    coded = _nearest(net, own, factors)
    # After the weights have their codes, because absorption changes biases only; before the biases are corrected,
    # because the correction needs the means that absorption leaves.
    if ABSORB in parts:
        notes.append(equalize.absorb(net, normals))
    if CORRECT in parts and images is None:
        notes.append(bias_correction.analytic(net, coded, batchnorm_statistics.values(net, normals, checkpoint.input)))
    net.to(device)
    reads = {name: each.act_bits for name, each in own.items() if each.act_bits is not None}
    acts: Mapping[str, Grid] = {}
    if images is not None and (looks or CORRECT in parts):
        shown = layer_sweep.fitting(net, images, checkpoint.input, tell, on_disk=method.whole is not None)
        few = _few_bits(net, images, settings, reads, checkpoint.input) if settings.qdrop else {}
        coded, told, acts = _look(method, net, shown, coded, few, corrects=CORRECT in parts, advance=advance)
        notes.append(told)
    notes.append({name: note for name, each in own.items() if (note := _other_grid(each, settings))})
    rows |= _decode(net, own, coded, notes)
    if acts:  # learned with the weights
        activations, raised = dict(acts), grids.round_to_grids(net, coded, acts, images, learned=True)
    else:
        known = normals if images is None else images
        activations, raised = _activations(net, coded, settings, reads, checkpoint.input, known)
    net.cpu()
    layer_rows.tell_grids(net, rows, coded, raised, activations)
    left_float.show(net)
    coded |= raised
    floats = {name: tensor for name, tensor in net.state_dict().items() if name not in coded}
    made = replace(checkpoint, floats=floats, coded=coded, activations=activations, folded=True)
    return replace(made, target=settings.target), [rows[name] for name in order]


@torch.no_grad()
def float_network(checkpoint: Checkpoint, settings: PtqSettings) -> fx.GraphModule:
    """The float network that `quantize` rounds: without BatchNorms, and equalized where the method does that.

    Raises InputError for a coded checkpoint, and for a network that cannot be read or has no layer.
    """
    net, factors, normals, _ = prepare(checkpoint, settings)
    for layer, module in structure.named_layers(net):
        module.weight.copy_(batchnorm.folded(module.weight, factors.get(layer.name)))
    if ABSORB in _parts(settings):
        equalize.absorb(net, normals)
    return net


def _parts(settings: PtqSettings) -> tuple[str, ...]:
    """Return the parts of DFQ that are done."""
    return registry.get(registry.PTQ_METHODS, settings.method).parts if settings.parts is None else settings.parts


def _looks(settings: PtqSettings) -> bool:
    """Return whether the method looks at images."""
    return registry.get(registry.PTQ_METHODS, settings.method).looks


def _needs_graph(settings: PtqSettings) -> bool:
    """Return whether the work needs the network's graph, and not only its weights."""
    return settings.act_bits is not None or _looks(settings) or bool(_parts(settings))


Notes = list[dict[str, str]]


def prepare(
    checkpoint: Checkpoint, settings: PtqSettings
) -> tuple[fx.GraphModule, dict[str, Tensor], dict[str, batchnorm_statistics.Normal], Notes]:
    """Return the float network without BatchNorms, equalized if that is asked for, and what was found on the way.

    That is, by layer: the factor of its BatchNorm, which is still to be applied; the statistics of its BatchNorm; and
    notes. Raises InputError for a coded checkpoint, and for a network that cannot be read or has no layer.
    """
    require_float(checkpoint)
    net = equivalence.read(deployed.network(checkpoint), checkpoint.input, deployed.architecture(checkpoint))
    alone = lone_norms.into_layers(net, on_grids=settings.act_bits is not None)
    # First, because everything after it looks at ranges, and a dead channel could have the largest.
    constant = batchnorm.make_dead_channels_constant(net)
    notes = [
        dict.fromkeys(alone, lone_norms.NOTE),
        {name: f"{count} dead channels made constant" for name, count in constant.items()},
    ]
    # One grid for the tensor is as coarse as its largest channel, so channels that hardly vary must not be the largest.
    if settings.granularity == TENSOR:
        notes.append(
            {name: f"{count} quiet channels lowered" for name, count in batchnorm.lower_quiet_channels(net).items()}
        )
    if not structure.layers(net):
        raise InputError(f"{checkpoint.origin} has no convolution or linear layer to quantize")
    normals = batchnorm_statistics.statistics(net)  # read before the BatchNorms are gone
    factors = batchnorm.remove_norms(net)
    if EQUALIZE in _parts(settings):  # after folding: the ranges to equalize are those of folded weights
        if settings.relu6 == RELU:
            equalize.without_relu6(net)
        notes.append(equalize.equalize(net, factors, normals))
    return net, factors, normals, notes


def _activations(
    net: fx.GraphModule,
    coded: Mapping[str, Coded],
    settings: PtqSettings,
    reads: Mapping[str, int],
    spec: NetworkInput,
    known: Iterable[Given] | Mapping[str, batchnorm_statistics.Normal],
) -> tuple[dict[str, Grid], dict[str, Coded]]:
    """Put the activations of `net` on grids, and its biases on theirs, in place.

    Returns the grids by value, and the weights whose scales were raised for their biases, by name. `known` is what the
    ranges come from: batches of images, or the statistics of layers by name. `reads` are the bits of what layers read.
    """
    if settings.act_bits is None:
        return {}, {}
    target = targets.get(settings.target)
    if not isinstance(known, Mapping):
        rule = settings.act_range
        return grids.calibrate_and_round(net, coded, spec.shape, settings.act_bits, known, rule, target, reads)
    ends = batchnorm_statistics.ranges(net, known, spec, result=target.codes_of_result)
    widths = placement.bits_of(net, ends, settings.act_bits, reads)
    activations = grids.grids_of(net, ends, widths, target)
    return activations, grids.round_to_grids(net, coded, activations)


def _few_bits(
    net: fx.GraphModule, images: Iterable[Given], settings: PtqSettings, reads: Mapping[str, int], spec: NetworkInput
) -> dict[str, Grid]:
    """Return the grids of the activations of the float `net`, by node, where some have so few bits that QDrop is done.

    `net` is not changed.
    """
    if settings.act_bits is None or min(settings.act_bits, *reads.values()) >= qdrop.BELOW:
        return {}
    rule, target = settings.act_range, targets.get(settings.target)
    return grids.calibrate(copy.deepcopy(net), spec.shape, settings.act_bits, images, rule, target, reads)


def forms(names: Iterable[str], settings: PtqSettings) -> dict[str, PtqSettings]:
    """Return the settings of every layer by its name: `settings`, and what `keep` says of it. Layers that stay float
    are left out. Raises InputError for a pattern that names no layer, and where no layer is left."""
    found = {}
    for name, form in structure.forms(names, settings.keep).items():
        if not form.is_float:
            found[name] = own = replace(settings, **form.said)
            if not own.symmetric and own.weight_bits == 1:
                raise InputError(
                    "one bit has two levels, -s and +s, which no zero point moves: give --symmetric, or 2 bits"
                )
    if not found:
        raise InputError("--keep leaves every layer float: give bits to some")
    return found


def _decode(
    net: fx.GraphModule, own: Mapping[str, PtqSettings], coded: Mapping[str, Coded], notes: Notes
) -> dict[str, QuantizedLayer]:
    """Give every layer the weight that its codes stand for, in place, so that activations get ranges with it. Returns
    the rows of the layers, by name."""
    rows = {}
    for layer, module in structure.named_layers(net):
        one, weight = coded[layer.weight], module.weight
        note = "; ".join(each[layer.name] for each in notes if layer.name in each)
        rows[layer.name] = layer_rows.of(layer.name, one, weight.cpu(), _grid_of(own[layer.name]), note)
        weight.copy_(one.decode())
    return rows


def _leave_float(
    net: fx.GraphModule, own: Mapping[str, PtqSettings], factors: Mapping[str, Tensor]
) -> dict[str, QuantizedLayer]:
    """Fold the layers that are not in `own`, and hide them in `net`, in place. Returns a row for each, by name."""
    rows = {}
    for layer, module in structure.named_layers(net):
        if layer.name not in own:
            module.weight.copy_(batchnorm.folded(module.weight, factors.get(layer.name)))
            rows[layer.name] = layer_rows.of_float(layer.name, module.weight)
    left_float.hide(net, rows)
    return rows


def _nearest(net: fx.GraphModule, own: Mapping[str, PtqSettings], factors: Mapping[str, Tensor]) -> dict[str, Coded]:
    """Return the nearest codes of every weight, by its name. Folds the weights of `net`, in place."""
    coded = {}
    for layer, module in structure.named_layers(net):
        settings, weight = own[layer.name], module.weight
        structure.require_groups(layer.name, module, settings.group_size)
        coded[layer.weight], folded = on_grid(weight, settings.weight_bits, settings, factors.get(layer.name))
        weight.copy_(folded)
    return coded


def _weights_alone(checkpoint: Checkpoint, settings: PtqSettings) -> tuple[Checkpoint, list[QuantizedLayer]]:
    """Return `checkpoint` with codes for the weights of all layers, and a row for each. It needs no graph.

    BatchNorms stay where they are, and activations stay float. Raises InputError as `quantize` and
    `structure.weighted` do.
    """
    if _needs_graph(settings):
        raise InputError(f"--embeddings is for weights alone: give --method {registry.PTQ_NEAREST} --act-bits none")
    require_float(checkpoint)
    model = deployed.network(checkpoint)
    modules = structure.weighted(model, embeddings=settings.embeddings)
    normed = any(isinstance(module, operators.NORMS) for module in model.modules())
    note = "BatchNorm not folded: the graph was not read" if normed else ""
    own = forms(modules, settings)
    coded, rows = {}, []
    for name, module in modules.items():
        if name not in own:
            rows.append(layer_rows.of_float(name, structure.weight_of(module)))
            continue
        structure.require_groups(name, module, settings.group_size)
        one, weight = on_grid(structure.weight_of(module), own[name].weight_bits, own[name], None)
        coded[f"{name}.weight"] = one
        rows.append(layer_rows.of(name, one, weight, _grid_of(own[name]), note))
    floats = {name: tensor for name, tensor in checkpoint.floats.items() if name not in coded}
    return replace(checkpoint, floats=floats, coded=coded, target=settings.target), rows


def _look(
    method: PtqMethod,
    net: fx.GraphModule,
    images: Given,
    nearest: Mapping[str, Coded],
    acts: Mapping[str, Grid],
    *,
    corrects: bool,
    advance: Callable[[], None],
) -> tuple[dict[str, Coded], dict[str, str], Mapping[str, Grid]]:
    """Let a method round the layers on `images` (n, ...). Returns codes by the weight's name, notes by layer, and the
    grids of activations that were learned, by node: where `acts` has any.

    Biases are changed in place. With `corrects`, they are corrected after each layer is rounded, so that the next layer
    sees corrected inputs.
    """
    if method.whole is not None:
        coded, learned, found = method.whole(net, images, nearest, advance, acts)
        _set_biases(net, learned)
        return coded, dict.fromkeys(learned, "bias learned"), found

    def visit(seen: LayerSample) -> tuple[Coded, Tensor | None]:
        chosen = nearest[seen.layer.weight]
        if method.rounds is not None:
            chosen = method.rounds(seen, chosen)
        advance()
        return chosen, bias_correction.empirical(seen, chosen) if corrects else structure.bias_of(seen.module)

    coded, biases = layer_sweep.sweep(net, images, visit, nearest)
    return coded, _set_biases(net, biases) if corrects else {}, {}


def _set_biases(net: fx.GraphModule, biases: Mapping[str, Tensor | None]) -> dict[str, str]:
    """Give each layer its corrected bias, in place. Returns a note for each layer, by name."""
    for name, corrected in biases.items():
        own = structure.bias_of(net.get_submodule(name))
        if corrected is not None and own is not None:
            own.copy_(corrected)
    return {n: "not corrected: it has no bias" if b is None else "bias corrected" for n, b in biases.items()}


def on_grid(weight: Tensor, bits: int, settings: PtqSettings, factor: Tensor | None) -> tuple[Coded, Tensor]:
    """Return a weight (channels, ...) on the nearest levels of its grid, as it is deployed, and the float weight.

    `factor` (channels,) is that of the BatchNorm after the layer. The float weight is the one with the factor in it.
    """
    rule, symmetric, group = settings.weight_range, settings.symmetric, settings.group_size
    nearest = partial(weight_grids.nearest, bits=bits, rule=rule, symmetric=symmetric, group=group)
    folded = batchnorm.folded(weight, factor)
    if settings.granularity != UNFOLDED:
        # A scale of its own holds a filter of one weight exactly.
        own_scales = settings.granularity == CHANNEL or folded[0].numel() == 1
        return nearest(folded, per_channel=own_scales), folded
    # Unfolded: one grid on the weight as it was trained, whose range a regularizer has kept narrow. Folding would make
    # outliers of the channels with a large factor; here the factor goes into the scales instead.
    raw = nearest(weight, per_channel=False)
    if factor is None:
        return raw, folded
    grid = raw.codec
    assert isinstance(grid, Grid)
    scale, exact = batchnorm.folded_scale(grid.scale, factor)
    own = replace(grid, scale=scale, zero_point=grid.zero_point.expand(len(scale)).contiguous(), axis=0)
    # Where a scale was too small to use it was raised. The old codes times the new scale would be too large, so the
    # codes are found again.
    lifted = per_channel(scale != exact, weight.ndim)
    return Coded(own, torch.where(lifted, own.encode(folded), raw.codes)), folded


def _other_grid(own: PtqSettings, settings: PtqSettings) -> str:
    """What is said of a layer's grid where --keep gives it another than most layers have."""
    told = ["asymmetric"] if settings.symmetric and not own.symmetric else []
    return "; ".join(told + ([f"{own.weight_range} range"] if own.weight_range != settings.weight_range else []))


def _grid_of(settings: PtqSettings) -> str:
    return f"{settings.group_size} inputs" if settings.group_size else settings.granularity
