"""Palettes: from a float checkpoint to one whose weights are indices into small tables of centroids.

make BatchNorm's factors positive -> a palette for every weight as trained, by k-means or by training -> BatchNorm's
statistics again, on the palettized network -> BatchNorm into the scale behind the table -> activations on grids.

The codes do not change once they are chosen. That is why palettes are made before BatchNorm is folded: folding
multiplies every channel by another number, and then channels could not share one table.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from r2cli import registry
from r2cli.calibration import biases, calibrate, deployed
from r2cli.config import targets
from r2cli.data import Batch, losses
from r2cli.data.losses import Learned
from r2cli.data.task import CLASSIFICATION, Task
from r2cli.errors import InputError, R2Error
from r2cli.graph import batchnorm, equivalence, lone_norms, operators, structure
from r2cli.graph.read import Unreadable
from r2cli.palettes import tables
from r2cli.palettes.tables import PaletteForm
from r2cli.quantized.channels import per_channel
from r2cli.quantized.coded import Coded
from r2cli.quantized.decibels import sqnr
from r2cli.quantized.grid import Grid
from r2cli.quantized.palette import Palette
from r2cli.storage.checkpoint import Checkpoint, require_float
from r2cli.storage.input_spec import count, places

SHAPELESS = 0.9  # with this share of its filters at a single value each, a layer has lost what it computes

Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class PaletteSettings:
    """What is asked of palettization.

    `keep` maps patterns of layer names to other (bits, dim). `act_bits` None leaves activations in float.
    """

    method: str
    bits: int
    dim: int
    group_size: int | None
    lut_bits: int
    act_bits: int | None
    keep: Mapping[str, tuple[int, int]]
    act_range: str = "minmax"
    embeddings: bool = False  # whether embeddings get palettes too, which needs activations in float
    target: str = targets.DEFAULT


@dataclass(frozen=True)
class PalettizedLayer:
    """What became of one layer.

    `size` and `entropy_coded` are in bits per weight, with table and scale. `sqnr` is in dB, of the weights.
    """

    layer: str
    shape: tuple[int, ...]
    bits: int
    dim: int
    tables: int
    size: float
    entropy_coded: float
    sqnr: float
    note: str = ""


@dataclass(frozen=True)
class PaletteTask:
    """A float checkpoint, and the settings for it.

    `batches` gives training images, which set BatchNorm's statistics again and find the ranges of activations. With
    None neither is done.
    """

    checkpoint: Checkpoint
    settings: PaletteSettings
    batches: Batches | None
    device: torch.device
    seed: int
    task: Task = CLASSIFICATION

    @property
    def generator(self) -> torch.Generator:
        """A generator for k-means, new for every layer, so that a layer's palette does not depend on the others."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class ReadNetwork:
    """A network ready for palettes: its `layers` by name. `model` is its graph `net`, or the network itself.

    `net` is None where only the weights are worked on. Then BatchNorms stay where they are.
    """

    model: nn.Module
    net: fx.GraphModule | None
    layers: Mapping[str, nn.Module]


def by_kmeans(
    work: PaletteTask, *, weigh: bool, advance: Callable[[int], None]
) -> tuple[Checkpoint, list[PalettizedLayer]]:
    """Make palettes without training, by the function of `work.settings.method`.

    With `weigh`, errors of weights count by the weights' sensitivity. `advance` is called with the number of layers
    that are done. Returns the coded checkpoint and a row for every layer. Raises InputError for settings that do not
    fit the network, and R2Error for a value that is not finite.
    """
    subject = read(work.checkpoint, work.settings)
    model, wanted = subject.model, forms(subject.layers, work.settings)
    evened = even_out(subject, wanted)  # before the gradients: they are of the filters that get codes
    importance: Mapping[str, Tensor] = {}
    if weigh:
        assert work.batches is not None
        learned = losses.of_target(work.task.loss, work.checkpoint.outputs)
        found = sensitivity(model.to(work.device), subject.layers, work.batches(), learned)
        importance = {name: one.cpu() for name, one in found.items()}
        model.cpu()
    coded, notes = {}, {}
    find = registry.load(registry.PALETTE_METHODS, work.settings.method)
    with torch.no_grad():
        for name, module in subject.layers.items():
            weight, form = structure.weight_of(module), wanted[name]
            centroids, used = find(weight, form, importance.get(name), work.generator)
            palette = tables.palette(centroids, weight.shape, form)
            coded[name] = Coded(palette, palette.encode(weight))
            notes[name] = together(evened.get(name), few(used, form))
            advance(1)
    return finish(work, subject, coded, notes)


