"""From a `QatConfig` to codes: the options become a plan, the network is trained, and its levels become integers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r2cli import data, registry
from r2cli.calibration.result import Result
from r2cli.config import layer_form, values
from r2cli.config.training import QatConfig
from r2cli.data import Batch, Data
from r2cli.data.metrics import Metric, recorded
from r2cli.errors import InputError
from r2cli.qat import finetune, prepare
from r2cli.qat.finetune import QatPlan
from r2cli.qat.prepare import QatSettings, QatTask
from r2cli.qat.quantizer_placement import Prepared
from r2cli.storage.checkpoint import Checkpoint
from r2cli.train import distributed, evaluation, loop, regularizers
from r2cli.train.hooks import Epoch, Progress, RunControl
from r2cli.train.loop import TrainSettings
from r2cli.train.reporter import SILENT, Reporter

# Few levels regularize by themselves, so LSQ's authors halve the weight decay at 3 bits and quarter it at 2. One bit is
# not in their paper, and has the share of 2.
DECAY, DECAY_LEFT = 1e-4, {3: 0.5, 2: 0.25, 1: 0.25}


@dataclass(frozen=True)
class QatResult(Result):
    """What `train` returns. `epochs` are the results of the training's epochs."""

    epochs: list[Epoch] = field(default_factory=list)


@dataclass(frozen=True)
class QatRun:
    """A training run that is ready to start. `options` are all values that its result depends on."""

    task: QatTask
    plan: QatPlan
    source: Data
    options: dict[str, Any]

    @property
    def steps(self) -> int:
        """Return how many steps the optimizer takes over all epochs."""
        return self.plan.loop.epochs * loop.steps_per_epoch(len(self.source.train), self.plan.loop.batch_size)


def require_bits(config: QatConfig) -> None:
    """Check the bits of weights. Raises InputError for bits that the method is not defined for."""
    registry.require_bits(config.method, config.weight_bits, f"--weight-bits {config.weight_bits}")
    for name, words in values.keep(config.keep).items():
        bits = layer_form.of(words).weight_bits
        if bits is not None:
            registry.require_bits(config.method, bits, f"--keep {name}={words}")


def ready(made: Checkpoint, source: Data, config: QatConfig) -> QatRun:
    """Return the run that `config` asks for, on the float network `made` and the images of `source`.

    Raises InputError as `require_bits` does, and for more images than the data has.
    """
    require_bits(config)
    where, entry = loop.device(config.device), registry.get(registry.QAT_METHODS, config.method)
    lr = entry.lr if config.lr is None else config.lr
    source = data.learning(source, config.loss)
    source = source if config.images is None else data.with_fewer(source, config.images, config.seed)
    calibration = data.calibration_count(config.calibration, source)
    regularizer = None
    if config.reg != "none":
        usual = registry.default_strength(config.reg, size=source.input.size, images=len(source.train))
        strength = usual if config.reg_weight is None else config.reg_weight
        regularizer = regularizers.RegularizerSpec(config.reg, strength)
    decay = DECAY * DECAY_LEFT.get(config.weight_bits, 1.0) if config.weight_decay is None else config.weight_decay
    training = TrainSettings(
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=lr,
        momentum=config.momentum,
        weight_decay=decay,
        warmup=entry.warm_up,
        label_smoothing=0.0,
        reg_lr=lr,
        seed=config.seed,
        ema=config.ema,
        clip_grad=entry.clip_grad if config.clip_grad is None else config.clip_grad,
        precision=loop.precision(config.precision, where),
    )
    plan = QatPlan(
        training,
        next(rate for rate in (config.quantizer_lr, entry.quantizer_lr, lr) if rate is not None),
        distill=config.distill,
        progressive=config.progressive,
        norms=config.norms == "again",
        regularizer=regularizer,
        options=config.own_options,
    )
    settings = QatSettings(
        config.method,
        config.weight_bits,
        values.trained_act_bits(config.act_bits),
        values.keep(config.keep),
        config.activations,
        config.start,
        config.target,
    )

    def batches() -> Iterator[Batch]:
        return data.calibration(source, calibration, where, config.seed)

    task = QatTask(made, settings, batches, where, config.from_scratch, source.task)
    options = {**plan.identity(task), **training.__dict__, "calibration": calibration, "images": config.images}
    options |= {"reg": regularizer.__dict__ if regularizer else None, **data.recorded_loss(source)}
    return QatRun(task, plan, source, options)


def train(
    run: QatRun, state: Path, *, resume: bool = False, is_new: bool = False, reporter: Reporter = SILENT
) -> QatResult:
    """Train, and turn the levels into codes. The file `state` keeps the last whole epoch for a resumed run.

    The accuracy before training is not measured for a network that `is_new`. Raises R2Error if training diverges.
    """
    task, source = run.task, run.source
    loop.seed_everything(run.plan.loop.seed)
    before = None if is_new else evaluation.of_float(task.checkpoint, source, task.device, reporter)
    told = "" if before is None else f": float {before}"
    reporter.note(f"training {task.checkpoint.model.name} on {task.device}{told}")
    epochs = run.plan.loop.epochs
    with reporter.bar(task.settings.method, run.steps) as progress:
        watch = Progress(progress.advance, lambda epoch: progress.line(line(epoch, epochs, source.task.metric)))
        coded, layers, history = finetune.by_training(task, run.plan, source, RunControl(state, resume, watch))
    distributed.end_others()
    details = {
        "trained_top1": history[-1].top1,
        "trained_value": history[-1].value,
        "epochs": [epoch.__dict__ for epoch in history],
    }
    original = None if is_new else task.checkpoint
    coded = coded.then("qat", run.options, recorded(before))
    return QatResult(coded, layers, before, run.options, details, is_new, original, epochs=history)


def line(epoch: Epoch, epochs: int, metric: Metric | None) -> str:
    """Return one line about an epoch of training."""
    return (
        f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}  loss {epoch.loss:.4f}  {epoch.shown(metric)}  "
        f"{epoch.images_per_second:,.0f} images/s"
    )


class Trainable(nn.Module):
    """A network with quantizers, for a training loop of your own. `freeze` ends the training."""

    def __init__(self, run: QatRun) -> None:
        super().__init__()
        _require_none_of_ours(run.plan)
        self._run = run
        loop.seed_everything(run.plan.loop.seed)  # for new weights
        # In a list, because nn.Module would register the modules in it a second time, beside those of `net`.
        self._prepared: list[Prepared] = [prepare.prepare(run.task)]
        self.net = self._prepared[0].net

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.net(*inputs)

    def freeze(self) -> QatResult:
        """Return the network with its trained levels as codes, and activations and biases on their grids.

        Raises R2Error for a parameter that is NaN or infinite.
        """
        prepared, run = self._prepared[0], self._run
        hooks_of_run = finetune.hooks_of(run.task, run.plan, prepared)
        hooks_of_run.before_evaluation(run.plan.loop.epochs)
        coded, layers = prepare.finish(run.task, prepared)
        return QatResult(coded.then("qat", run.options, {}), layers, None, run.options, original=run.task.checkpoint)


def _require_none_of_ours(plan: QatPlan) -> None:
    """Raise InputError for what only our own training loop does."""
    ours = {"distill": plan.distill, "progressive": plan.progressive, "ema": plan.loop.ema, "reg": plan.regularizer}
    ours |= {name: plan.options.get(name) for name in ("bin_reg", "dampen", "freeze")}
    asked = [name for name, value in ours.items() if value]
    if asked:
        raise InputError(f"{asked[0]} is done by finetune's training loop, and prepare is for yours: leave it out")
