"""From a `PalettizeConfig` to palettes: the options become a plan, with k-means alone or with training."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r2cli import data, registry
from r2cli.calibration import observers
from r2cli.calibration.result import Result
from r2cli.config import groups, values
from r2cli.config.methods import PalettizeConfig
from r2cli.data import Batch, Data
from r2cli.data.metrics import Metric, recorded
from r2cli.errors import InputError
from r2cli.palettes import compression, soft_training
from r2cli.palettes.compression import PaletteSettings, PaletteTask, PalettizedLayer
from r2cli.palettes.soft_training import PalettePlan, PaletteRunControl, Schedule
from r2cli.storage.checkpoint import Checkpoint
from r2cli.train import distributed, evaluation, loop
from r2cli.train.hooks import Epoch
from r2cli.train.loop import ADAMW, TrainSettings
from r2cli.train.reporter import SILENT, Reporter


@dataclass(frozen=True)
class PaletteResult(Result):
    """What `compress` returns. `epochs` are the results of the epochs.

    `gap` in each is how far the hard weights are from the soft ones, as `Learner.gap` says, averaged over the layers.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class PaletteRun:
    """Work that is ready to start, with training by `plan`, or by k-means alone if that is None.

    `options` are all values that the result depends on. `weighs` says whether k-means weighs errors by sensitivity.
    """

    task: PaletteTask
    plan: PalettePlan | None
    source: Data
    weighs: bool
    options: dict[str, Any]

    @property
    def steps(self) -> int:
        """Return how many steps the work has: those of the optimizer over all epochs, or layers without training."""
        if self.plan is None:
            return sum(tensor.ndim > 1 for tensor in self.task.checkpoint.floats.values())
        epoch = loop.steps_per_epoch(len(self.source.train), self.plan.loop.batch_size)
        return self.plan.loop.epochs * epoch


def settings_of(config: PalettizeConfig, method: str) -> PaletteSettings:
    """Return the settings that `config` asks for, with the method `method`."""
    acts = config.activation_bits
    return PaletteSettings(
        method,
        config.bits,
        config.dim,
        config.group_size,
        config.lut_bits,
        acts,
        values.keep_forms(config.keep, config.dim),
        config.act_range or observers.usual(acts or 8),
        config.embeddings,
        config.target,
    )


def require_consistent(config: PalettizeConfig, method: str, *, is_network: bool) -> None:
    """Check the options. Raises InputError if some do not go together, or need a network and the file has none."""
    entry = registry.get(registry.PALETTE_METHODS, method)
    if not is_network and (not entry.files or config.weigh != "none"):
        what = f"--method {method}" if not entry.files else f"--weigh {config.weigh}"
        other = registry.PALETTE_METHOD_OF_FILES
        raise InputError(f"{what} needs a network and its data, and the file has none: give --method {other} alone")
    if entry.trains and config.weigh != "none":
        raise InputError(f"--weigh {config.weigh} belongs to --method {registry.PALETTE_METHOD_OF_FILES}")
    if entry.soft and config.epochs <= config.hard_epochs:
        hard = config.hard_epochs
        raise InputError(f"--hard-epochs {hard} leaves none of --epochs {config.epochs} soft: give fewer hard ones")


def needs_data(config: PalettizeConfig, method: str) -> bool:
    """Return whether the work that `config` asks for cannot be done on weights alone."""
    return (
        bool(config.activation_bits) or registry.get(registry.PALETTE_METHODS, method).trains or config.weigh != "none"
    )