def read(checkpoint: Checkpoint, settings: PaletteSettings) -> ReadNetwork:
    """Return the checkpoint's network, ready for palettes.

    It has no graph if embeddings are wanted, or if its graph cannot be read and activations stay float. Raises
    InputError for a coded checkpoint, for a graph that cannot be read where activations need it, and for embeddings
    together with activations on grids.
    """
    require_float(checkpoint)
    if settings.embeddings and settings.act_bits is not None:
        raise InputError("--embeddings is for weights alone: give --act-bits none")
    model = deployed.network(checkpoint)
    on_grids = settings.act_bits is not None
    try:
        known = deployed.architecture(checkpoint)
        net = None if settings.embeddings else equivalence.read(model, checkpoint.input, known)
    # Weights alone need no graph. Without one, BatchNorms stay.
    except (Unreadable, equivalence.Misread):
        if on_grids:
            raise
        net = None
    if net is None:
        return ReadNetwork(model, None, structure.weighted(model, embeddings=settings.embeddings))
    lone_norms.into_layers(net, on_grids=on_grids)
    # The scale behind a table takes BatchNorm's factor, and a scale has no sign.
    batchnorm.make_factors_positive(net)
    if not structure.layers(net):
        raise InputError(f"{checkpoint.origin} has no convolution or linear layer to palettize")
    return ReadNetwork(net, net, {layer.name: module for layer, module in structure.named_layers(net)})


def forms(layers: Mapping[str, nn.Module], settings: PaletteSettings) -> dict[str, PaletteForm]:
    """Return the form of every layer's palette, by name, with `keep` applied.

    Raises InputError for a pattern that matches no layer, a vector longer than a layer has channels, and a group size
    that divides no layer's channels.
    """
    shapes = {name: tuple(structure.weight_of(module).shape) for name, module in layers.items()}
    found = with_exceptions(layers, settings)
    for name, form in found.items():
        tables.require_fit(f"{name}.weight", shapes[name], form)
    size = settings.group_size
    if size and not any(shape[0] % size == 0 for shape in shapes.values()):
        raise InputError(f"--group-size {size} divides no layer's output channels: give a smaller power of two")
    return found


def with_exceptions(names: Iterable[str], settings: PaletteSettings) -> dict[str, PaletteForm]:
    """Return the form of every named layer's palette, with `keep` applied.

    Raises InputError for a pattern of `keep` that matches no layer, and for groups that a vector would reach across.
    """
    usual = PaletteForm(settings.bits, settings.dim, settings.group_size, settings.lut_bits)
    kept = {pattern: replace(usual, bits=bits, dim=dim) for pattern, (bits, dim) in settings.keep.items()}
    found = structure.by_pattern(names, usual, kept)
    for form in found.values():
        if form.group and form.group % form.dim:
            raise InputError(f"--group-size {form.group} is no multiple of the {form.dim} channels of a vector")
    return found


