"""Trainable palettes: modules that stand between the float weight and the layer.

In training they give the soft weight, or the tied one; in evaluation they give the hard one, which is
`freeze(w).decode()`. What they keep from step to step is in buffers and parameters, so that a resumed run continues
with it.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from r2cli import registry
from r2cli.errors import InputError
from r2cli.graph.structure import float_weight
from r2cli.palettes import dkm, tables
from r2cli.palettes.tables import PaletteForm
from r2cli.quantized.coded import Coded
from r2cli.quantized.palette import from_vectors, to_vectors
from r2cli.registry import DkmOptions

LEAST_TAU = 1e-12  # of a layer's mean square: below it a softmax in float32 is an argmax


class Learner(nn.Module):
    """A trainable palette: centroids (groups, rows, dim), which start at those of k-means, and a hard weight.

    The class of a method takes a weight (channels, ...), the form of its palette, the options of the method's entry in
    the registry, and a generator. It keeps its centroids as a buffer, or as a parameter if they have a gradient.
    """

    centroids: Tensor
    trains_weight = True  # whether the float weight has a gradient

    def __init__(self, w: Tensor, form: PaletteForm) -> None:
        super().__init__()
        self.shape, self.form = tuple(w.shape), form
        self.reseeded = 0  # tables that had collapsed and were started again
        # Of the first start only, for the report.
        self.least_used = form.rows  # different vectors of a group, where they are fewer than its rows

    def started(self, w: Tensor, generator: torch.Generator) -> Tensor:
        """Return the centroids (groups, rows, dim) of a weight by k-means, and note how many are of use."""
        centroids, self.least_used = tables.start(w, self.form, None, generator)
        return centroids

    def freeze(self, w: Tensor) -> Coded:
        """Return the hard weight of the float one (channels, ...): the nearest centroids of the table that is stored.

        That table may be rounded to int8, so the nearest centroids are found in it, and not before it is rounded.
        """
        palette = tables.palette(self.centroids.detach(), self.shape, self.form)
        return Coded(palette, palette.encode(w.detach()))

    def before_epoch(self, w: Tensor, share: float | None) -> None:
        """Prepare for an epoch. `share` is its temperature, as a share of the mean squared distance; None: hard."""

    def gap(self, w: Tensor) -> float:
        """Return how far the hard weight is from the soft one: root mean square, as a share of the weight's own."""
        return 0.0


