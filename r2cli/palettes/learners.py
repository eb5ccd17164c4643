"""Trainable palettes: modules that stand between a layer's weight and what the layer computes with.

In training they give the soft, or tied, weight; in evaluation the hard one, which is `freeze(w).decode()`. What they
keep from step to step is in buffers and parameters, so that a resumed run goes on with it.
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
    """What the learners of all methods have: centroids (groups, rows, dim), k-means' at first, and a hard weight.

    A method's class takes a weight (channels, ...), its palette's form, the options of the method's entry and a
    generator. It keeps its centroids as a buffer, or as a parameter where they have a gradient.
    """

    centroids: Tensor
    trains_weight = True  # whether the float weight has a gradient

    def __init__(self, w: Tensor, form: PaletteForm) -> None:
        super().__init__()
        self.shape, self.form = tuple(w.shape), form
        self.reseeded = 0  # tables that had collapsed and were started again
        self.least_used = form.rows  # different vectors of a group, where they are fewer than its rows

    def started(self, w: Tensor, generator: torch.Generator) -> Tensor:
        """k-means' centroids of a weight, (groups, rows, dim)."""
        centroids, self.least_used = tables.start(w, self.form, None, generator)
        return centroids

    def freeze(self, w: Tensor) -> Coded:
        """The hard weight of the float one: the nearest centroids of the table that is stored."""
        palette = tables.palette(self.centroids.detach(), self.shape, self.form)
        return Coded(palette, palette.encode(w.detach()))

    def before_epoch(self, w: Tensor, share: float | None) -> None:
        """Told of every epoch: the temperature as a share of the mean squared distance, None where it trains hard."""

    def gap(self, w: Tensor) -> float:
        """What hardening changes, root mean square over the weights' own."""
        return 0.0


class Dkm(Learner):
    """DKM (`dkm.py`): soft in its first epochs, hard in its last. The centroids are state, no parameters."""

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
        for group in tables.coinciding(self.centroids).nonzero().flatten().tolist():
            fresh, _ = tables.start(w.chunk(len(self.centroids))[group], self._single(), None, _generator(group))
            self.centroids[group] = fresh[0]
            self.reseeded += 1
        self.spread.copy_(self._spread(w, self.centroids))

    def forward(self, w: Tensor) -> Tensor:
        """The weight (channels, ...) that the layer computes with."""
        if not self.training:
            return self.freeze(w).decode()
        return self._soft(w) if self.soft else self._hard(w)

    def gap(self, w: Tensor) -> float:
        soft, was = self.soft, self.centroids.clone()
        difference = self._soft(w.detach()) - self.freeze(w).decode() if soft else torch.zeros(1)
        self.centroids.copy_(was)
        return float(difference.square().mean().sqrt() / w.detach().square().mean().sqrt().clamp_min(1e-30))

    def _single(self) -> PaletteForm:
        return PaletteForm(self.form.bits, self.form.dim, None, self.form.lut_bits)

    def _spread(self, w: Tensor, centroids: Tensor) -> Tensor:
        """Mean squared distance of each group's vectors to their nearest centroid, (groups,)."""
        float_form = PaletteForm(self.form.bits, self.form.dim, self.form.group, 32)
        palette = tables.palette(centroids, self.shape, float_form)
        near = palette.decode(palette.encode(w.detach()))
        lost = (w.detach() - near).square().reshape(len(centroids), -1).mean(1) * self.form.dim
        return lost.clamp_min(float(w.detach().square().mean()) * LEAST_TAU + LEAST_TAU**2)

    def _soft(self, w: Tensor) -> Tensor:
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
            if short:
                parts.append(_filled_up(channels[-short:], after, taus[0]).reshape(-1))
        return _as_before(torch.cat(parts) if len(parts) > 1 else parts[0], w)

    def _hard(self, w: Tensor) -> Tensor:
        """The nearest centroids, moved to the means of what is nearest to them; a gradient for each cluster."""
        groups, rows, dim = self.centroids.shape
        vectors = to_vectors(w, dim)
        frozen = self.freeze(w)
        offset = torch.arange(groups, device=w.device)[:, None] * rows
        index = (frozen.codes.long() + offset).reshape(-1)
        weights = to_vectors(torch.ones_like(w), dim)
        total = torch.zeros(groups * rows, dim, dtype=torch.float64, device=w.device)
        sums = total.clone().index_add_(0, index, (weights * vectors.detach()).double())
        total.index_add_(0, index, weights.double())
        order = self.centroids if dim > 1 else self.centroids.sort(dim=1).values  # as `tables.palette` has them
        means = torch.where(total > 0, sums / total.clamp_min(1), order.reshape(-1, dim).double())
        self.centroids.copy_(means.reshape(groups, rows, dim))
        codec = tables.palette(self.centroids, self.shape, self.form)
        values = to_vectors(Coded(codec, frozen.codes).decode(), dim)
        return from_vectors(dkm.hard(vectors, values, index, groups * rows), self.shape)