def even_out(subject: ReadNetwork, wanted: Mapping[str, PaletteForm]) -> dict[str, str]:
    """Bring the filters of a layer to one size if a few large ones would take its whole table; in place.

    k-means has the least squared error where the weights are large. In a depthwise layer with one large filter, nearly
    all other filters get a single value each, which an int8 table rounds to 0. Filters of one size cost nothing where a
    BatchNorm follows: its scale per channel makes up for it. A layer that this does not help stays as it is. Returns a
    note for each layer that was changed, by name.
    """
    evened: dict[str, str] = {}
    if subject.net is None:
        return evened
    for layer, module in structure.named_layers(subject.net):
        form, weight = wanted[layer.name], module.weight
        norm = structure.norm_module(subject.net, layer)
        # Without a BatchNorm with a gamma, nothing makes up for the sizes. A filter of one weight has no shape to lose.
        if norm is None or norm.weight is None or form.dim > 1 or weight[0].numel() == 1:
            continue
        if _shapeless(weight.detach(), form) >= SHAPELESS:
            size = _sizes(weight.detach())
            if _shapeless(weight.detach() / per_channel(size, weight.ndim), form) < SHAPELESS:
                batchnorm.divide_filters(subject.net, layer, size)
                evened[layer.name] = "channels evened out"
    return evened


def _shapeless(weight: Tensor, form: PaletteForm) -> float:
    """Return the share of filters to which the table of k-means leaves a single value."""
    palette = tables.palette(tables.start(weight, form, None, torch.Generator())[0], weight.shape, form)
    return tables.constant_channels(palette, palette.encode(weight))


def _sizes(weight: Tensor) -> Tensor:
    """Return the root mean square of every filter in units of the median one, (channels,) float64; 1 for zeros."""
    power = weight.double().flatten(1).square().mean(1)
    alive = power > 0
    return torch.where(alive, (power / power[alive].median()).sqrt(), 1.0) if bool(alive.any()) else power + 1.0


def together(*notes: str | None) -> str:
    """Return the notes about a layer in one line."""
    return "; ".join(filter(None, notes))


def few(used: int, form: PaletteForm) -> str:
    """Return the note about a layer with fewer different weights than centroids; an empty text for others."""
    what = "weights" if form.dim == 1 else "vectors"
    return f"{used} different {what} for {form.rows} centroids" if used < form.rows else ""


def sensitivity(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch], learned: Learned
) -> dict[str, Tensor]:
    """Return how much the loss depends on each weight, by layer: the sum over batches of the squared gradient.

    This is the diagonal of the Fisher information, taken over batches where that is taken over single images: it costs
    one backward pass for a batch. Raises R2Error for a gradient that is not finite.
    """
    model.eval()  # BatchNorm's statistics must not move, and dropout would add noise to the gradients
    total = {name: torch.zeros_like(structure.weight_of(module)) for name, module in layers.items()}
    for images, labels in batches:
        model.zero_grad(set_to_none=True)
        # The sum and not the mean: else the gradient of a short last batch, mostly noise, would outweigh all others.
        (learned(images, model(*places(images)), labels) * count(images)).backward()
        for name, module in layers.items():
            weight = structure.weight_of(module)
            if weight.grad is not None:
                total[name] += weight.grad.square()
    model.zero_grad(set_to_none=True)
    for name, each in total.items():
        if not bool(torch.isfinite(each).all()):
            raise R2Error(f"the gradient of '{name}' is NaN or infinite on the training images: leave --weigh out")
    return total