def ready(made: Checkpoint, source: Data, config: PalettizeConfig) -> PaletteRun:
    """Return the work that `config` asks for, on the float network `made` and the images of `source`.

    Raises InputError for options that do not go together, and for more images than the data has.
    """
    method = config.method or registry.PALETTE_METHOD
    require_consistent(config, method, is_network=True)
    where = loop.device(config.device)
    source = data.learning(source, config.loss)
    calibration = data.calibration_count(config.calibration, source)
    settings, entry = settings_of(config, method), registry.get(registry.PALETTE_METHODS, method)
    if not calibration and needs_data(config, method):
        other = registry.PALETTE_METHOD_OF_FILES
        raise InputError(f"--calibration 0 leaves no images to work on: give --method {other} and --act-bits none")

    def batches() -> Iterator[Batch]:
        return data.calibration(source, calibration, where, config.seed)

    options: dict[str, Any] = {**settings.__dict__, "calibration": calibration, "seed": config.seed}
    plan = None
    if not entry.trains:
        options["weigh"] = config.weigh
        if config.weigh != "none" and source.task.loss.distils:
            raise InputError(f"--weigh {config.weigh} needs a loss of targets: give --loss, or leave --weigh out")
    else:
        training = _training(config, method, loop.precision(config.precision, where), is_text=made.input.is_text)
        hard = config.hard_epochs if entry.soft else 0
        # The last soft epoch has a tenth of the first one's temperature: nearly hard, so that little changes after it.
        schedule = Schedule(config.epochs, hard, config.temperature, config.temperature / 10)
        lut_lr = entry.lut_lr if config.lut_lr is None else config.lut_lr
        plan = PalettePlan(training, schedule, lut_lr, config.own_options)
        soft = {"hard_epochs": hard, "temperature": config.temperature} if entry.soft else {}
        options |= {**training.__dict__, **soft}
        options |= {**config.own_options, "lut_lr": lut_lr, **data.recorded_loss(source)}
    task = PaletteTask(made, settings, batches if calibration else None, where, config.seed, source.task)
    return PaletteRun(task, plan, source, config.weigh == "fisher", options)


def _training(config: PalettizeConfig, method: str, precision: str, *, is_text: bool) -> TrainSettings:
    """Return the loop's settings, with the defaults of the method where `config` leaves them open."""
    optimizer = groups.usual_optimizer(config.optimizer, is_text=is_text)
    entry = registry.get(registry.PALETTE_METHODS, method)
    usual = entry.adamw_lr if optimizer == ADAMW else entry.lr
    usual_clip = registry.default_clip_grad(method, config.bits)
    return TrainSettings(
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=usual if config.lr is None else config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        warmup=entry.warm_up,
        label_smoothing=0.0,
        reg_lr=0.0,
        seed=config.seed,
        clip_grad=usual_clip if config.clip_grad is None else config.clip_grad,
        clip_ratio=entry.clip_ratio if config.clip_ratio is None else config.clip_ratio,
        precision=precision,
        optimizer=optimizer,
    )


def compress(run: PaletteRun, state: Path, *, resume: bool = False, reporter: Reporter = SILENT) -> PaletteResult:
    """Make palettes for the network of `run`. The file `state` keeps the last whole epoch of a training.

    Raises R2Error if training diverges.
    """
    task, source = run.task, run.source
    loop.seed_everything(task.seed)
    before = evaluation.of_float(task.checkpoint, source, task.device, reporter)
    shown = f"float {before}" if before is not None else "it is not measured"
    reporter.note(f"palettizing {task.checkpoint.origin}: {shown}")
    epochs: list[dict[str, float]] = []
    if run.plan is None:
        with reporter.bar("k-means", run.steps) as progress:
            coded, layers = compression.by_kmeans(task, weigh=run.weighs, advance=progress.advance)
    else:
        with reporter.bar(task.settings.method, run.steps) as progress:

            def told(epoch: Epoch, gap: float) -> None:
                epochs.append({**epoch.__dict__, "gap": gap})
                progress.line(_line(epoch, run.plan, gap, source.task.metric))

            control = PaletteRunControl(state, resume, progress.advance, told)
            coded, layers = soft_training.by_training(task, run.plan, source, control)
    distributed.end_others()
    details = {**sizes(layers), "bits_per_weight": coded.bits_per_weight, "epochs": epochs}
    coded = coded.then("palettize", run.options, recorded(before))
    return PaletteResult(coded, layers, before, run.options, details, original=task.checkpoint, epochs=epochs)


def sizes(layers: Sequence[PalettizedLayer]) -> dict[str, float]:
    """Return the bits per weight over all layers with tables and scales, as stored and with Huffman-coded indices."""
    count = sum(math.prod(layer.shape) for layer in layers)
    size = sum(layer.size * math.prod(layer.shape) for layer in layers) / count
    coded = sum(layer.entropy_coded * math.prod(layer.shape) for layer in layers) / count
    return {"bits_per_weight": size, "entropy_coded_bits": coded}


def _line(epoch: Epoch, plan: PalettePlan | None, gap: float, metric: Metric | None) -> str:
    """Return one line about an epoch of training."""
    total = plan.loop.epochs if plan else 0
    return (
        f"epoch {epoch.epoch:>{len(str(total))}}/{total}  loss {epoch.loss:.4f}  hard {epoch.shown(metric)}  "
        f"soft to hard {100 * gap:.1f} %  {epoch.images_per_second:,.0f} images/s"
    )