class Dkm(Learner):
    """DKM (`dkm.py`): its first epochs train with soft weights, its last with hard ones.

    The centroids are state and not parameters: the weights have the gradient, and the centroids follow them. Each step
    begins with the centroids of the step before.
    """

    spread: Tensor

    def __init__(self, w: Tensor, form: PaletteForm, options: DkmOptions, generator: torch.Generator) -> None:
        super().__init__(w, form)
        centroids = self.started(w, generator)
        self.register_buffer("centroids", centroids)
        self.register_buffer("spread", self._spread(w, centroids))
        self.iterations, self.share = options.iterations, 1.0
        self.soft = True

    def before_epoch(self, w: Tensor, share: float | None) -> None:
        self.soft = share is not None
        self.share = share or 0.0
        # Two centroids at one place have the same attention in every step, so no gradient ever parts them. Their table
        # starts again from k-means.
        for group in tables.coinciding(self.centroids).nonzero().flatten().tolist():
            fresh, _ = tables.start(w.chunk(len(self.centroids))[group], self._single(), None, _generator(group))
            self.centroids[group] = fresh[0]
            self.reseeded += 1
        self.spread.copy_(self._spread(w, self.centroids))

    def forward(self, w: Tensor) -> Tensor:
        """Return the weight (channels, ...) that the layer computes with."""
        if not self.training:  # what is evaluated is what is exported, bit for bit
            return self.freeze(w).decode()
        return self._soft(w) if self.soft else self._hard(w)

    def gap(self, w: Tensor) -> float:
        soft, was = self.soft, self.centroids.clone()  # `_soft` moves the centroids, and a measurement must not
        difference = self._soft(w.detach()) - self.freeze(w).decode() if soft else torch.zeros(1)
        self.centroids.copy_(was)
        return float(difference.square().mean().sqrt() / w.detach().square().mean().sqrt().clamp_min(1e-30))

    def _single(self) -> PaletteForm:
        return PaletteForm(self.form.bits, self.form.dim, None, self.form.lut_bits)

    def _spread(self, w: Tensor, centroids: Tensor) -> Tensor:
        """Return the mean squared distance of each group's vectors to their nearest centroid, (groups,) and > 0."""
        float_form = PaletteForm(self.form.bits, self.form.dim, self.form.group, 32)
        palette = tables.palette(centroids, self.shape, float_form)
        near = palette.decode(palette.encode(w.detach()))
        lost = (w.detach() - near).square().reshape(len(centroids), -1).mean(1) * self.form.dim
        return lost.clamp_min(float(w.detach().square().mean()) * LEAST_TAU + LEAST_TAU**2)

    def _soft(self, w: Tensor) -> Tensor:
        """Return the soft weight (channels, ...), and keep the centroids that the iterations end with."""
        taus = (self.spread * self.share).clamp_min(LEAST_TAU**2).tolist()
        groups, dim = len(taus), self.form.dim
        flat, parts = _in_memory(w), []
        if dim == 1:
            for group, part in enumerate(flat.reshape(groups, -1)):
                own, after = dkm.scalar(part, self.centroids[group, :, 0], taus[group], self.iterations)
                self.centroids[group, :, 0] = after
                parts.append(own)
        else:
            channels = flat.reshape(w.shape[0], -1)
            short = w.shape[0] % dim
            blocks = channels[: w.shape[0] - short].reshape(-1, dim, channels.shape[1])
            for group, part in enumerate(blocks.chunk(groups)):
                own, after = dkm.vector(part, self.centroids[group], taus[group], self.iterations)
                self.centroids[group] = after.detach()
                parts.append(own.reshape(-1))
            if short:  # only where one table serves all channels, so `after` and the first tau are its own
                parts.append(_filled_up(channels[-short:], after, taus[0]).reshape(-1))
        return _as_before(torch.cat(parts) if len(parts) > 1 else parts[0], w)

    def _hard(self, w: Tensor) -> Tensor:
        """Return the nearest centroids, moved to the means of their clusters, with one gradient for each cluster."""
        groups, rows, dim = self.centroids.shape
        vectors = to_vectors(w, dim)
        frozen = self.freeze(w)
        offset = torch.arange(groups, device=w.device)[:, None] * rows
        index = (frozen.codes.long() + offset).reshape(-1)
        weights = to_vectors(torch.ones_like(w), dim)  # 0 for the elements that only fill up the last block
        total = torch.zeros(groups * rows, dim, dtype=torch.float64, device=w.device)
        sums = total.clone().index_add_(0, index, (weights * vectors.detach()).double())
        total.index_add_(0, index, weights.double())
        order = self.centroids if dim > 1 else self.centroids.sort(dim=1).values  # as `tables.palette` has them
        means = torch.where(total > 0, sums / total.clamp_min(1), order.reshape(-1, dim).double())
        self.centroids.copy_(means.reshape(groups, rows, dim))
        # With the codes from before the means moved: the gradient is that of these clusters.
        codec = tables.palette(self.centroids, self.shape, self.form)
        values = to_vectors(Coded(codec, frozen.codes).decode(), dim)
        return from_vectors(dkm.hard(vectors, values, index, groups * rows), self.shape)


