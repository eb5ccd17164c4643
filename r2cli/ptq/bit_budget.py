"""Which bits each layer gets within a budget, for the grids that post-training quantization will give it.

What each layer loses at each width is measured once (`measure`); the knapsack over all layers then has an answer for
every budget (`front`, `settings_at`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import fx

from r2cli import registry
from r2cli.config import layer_form
from r2cli.config.layer_form import LayerForm
from r2cli.data import Batch
from r2cli.data.task import CLASSIFICATION, Task
from r2cli.errors import InputError
from r2cli.graph import batchnorm, structure
from r2cli.ptq import cost_table, knapsack, mixed_precision, output_change, post_training
from r2cli.ptq.cost_table import CostTable
from r2cli.ptq.knapsack import Front
from r2cli.ptq.post_training import PtqSettings
from r2cli.storage.checkpoint import Checkpoint

POINTS = 100  # of a front, in a report


@dataclass(frozen=True)
class ChosenBits:
    """One layer of a choice of mixed precision: its bits, and its sensitivity at every width that was tried.

    `act_bits` are those of what it reads, where they were chosen too.
    """

    layer: str
    bits: int
    sensitivity: Mapping[int, float]
    act_bits: int | None = None


@dataclass(frozen=True)
class BitTarget:
    """A budget, and the `sensitivity` that it is spent by, one of `mixed_precision.SENSITIVITIES`.

    The budget is the mean number of `bits` per weight, or the `size` of codes, scales and zero points in bytes, or the
    sum of what `costs` says of the layers. `act_bits` is the mean of what layers read, each of `act_widths`, or None.
    """

    bits: float | None
    size: int | None
    sensitivity: str
    costs: CostTable | None = None
    budget: float | None = None
    act_widths: tuple[int, ...] = ()
    act_bits: float | None = None

    @property
    def asks_outputs(self) -> bool:
        """Whether layers are measured by what arrives at the outputs."""
        return self.sensitivity in (mixed_precision.OUTPUTS, mixed_precision.BEST)


@dataclass(frozen=True)
class LayerLosses:
    """What was measured of the layers that get codes, each by its name.

    `weights` is the sensitivity by bits, and `reads` that of what the layer reads. `sizes` are bytes by bits; where the
    budget is of bits, a last byte that is not full is a part of one. `numbers` are those of a weight and of what the
    layer reads. `noise` of a weight is a share of its square, by bits.
    """

    settings: PtqSettings
    forms: Mapping[str, PtqSettings]  # with 0 bits where they are to be chosen
    kinds: Mapping[str, str]
    sizes: Mapping[str, Mapping[int, float]]
    weights: Mapping[str, Mapping[int, float]]
    reads: Mapping[str, Mapping[int, float]]
    numbers: Mapping[str, tuple[int, int]]
    noise: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


@torch.no_grad()
def measure(
    checkpoint: Checkpoint,
    settings: PtqSettings,
    target: BitTarget,
    batches: Iterable[Batch],
    device: torch.device,
    seed: int,
    task: Task = CLASSIFICATION,
) -> LayerLosses:
    """Measure what each layer loses at each width by itself. Layers that `settings.keep` names have the bits that it
    says, and their size counts.

    `batches` are read for all sensitivities but 'sqnr', and their labels for 'hessian'. Raises InputError as `quantize`
    does.
    """
    net, factors, *_ = post_training.prepare(checkpoint, settings)
    forms = post_training.forms([layer.name for layer in structure.layers(net)], replace(settings, weight_bits=0))
    widths = _weight_widths(target)
    sizes, noise, tried, weights, kinds = {}, {}, {}, {}, {}
    for layer, module in structure.named_layers(net):
        weight, name, form = structure.float_weight(module), layer.name, forms.get(layer.name)
        folded = batchnorm.folded(weight, factors.get(name))
        if form is not None:
            own = [form.weight_bits] if form.weight_bits else [n for n in widths if form.symmetric or n > 1]
            # The grid that the layer will have, so that its real error counts.
            coded = {bits: post_training.on_grid(weight, bits, form, factors.get(name))[0] for bits in own}
            if target.asks_outputs:
                tried[name] = {
                    bits: output_change.TriedRounding(one.decode().to(device)) for bits, one in coded.items()
                }
            sizes[name] = {
                bits: one.payload_bytes() if target.bits is None else bits * weight.numel() / 8
                for bits, one in coded.items()
            }
            noise[name] = {bits: mixed_precision.noise(one.decode(), folded) for bits, one in coded.items()}
            weights[name], kinds[name] = weight, cost_table.kind(module)
        weight.copy_(folded)
    structure.propagate(net, checkpoint.input.shape)
    numbers = {name: (weight.numel(), _reads(net, name)) for name, weight in weights.items()}
    net.to(device)
    images = [given for given, _ in batches] if target.asks_outputs or _act_widths(target) else []
    shape = checkpoint.input.shape
    if target.asks_outputs:
        lost = output_change.measure(net, tried, images, shape)
    elif target.sensitivity == "hessian":
        learned = mixed_precision.learned_by(net, task, checkpoint.outputs)
        factor = mixed_precision.curvature(net, weights, batches, seed, learned)
        lost = {name: {bits: factor[name] * each for bits, each in own.items()} for name, own in noise.items()}
    else:
        lost = noise
    grids = output_change.input_grids(net, weights, images, _act_widths(target)) if _act_widths(target) else {}
    rounded = {
        n: {bits: output_change.TriedRounding(reads=each) for bits, each in own.items()} for n, own in grids.items()
    }
    reads = output_change.measure(net, rounded, images, shape) if rounded else {}
    return LayerLosses(settings, forms, kinds, sizes, lost, reads, numbers, noise)


def _weight_widths(target: BitTarget) -> list[int]:
    if target.costs is None:
        return list(mixed_precision.WIDTHS)
    own = {layer_form.of(width).weight_bits for width in target.costs.widths}
    return sorted((bits for bits in own if bits is not None), reverse=True)


def _act_widths(target: BitTarget) -> list[int]:
    """The bits of what layers read that are to be measured."""
    if target.costs is None:
        return sorted(target.act_widths, reverse=True)
    own = {layer_form.of(width).act_bits for width in target.costs.widths}
    return sorted((bits for bits in own if bits is not None), reverse=True) if len(own) > 1 else []


def _reads(net: fx.GraphModule, name: str) -> int:
    """How many numbers of one image a layer reads."""
    node = next(node for node in net.graph.nodes if node.op == "call_module" and str(node.target) == name)
    before = node.all_input_nodes
    return int(prod(before[0].meta["tensor_meta"].shape[1:])) if before else 0


# Losses of layers do not quite add up, and no one measure of them is best for every network (benchmarks/mixed.md). So
# several are tried: powers of the change at the outputs, and of the noise of the weight.
MEASURES = {
    "outputs": (1.0, 0.0),
    "squared outputs": (2.0, 0.0),
    "outputs and noise": (1.0, 0.5),
    "noise": (0.0, 1.0),
}


def by_measures(losses: LayerLosses) -> dict[str, LayerLosses]:
    """Return `losses`, measured at the outputs, by every measure of `MEASURES` that applies."""

    def power(own: Mapping[int, float], noise: Mapping[int, float], powers: tuple[float, float]) -> dict[int, float]:
        return {bits: each ** powers[0] * noise.get(bits, 1.0) ** powers[1] for bits, each in own.items()}

    return {
        measure: replace(
            losses,
            weights={name: power(own, losses.noise[name], powers) for name, own in losses.weights.items()},
            reads={name: power(own, {}, powers) for name, own in losses.reads.items()},
        )
        for measure, powers in MEASURES.items()
        if not losses.reads or not powers[1]  # what layers read has no noise of a weight to be added to
    }


# --- from losses to a choice ---------------------------------------------------------------------------------------


def chosen(losses: LayerLosses, target: BitTarget) -> tuple[PtqSettings, list[ChosenBits], list[dict[str, float]]]:
    """The settings that lose least within `target`, a row for every layer, and points of the front, for a report.

    The most common bits become `weight_bits`, and the others `keep`. Raises InputError for a target out of reach.
    """
    found = front(losses, target)
    place = found.within(limit(losses, target), unit(target))
    return *settings_at(losses, target, found, place), points(found, place)


def points(found: Front, place: int) -> list[dict[str, float]]:
    """Points of a front for a report, the one at `place` among them."""
    return [
        {"cost": float(found.costs[each]), "loss": float(found.losses[each]), "chosen": each == place}
        for each in sorted({*found.thinned(POINTS), place})
    ]


def front(losses: LayerLosses, target: BitTarget) -> Front:
    """All choices that no other beats, by what the budget is of. Raises InputError for a table with holes.

    A method that learns gives a layer one bit only where two for each are too many. What is measured is rounding to the
    nearest, where one bit may be no worse than two, and learning gives back much more at two.
    """
    if target.costs is not None:
        return knapsack.front(_by_cost(losses, target.costs))
    sizes = losses.sizes
    if registry.get(registry.PTQ_METHODS, losses.settings.method).learns:
        more = {name: {bits: size for bits, size in own.items() if bits > 1} or own for name, own in sizes.items()}
        least, is_limited = sum(min(own.values()) for own in more.values()), bool(target.bits or target.size)
        sizes = sizes if is_limited and least > limit(losses, target) else more
    return knapsack.front(
        {name: {bits: (size, losses.weights[name][bits]) for bits, size in own.items()} for name, own in sizes.items()}
    )


def _by_cost(losses: LayerLosses, table: CostTable) -> dict[str, knapsack.Options]:
    found: dict[str, knapsack.Options] = {}
    for name, own in cost_table.of_layers(table, losses.kinds).items():
        options: dict[Any, tuple[float, float]] = {}
        for width, cost in own.items():
            form, fixed = layer_form.of(width), losses.forms[name].weight_bits
            bits = form.weight_bits or fixed or losses.settings.weight_bits
            if form.is_float and not fixed:
                options[width] = cost, 0.0
            elif not form.is_float and bits in losses.weights[name]:
                reads = losses.reads.get(name, {}).get(form.act_bits or -1, 0.0)
                options[width] = cost, losses.weights[name][bits] + reads
        if not options:
            raise InputError(f"{table.origin} has no cost of '{name}' at {losses.forms[name].weight_bits} bits")
        found[name] = options
    return found


def limit(losses: LayerLosses, target: BitTarget) -> float:
    """The budget, in the units of the front's costs."""
    if target.budget is not None:
        return target.budget
    count = sum(weight for weight, _ in losses.numbers.values())
    return target.size or (target.bits or 0) * count / 8