@torch.no_grad()
def finish(
    work: PaletteTask, subject: ReadNetwork, coded: Mapping[str, Coded], notes: Mapping[str, str]
) -> tuple[Checkpoint, list[PalettizedLayer]]:
    """Return the coded checkpoint of palettes, and a row for every layer.

    `coded` has the palettes by layer name, on the network `subject` that they were made for. `notes` go into the rows.
    Raises R2Error for a value that is not finite.
    """
    batches, device, net = work.batches, work.device, subject.net
    if net is None:
        return _finish_weights(work, subject, coded, notes)
    before = {layer.name: module.weight.detach().clone() for layer, module in structure.named_layers(net)}
    for layer, module in structure.named_layers(net):
        module.weight.copy_(coded[layer.name].decode())
    # The statistics were those of the float weights. They must be found again before they are folded into scales.
    if batches is not None:
        batchnorm.reestimate_norms(net.to(device), (images for images, _ in batches()))
        net.cpu()
    # The filters stay, because their codes are chosen: gamma becomes 0 instead.
    dead = batchnorm.make_dead_channels_constant(net, keep_filters=True)
    constant = {name: f"{count} dead channels made constant" for name, count in dead.items()}
    factors = batchnorm.remove_norms(net)
    # The network computes with the decoded codes from here on, so that activations get the ranges of the result.
    folded: dict[str, Coded] = {}
    rows = []
    for layer, module in structure.named_layers(net):
        one = _with_factor(coded[layer.name], factors.get(layer.name))
        folded[layer.weight] = one
        module.weight.copy_(one.decode())
        note = together(notes.get(layer.name), constant.get(layer.name))
        rows.append(_row(layer.name, one, before[layer.name], coded[layer.name], note))
    found: dict[str, Grid] = {}
    if work.settings.act_bits is not None:
        assert batches is not None
        images, shape = (images for images, _ in batches()), work.checkpoint.input.shape
        bits, rule = work.settings.act_bits, work.settings.act_range
        target = targets.get(work.settings.target)
        found, raised = calibrate.calibrate_and_round(net.to(device), folded, shape, bits, images, rule, target)
        told = {name: biases.raised_note(folded[name], one) for name, one in raised.items()}
        rows = [replace(row, note=together(row.note, told.get(f"{row.layer}.weight"))) for row in rows]
        folded |= raised
    floats = {name: tensor for name, tensor in net.state_dict().items() if name not in folded}
    made = replace(work.checkpoint, floats=floats, coded=folded, activations=found, folded=True)
    return replace(made, target=work.settings.target), rows


def _finish_weights(
    work: PaletteTask, subject: ReadNetwork, coded: Mapping[str, Coded], notes: Mapping[str, str]
) -> tuple[Checkpoint, list[PalettizedLayer]]:
    """Do the work of `finish` where no graph was read: BatchNorms stay, and activations stay float."""
    model, rows = subject.model, []
    for name, module in subject.layers.items():
        weight = structure.weight_of(module)
        rows.append(_row(name, coded[name], weight.detach().clone(), coded[name], notes[name]))
        weight.copy_(coded[name].decode())
    if work.batches is not None and any(isinstance(module, operators.NORMS) for module in model.modules()):
        batchnorm.reestimate_norms(model.to(work.device), (images for images, _ in work.batches()))
        model.cpu()
    own = {f"{name}.weight": one for name, one in coded.items()}
    floats = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    return replace(work.checkpoint, floats=floats, coded=own, target=work.settings.target), rows


def _with_factor(coded: Coded, factor: Tensor | None) -> Coded:
    """Return a palette with BatchNorm's factor (channels,) >= 0 in its scale, and the same codes."""
    palette = coded.codec
    assert isinstance(palette, Palette)
    if factor is None:
        return coded
    scale, _ = batchnorm.folded_scale(palette.scale, factor)
    return Coded(replace(palette, scale=scale, axis=0), coded.codes)


def _row(name: str, folded: Coded, weight: Tensor, raw: Coded, note: str) -> PalettizedLayer:
    palette = folded.codec
    assert isinstance(palette, Palette)
    count = weight.numel()
    return PalettizedLayer(
        name,
        tuple(weight.shape),
        palette.bits,
        palette.dim,
        len(palette.lut),
        8 * folded.payload_bytes() / count,
        8 * tables.entropy_coded_bytes(palette, torch.bincount(folded.codes.reshape(-1).long()).tolist()) / count,
        sqnr(raw.decode(), weight),
        note,
    )