class Shared(Learner):
    """Trained quantization of Deep Compression (Han et al. 2016): centroids are trained, and the codes stay.

    The gradient of a centroid is the sum of its members' gradients: equation 3 of the paper. Where we differ: the codes
    are those of the optimal k-means, and in the paper those of k-means from equally spaced centroids.
    """

    codes: Tensor
    trains_weight = False

    def __init__(self, w: Tensor, form: PaletteForm, options: object, generator: torch.Generator) -> None:
        super().__init__(w, form)
        centroids = self.started(w, generator)
        # A float table: gradients are far smaller than the steps of an int8 one, which `freeze` makes of it.
        palette = tables.palette(centroids, self.shape, PaletteForm(form.bits, form.dim, form.group, 32))
        self.register_buffer("codes", palette.encode(w.detach()))
        self.centroids = nn.Parameter(palette.lut.clone())

    def freeze(self, w: Tensor) -> Coded:
        palette = tables.palette(self.centroids.detach(), self.shape, self.form)
        return Coded(palette, palette.encode(self._tied().detach()))

    def forward(self, w: Tensor) -> Tensor:
        """Return the weight (channels, ...) that the layer computes with. The float weight `w` is not used."""
        if not self.training:
            return self.freeze(w).decode()
        return self._tied()

    def _tied(self) -> Tensor:
        """Return the weight (channels, ...) of the centroids as they are, with a gradient by the centroids."""
        index = self.codes.long().unsqueeze(-1).expand(-1, -1, self.form.dim)
        return from_vectors(self.centroids.gather(1, index).reshape(-1, self.form.dim), self.shape)


def learner_of(name: str) -> Callable[[Tensor, PaletteForm, object, torch.Generator], Learner]:
    """Return what makes a method's trainable palettes, as `Learner` says.

    Raises InputError for an unknown name, and for a method that does not train.
    """
    found = registry.load(registry.PALETTE_METHODS, name)
    if not registry.get(registry.PALETTE_METHODS, name).trains:
        other = registry.PALETTE_METHOD
        raise InputError(f"the method '{name}' does not train: give --method {other}, or another one that does")
    made: Callable[[Tensor, PaletteForm, object, torch.Generator], Learner] = found
    return made


def put_on(model: nn.Module, learners: Mapping[str, Learner]) -> None:
    """Let every named layer of `model` compute with the weight that its palette gives; in place."""
    for name, learner in learners.items():
        module = model.get_submodule(name)
        parametrize.register_parametrization(module, "weight", learner)
        # A weight without a gradient is left alone by the optimizer, so that it has no weight decay either.
        float_weight(module).requires_grad_(learner.trains_weight)


def take_off(model: nn.Module, learners: Mapping[str, Learner]) -> dict[str, Coded]:
    """Undo `put_on`: the layers have their float weights again. Returns the codes of every layer by its name."""
    coded = {}
    for name, learner in learners.items():
        module = model.get_submodule(name)
        coded[name] = learner.eval().freeze(float_weight(module))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    return coded


def each(model: nn.Module, learners: Mapping[str, Learner]) -> Iterator[tuple[Learner, Tensor]]:
    """Yield the trainable palettes with their float weights (channels, ...)."""
    for name, learner in learners.items():
        yield learner, float_weight(model.get_submodule(name)).detach()


def _filled_up(v: Tensor, centroids: Tensor, tau: float) -> Tensor:
    """Return the soft channels of a last block `v` (channels, positions) that has fewer than `dim` channels.

    Their distances count the channels that they have. They do not move the centroids (k, dim), whose other values they
    would know nothing about.
    """
    own = centroids[:, : len(v)]
    distance = (v.T[:, None] - own).square().sum(2)
    return (torch.softmax(-distance / tau, 1) @ own).T


def _in_memory(w: Tensor) -> Tensor:
    """Return the elements of `w` (channels, ...) in the order of memory, 1-D; output channels stay outermost."""
    # A channels-last weight is permuted instead of copied.
    if w.ndim == 4 and not w.is_contiguous():
        w = w.permute(0, 2, 3, 1)
    return w.reshape(-1)


def _as_before(flat: Tensor, w: Tensor) -> Tensor:
    """Undo `_in_memory`: return `flat` in the shape and layout of `w`."""
    if w.ndim == 4 and not w.is_contiguous():
        n, c, height, width = w.shape
        return flat.reshape(n, height, width, c).permute(0, 3, 1, 2)
    return flat.reshape(w.shape)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