class Shared(Learner):
    """Deep Compression's trained quantization (Han et al. 2016): the codes of k-means stay, the centroids train.

    The gradient of a centroid is the sum of its members'. Equation 3 of the paper; codes start from k-means here, from
    linear initialisation there.
    """

    codes: Tensor
    trains_weight = False

    def __init__(self, w: Tensor, form: PaletteForm, options: object, generator: torch.Generator) -> None:
        super().__init__(w, form)
        centroids = self.started(w, generator)
        palette = tables.palette(centroids, self.shape, PaletteForm(form.bits, form.dim, form.group, 32))
        self.register_buffer("codes", palette.encode(w.detach()))
        self.centroids = nn.Parameter(palette.lut.clone())

    def freeze(self, w: Tensor) -> Coded:
        palette = tables.palette(self.centroids.detach(), self.shape, self.form)
        return Coded(palette, palette.encode(self._tied().detach()))

    def forward(self, w: Tensor) -> Tensor:
        """The weight (channels, ...) that the layer computes with; `w` has no part in it."""
        if not self.training:
            return self.freeze(w).decode()
        return self._tied()

    def _tied(self) -> Tensor:
        index = self.codes.long().unsqueeze(-1).expand(-1, -1, self.form.dim)
        return from_vectors(self.centroids.gather(1, index).reshape(-1, self.form.dim), self.shape)


def learner_of(name: str) -> Callable[[Tensor, PaletteForm, object, torch.Generator], Learner]:
    """What makes the learners of a method, of a weight, its palette's form, the method's own options and a generator.

    Raises InputError for a name that nobody has, and for a method that does not train.
    """
    found = registry.load(registry.PALETTE_METHODS, name)
    if not registry.get(registry.PALETTE_METHODS, name).trains:
        raise InputError(f"the method '{name}' does not train: give --method dkm, or another one that does")
    made: Callable[[Tensor, PaletteForm, object, torch.Generator], Learner] = found
    return made


def put_on(model: nn.Module, learners: Mapping[str, Learner]) -> None:
    """Let every named layer of `model` compute with what its learner makes of its weight; in place."""
    for name, learner in learners.items():
        module = model.get_submodule(name)
        parametrize.register_parametrization(module, "weight", learner)
        float_weight(module).requires_grad_(learner.trains_weight)


def take_off(model: nn.Module, learners: Mapping[str, Learner]) -> dict[str, Coded]:
    """Undo `put_on`, and freeze: the codes of every layer by its name; the layers have their float weights again."""
    coded = {}
    for name, learner in learners.items():
        module = model.get_submodule(name)
        coded[name] = learner.eval().freeze(float_weight(module))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    return coded


def each(model: nn.Module, learners: Mapping[str, Learner]) -> Iterator[tuple[Learner, Tensor]]:
    """The learners with their float weights."""
    for name, learner in learners.items():
        yield learner, float_weight(model.get_submodule(name)).detach()


def _filled_up(v: Tensor, centroids: Tensor, tau: float) -> Tensor:
    """Soft channels of a last block (channels, positions) that is short: near in what they have, and without a vote."""
    own = centroids[:, : len(v)]
    distance = (v.T[:, None] - own).square().sum(2)
    return (torch.softmax(-distance / tau, 1) @ own).T


def _in_memory(w: Tensor) -> Tensor:
    """The elements of `w` as they lie in memory, 1-D and without a copy; output channels stay outermost."""
    if w.ndim == 4 and not w.is_contiguous():
        w = w.permute(0, 2, 3, 1)
    return w.reshape(-1)


def _as_before(flat: Tensor, w: Tensor) -> Tensor:
    if w.ndim == 4 and not w.is_contiguous():
        n, c, height, width = w.shape
        return flat.reshape(n, height, width, c).permute(0, 3, 1, 2)
    return flat.reshape(w.shape)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
