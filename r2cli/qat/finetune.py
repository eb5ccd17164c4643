"""The training of quantization-aware training: what the quantizers ask of the training loop, and the run's options.

Before every evaluation the calibration images set the wide grids again, and the statistics of BatchNorm too unless
those of training are to stay. With `progressive` the epochs are divided among 8 bits, 4 bits and the wanted bits, and
the quantizers start again at each change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from r2cli import registry
from r2cli.calibration import deployed
from r2cli.data import Data, losses
from r2cli.errors import R2Error
from r2cli.qat import prepare, qat_method, quantizer_placement
from r2cli.qat.prepare import QatTask, TrainedLayer
from r2cli.qat.qat_method import EpochStart
from r2cli.qat.quantizer_placement import Prepared
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import Given, places
from r2cli.train import hooks, loop, regularizers
from r2cli.train.hooks import Epoch, RunControl
from r2cli.train.loop import TrainSettings

STEPS_DOWN = (8, 4)  # bits on the way


@dataclass(frozen=True)
class QatPlan:
    """A training run. `quantizer_lr` is the learning rate of the quantizers' own parameters.

    `distill` is the weight of the distance to the float network's predictions in the loss. `norms` says whether
    BatchNorm's statistics are collected again. `options` are the options that only some methods have, by name: a method
    takes those that it knows, and the defaults of its entry in the registry for the rest.
    """

    loop: TrainSettings
    quantizer_lr: float
    distill: float = 0.0
    progressive: bool = False
    norms: bool = True
    regularizer: regularizers.RegularizerSpec | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def identity(self, work: QatTask) -> dict[str, Any]:
        """Return what a resumed run must share beside the loop's settings, by the names of options."""
        own = {"quantizer_lr": self.quantizer_lr, "distill": self.distill, "progressive": self.progressive}
        more = {**self.options, "norms": self.norms, "from_scratch": work.scratch}
        return {**asdict(work.settings), "keep": dict(work.settings.keep), **own, **more}


def by_training(
    work: QatTask, plan: QatPlan, source: Data, following: RunControl
) -> tuple[Checkpoint, list[TrainedLayer], list[Epoch]]:
    """Train on `source`. Returns the coded checkpoint, a row for every layer, and the result of every epoch.

    Raises InputError for settings that do not fit the network, and R2Error if training diverges.
    """
    prepared = prepare.prepare(work)
    history = loop.fit(
        prepared.net,
        source.giving(work.checkpoint.outputs),
        plan.loop,
        device=work.device,
        setting=hooks_of(work, plan, prepared),
        state=following.state,
        resume=following.resume,
        watch=following.watch,
    )
    if history[-1].top1 is not None and work.checkpoint.model.classes:
        require_learned(work, prepared, history[-1].top1)
    coded, rows = prepare.finish(work, prepared)
    return coded, rows, history


def require_learned(work: QatTask, prepared: Prepared, top1: float) -> None:
    """Raise R2Error where `top1`, in percent, is no better than chance and quantizers have collapsed."""
    stuck = qat_method.method(work.settings.method).collapsed(prepared)
    if stuck and top1 <= 100 / work.checkpoint.model.classes:
        raise R2Error(
            f"training diverged: {len(stuck)} steps fell to their least ('{stuck[0]}'), and top-1 is {top1:.2f} %, no "
            "better than chance: use a lower --lr"
        )


def hooks_of(work: QatTask, plan: QatPlan, prepared: Prepared) -> hooks.TrainHooks:
    """Return what the training loop does for the quantizers of `prepared`, beside training the weights."""
    kind = qat_method.method(work.settings.method)
    options = registry.own_options(registry.get(registry.QAT_METHODS, work.settings.method), plan.options)
    kind.ready(prepared, options)
    own = [*prepared.weights.values(), *prepared.activations]
    parameters = [parameter for learner in own for parameter in learner.parameters()]
    # Decay would pull a step or a range to 0, whatever the loss says of it. PACT's paper alone decays its bound.
    decay = plan.loop.weight_decay if kind.decays else 0.0
    groups = [{"params": parameters, "base_lr": plan.quantizer_lr, "weight_decay": decay}] if parameters else []
    learned = work.learned() if work.task.loss.distils or kind.before_epoch is not qat_method.nothing else None
    now: list[EpochStart] = []  # the epoch that runs: `before_epoch` sets it, and `add_gradients` reads it

    def before_epoch(number: int) -> None:
        if plan.progressive:
            _step_down(work, prepared, number, plan.loop.epochs)
        now[:] = [EpochStart(number, plan.loop.epochs, plan.loop.seed, work.batches, options, learned)]
        kind.before_epoch(prepared, now[0])

    def before_evaluation(number: int) -> None:
        for name, parameter in prepared.net.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise R2Error(f"training diverged in epoch {number}: '{name}' is not finite; use a lower --lr")
        # The running statistics lag behind the weights, and low-bit weights move in jumps. What is evaluated here, and
        # folded at the end, has statistics of the weights as they are.
        quantizer_placement.watch(prepared, (images for images, _ in work.batches()), norms=plan.norms)

    return hooks.TrainHooks(
        identity=plan.identity(work),
        groups=[] if kind.adam else groups,
        adam=groups if kind.adam else [],
        before_epoch=before_epoch,
        before_evaluation=before_evaluation,
        loss=_distance_to(work, plan.distill) if plan.distill else None,
        learned=learned if work.task.loss.distils else None,
        add_gradients=lambda: kind.add_gradients(prepared, now[0]),
        regularizer=plan.regularizer,
    )


def _distance_to(work: QatTask, weight: float) -> Callable[[Given, Any], Tensor]:
    """Return a loss: `weight` times the cross entropy of logits with the float network's class probabilities.

    Of outputs that are no logits it is the distance to the float network's.
    """
    teacher = loop.to_device(deployed.network(work.checkpoint), work.device)
    other = None if work.task.logits else losses.of_teacher(teacher, decides=False)

    def loss(images: Given, outputs: Any) -> Tensor:
        if other is not None:
            return weight * other(images, outputs, None)
        with torch.no_grad():
            wanted = places(teacher(*places(images)))[0].softmax(1)
        return weight * nn.functional.cross_entropy(places(outputs)[0], wanted)

    return loss


def bits_at(number: int, epochs: int, bits: int) -> int:
    """Return the bits of epoch `number` (from 1) on the way to `bits`, in stages of equal length.

    With fewer epochs than stages the first stages are left out, so that the last epoch has the wanted bits.
    """
    stages = [*(step for step in STEPS_DOWN if step > bits), bits][-epochs:]
    return stages[(number - 1) * len(stages) // epochs]


def _step_down(work: QatTask, prepared: Prepared, number: int, epochs: int) -> None:
    """Give every quantizer the bits of this epoch. If that changes the bits of any, all start again.

    They start again in the first epoch too. A run that is resumed within a stage does not start them: it has their
    parameters from the resume state.
    """
    every: Sequence[Any] = [*prepared.weights.values(), *prepared.activations]
    changed = number == 1
    for learner in every:
        # A quantizer is made with the bits that are wanted at the end, and keeps them here.
        learner.target = getattr(learner, "target", learner.bits)
        learner.bits = bits_at(number, epochs, learner.target)
        changed |= number > 1 and learner.bits != bits_at(number - 1, epochs, learner.target)
    if changed:
        for _, own, weight in prepared.each():
            own.start(weight.detach())
        # In the order of `prepare.prepare`: the first images are to meet weights that have their scale.
        prepare.keep_scales(prepared)
        images, _ = next(iter(work.batches()))
        quantizer_placement.start(prepared, images)
