"""Training with palettes: what is done before every epoch, and what is measured after it.

The temperature falls by the same factor from epoch to epoch, in units of each layer's own mean squared distance to its
nearest centroid. The last epochs train with hard weights. Before every evaluation, BatchNorm's statistics are collected
again with the hard weights, so that the reported accuracy is that of the hard network.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r2cli import registry
from r2cli.calibration import deployed
from r2cli.data import Data, losses
from r2cli.errors import R2Error
from r2cli.graph import batchnorm, structure
from r2cli.palettes import compression, learners
from r2cli.palettes.compression import PaletteSettings, PaletteTask, PalettizedLayer
from r2cli.palettes.learners import Learner
from r2cli.storage.checkpoint import Checkpoint
from r2cli.train import hooks, loop
from r2cli.train.hooks import Epoch
from r2cli.train.loop import TrainSettings


@dataclass(frozen=True)
class Schedule:
    """The temperatures of `epochs` epochs: from `warm` in the first to `cold` in the last soft one.

    The last `hard` epochs train with hard weights, so that the network adapts to what is deployed.
    """

    epochs: int
    hard: int
    warm: float
    cold: float

    def share(self, number: int) -> float | None:
        """Return the temperature of epoch `number` (from 1) as a share of a layer's mean squared distance.

        Returns None for an epoch that trains with hard weights.
        """
        soft = self.epochs - self.hard
        if number > soft:
            return None
        return float(self.warm * (self.cold / self.warm) ** ((number - 1) / max(1, soft - 1)))


@dataclass(frozen=True)
class PalettePlan:
    """A training run with palettes. `lut_lr` is the learning rate of centroids that are parameters.

    `options` are the options that only some methods have, by name: a method takes those that it knows, and the defaults
    of its entry in the registry for the rest.
    """

    loop: TrainSettings
    schedule: Schedule
    lut_lr: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def identity(self, settings: PaletteSettings) -> dict[str, Any]:
        """Return what a resumed run must share beside the loop's settings, by the names of options."""
        keep = {name: list(form) for name, form in settings.keep.items()}
        own = {"hard_epochs": self.schedule.hard, "temperature": self.schedule.warm, "lut_lr": self.lut_lr}
        return {**asdict(settings), "keep": keep, **own, **self.options}


@dataclass(frozen=True)
class PaletteRunControl:
    """The file with the state of a run, whether to resume from it, and what to call after steps and epochs.

    `epoch` is called with an epoch and its gap between soft and hard weights.
    """

    state: Path
    resume: bool
    step: Callable[[int], None]
    epoch: Callable[[Epoch, float], None]


def by_training(
    work: PaletteTask, plan: PalettePlan, source: Data, following: PaletteRunControl
) -> tuple[Checkpoint, list[PalettizedLayer]]:
    """Make palettes by training on `source`, with the method of `work.settings`.

    Returns the coded checkpoint and a row for every layer. Raises InputError for settings that do not fit the network,
    and R2Error if training diverges.
    """
    subject = compression.read(work.checkpoint, work.settings)
    model, wanted = subject.model, compression.forms(subject.layers, work.settings)
    evened = compression.even_out(subject, wanted)
    make = learners.learner_of(work.settings.method)
    options = registry.own_options(registry.get(registry.PALETTE_METHODS, work.settings.method), plan.options)
    made: dict[str, Learner] = {}
    for name, form in wanted.items():
        weight = structure.weight_of(model.get_submodule(name))
        made[name] = make(weight.detach(), form, options, work.generator)
    learners.put_on(model, made)
    gaps: dict[int, float] = {}  # filled before the evaluation of an epoch, and read when the epoch is reported
    method = _method(work, plan, subject, made, gaps)
    watch = hooks.Progress(following.step, lambda epoch: following.epoch(epoch, gaps[epoch.epoch]))
    loop.fit(
        model,
        source.giving(work.checkpoint.outputs),
        plan.loop,
        device=work.device,
        setting=method,
        state=following.state,
        resume=following.resume,
        watch=watch,
    )
    model.cpu()
    notes = {name: compression.together(evened.get(name), _note(learner)) for name, learner in made.items()}
    coded = learners.take_off(model, made)
    return compression.finish(work, subject, coded, notes)


def _note(learner: Learner) -> str:
    """Return what to say of a layer's palette."""
    again = f"{learner.reseeded} collapsed tables started again" if learner.reseeded else ""
    return compression.together(compression.few(learner.least_used, learner.form), again)


def _method(
    work: PaletteTask,
    plan: PalettePlan,
    subject: compression.ReadNetwork,
    made: Mapping[str, Learner],
    gaps: dict[int, float],
) -> hooks.TrainHooks:
    """Return what the training loop does for palettes. The gap between soft and hard goes into `gaps`, by epoch."""
    model, net = subject.model, subject.net
    norms = [] if net is None else [structure.norm_module(net, layer) for layer in structure.layers(net)]

    @torch.no_grad()
    def before_epoch(number: int) -> None:
        for learner, weight in learners.each(model, made):
            learner.before_epoch(weight, plan.schedule.share(number))

    @torch.no_grad()
    def before_evaluation(number: int) -> None:
        # BatchNorm's factor goes into the scale behind the table, which must not be negative. `compression.read` made
        # the factors positive, and training may have moved one below 0.
        for norm in norms:
            if norm is not None and norm.weight is not None:
                norm.weight.clamp_(min=0)
        found = []
        for learner, weight in learners.each(model, made):
            if not bool(torch.isfinite(learner.centroids).all() and torch.isfinite(weight).all()):
                raise R2Error(f"training diverged in epoch {number}: a palette is not finite; use a lower --lr")
            found.append(learner.gap(weight))
        gaps[number] = sum(found) / len(found)
        assert work.batches is not None
        batchnorm.reestimate_norms(model, (images for images, _ in work.batches()))

    own = [learner.centroids for learner in made.values() if isinstance(learner.centroids, nn.Parameter)]
    # Without decay: it would pull the centroids to 0, whatever their clusters are.
    groups = [{"params": own, "weight_decay": 0.0, "base_lr": plan.lut_lr}] if own else []
    learned = None
    if work.task.loss.distils:
        teacher = loop.to_device(deployed.network(work.checkpoint), work.device)
        learned = losses.of_teacher(teacher, decides=work.task.logits)
    return hooks.TrainHooks(plan.identity(work.settings), groups, before_epoch, before_evaluation, learned=learned)