def unit(target: BitTarget) -> str:
    return "" if target.costs is not None else " bytes"


def settings_at(
    losses: LayerLosses, target: BitTarget, found: Front, place: int
) -> tuple[PtqSettings, list[ChosenBits]]:
    """The settings of the choice of `found` at `place`, and a row for every layer. Raises InputError where it leaves
    all layers float."""
    own_of = {name: layer_form.of(width) for name, width in found.choice(place).items()}
    if target.act_bits is not None:
        reads = _act_choice(losses, target)
        own_of = {name: form.then(LayerForm(act_bits=reads[name])) for name, form in own_of.items()}
    usual = {name: form.weight_bits or losses.settings.weight_bits for name, form in losses.forms.items()}
    bits = {name: form.weight_bits or usual[name] for name, form in own_of.items()}
    coded = [bits[name] for name, form in own_of.items() if not form.is_float]
    if not coded:
        origin = "the table of costs" if target.costs is None else target.costs.origin
        raise InputError(
            f"every layer stays float: that loses nothing, and costs {found.costs[place]:,.6g} by {origin}. Leave the "
            "width float out of it, or give a smaller --budget"
        )
    # The most common bits become the default, which makes the `--keep` options for the same result as few as possible.
    common = max(sorted(set(coded), reverse=True), key=coded.count)
    keep, acts = dict(losses.settings.keep), losses.settings.act_bits
    for name, form in own_of.items():
        own = LayerForm(
            None if losses.forms[name].weight_bits or bits[name] == common or form.is_float else bits[name],
            None if form.act_bits in (None, acts) else form.act_bits,
            is_float=form.is_float,
        )
        if own != LayerForm():
            keep[name] = (layer_form.of(keep[name]).then(own) if name in keep else own).word
    rows = [
        ChosenBits(name, 32 if form.is_float else bits[name], losses.weights[name], form.act_bits)
        for name, form in own_of.items()
    ]
    return replace(losses.settings, weight_bits=common, keep=keep), rows


def _act_choice(losses: LayerLosses, target: BitTarget) -> dict[str, int]:
    """The bits of what each layer reads, so that their mean over all numbers is at most `target.act_bits`."""
    options = {
        name: {bits: (bits * losses.numbers[name][1], each) for bits, each in own.items()}
        for name, own in losses.reads.items()
    }
    found = knapsack.front(options)
    total = sum(losses.numbers[name][1] for name in options)
    return found.choice(found.within((target.act_bits or 0) * total, " bits"))
