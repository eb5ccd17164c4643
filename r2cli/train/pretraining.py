"""From a `PretrainConfig` to a float checkpoint: the options become settings, and the network is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2cli import data, models, registry
from r2cli.config import groups
from r2cli.config.training import PretrainConfig
from r2cli.data import Data
from r2cli.data.metrics import Metric, report_of
from r2cli.errors import InputError
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import Checkpoint, ModelSpec
from r2cli.storage.input_spec import TensorsSpec
from r2cli.train import distributed, loop
from r2cli.train.hooks import Epoch, Progress
from r2cli.train.loop import ADAMW, TrainSettings
from r2cli.train.regularizers import RegularizerSpec
from r2cli.train.reporter import SILENT, Reporter

LR, LR_BATCH = 0.1, 64  # the default rate is proportional to the batch (Goyal et al. 2017)
ADAMW_LR, ADAMW_REG_LR = 1e-4, 0.1
# For regularizers as the paper writes them: at the weights' rate, the gradient of the margin throws it out of a layer.
PAPER_REG_LR = 0.01


@dataclass(frozen=True)
class PretrainRun:
    """A training run that is ready to start. `options` are all values that its result depends on."""

    spec: ModelSpec
    source: Data
    config: PretrainConfig
    settings: TrainSettings
    regularizer: RegularizerSpec | None
    options: dict[str, Any]

    @property
    def plan(self) -> str:
        """One line about the run."""
        given, config = self.source.input, self.config
        size = f"{given.size} tokens" if given.is_text else "x".join(map(str, given.shape[-2:]))
        size = str(given) if isinstance(given, TensorsSpec) else size
        stem = "" if self.spec.factory or given.is_text else f" ({self.spec.stem} stem)"
        told = "no regularizer"
        if self.regularizer:
            told = f"{config.reg} {self.regularizer.strength:g} ({config.reg_form})"
        return f"{self.spec.name}{stem} on {self.source.name} at {size}, {told}, {config.epochs} epochs"


@dataclass(frozen=True)
class Pretrained:
    """A float network that was trained: its checkpoint and the epochs of its training."""

    checkpoint: Checkpoint
    epochs: list[Epoch]
    parameters: int
    options: Mapping[str, Any]
    metric: Metric | None = None

    @property
    def report(self) -> dict[str, Any]:
        """What `--json` prints of the work, as plain values."""
        last = self.epochs[-1]
        return {
            "parameters": self.parameters,
            "top1": last.top1,
            "metric": report_of(self.metric, last.value),
            "range_max": last.range_max,
            "range_mean": last.range_mean,
            "epochs": [epoch.__dict__ for epoch in self.epochs],
            "options": dict(self.options),
        }

    def to_bytes(self) -> bytes:
        """Return the bytes of the checkpoint's file, which are the same for the same work."""
        return checkpoint.to_bytes(self.checkpoint)


def ready(spec: ModelSpec, source: Data, config: PretrainConfig, *, recorded: Mapping[str, Any]) -> PretrainRun:
    """Return the run that `config` asks for. `recorded` is what the checkpoint's history says of network and data."""
    source, regularizer = data.learning(source, config.loss), None
    if source.task.loss.distils:
        if config.loss is None and _has_number_targets(source):
            raise InputError(f"{source.name} has number targets: give --metric mse, or --loss mse")
        raise InputError(
            "r2 pretrain has no float network to learn from: give data with targets, and --loss or --metric"
        )
    if config.reg != "none":
        strength = config.reg_weight
        if strength is None:
            given = source.input
            strength = registry.default_strength(
                config.reg, size=given.size, images=len(source.train), is_text=given.is_text
            )
        form = config.reg_form == "stable", config.reg_dim, config.margin_k
        regularizer = RegularizerSpec(config.reg, strength, *form)
    optimizer = groups.usual_optimizer(config.optimizer, is_text=source.input.is_text)
    usual = ADAMW_LR if optimizer == ADAMW else LR * config.batch_size / LR_BATCH
    rate = usual if config.lr is None else config.lr
    usual = ADAMW_REG_LR if optimizer == ADAMW else rate if config.reg_form == "stable" else PAPER_REG_LR
    settings = TrainSettings(
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        warmup=config.warmup,
        label_smoothing=config.label_smoothing,
        reg_lr=usual if config.reg_lr is None else config.reg_lr,
        seed=config.seed,
        clip_grad=config.clip_grad,
        ema=config.ema,
        precision=loop.precision(config.precision, loop.device(config.device)),
        compile=config.compile,
        optimizer=optimizer,
    )
    # Without paths of files and the device, so that the same work gives the same bytes.
    reg = regularizer.__dict__ if regularizer else None
    options = {"data": recorded["data"], "model": spec.described(), "reg": reg, **settings.__dict__}
    options |= {name: value for name, value in recorded.items() if name != "data"} | data.recorded_loss(source)
    return PretrainRun(spec, source, config, settings, regularizer, options)


def _has_number_targets(source: Data) -> bool:
    """Whether the first target is a tensor of numbers, which are no labels."""
    target = next((target for _, target in source.train.batches(1, torch.device("cpu"))), None)
    return isinstance(target, Tensor) and target.is_floating_point()


def network_of(run: PretrainRun, own: nn.Module | None = None) -> nn.Module:
    """Return the network of `run` with new weights, or the user's `own` as it is; training draws by the seed then.

    Raises InputError if a new one does not fit the data.
    """
    loop.seed_everything(run.config.seed)
    if own is not None:
        return own
    network = models.build(run.spec)
    kind = type(network)
    models.require_fit(network, run.spec, run.source.input, decides=run.source.task.decides)
    network.__class__ = kind
    return network


def train(
    run: PretrainRun, network: nn.Module, state: Path, *, resume: bool = False, reporter: Reporter = SILENT
) -> Pretrained:
    """Train `network` in place. The file `state` keeps the last whole epoch. Raises R2Error if training diverges."""
    epochs, source = run.config.epochs, run.source
    total, metric = epochs * loop.steps_per_epoch(len(source.train), run.config.batch_size), source.task.metric
    own = type(network)
    given, outputs = models.require_fit(network, run.spec, source.input, decides=source.task.decides)
    with reporter.bar("pretrain", total) as progress:
        history = loop.fit(
            network,
            source.giving(outputs),
            run.settings,
            device=loop.device(run.config.device),
            setting=run.regularizer,
            state=state,
            resume=resume,
            watch=Progress(progress.advance, lambda epoch: progress.line(_line(epoch, epochs, metric))),
        )
    network.__class__ = own  # called as its own code has it again
    distributed.end_others()
    last = history[-1]
    measured: dict[str, Any] = {"top1": last.top1} if last.top1 is not None else {}
    if metric is not None and last.top1 is None:
        measured = {metric.name: last.value}
    metrics = {**measured, "range_max": last.range_max, "range_mean": last.range_mean}
    floats: dict[str, Tensor] = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    made = Checkpoint(run.spec, given, source.class_names, floats, outputs=outputs)
    made = made.then("pretrain", run.options, metrics)
    return Pretrained(made, history, sum(p.numel() for p in network.parameters()), run.options, metric)


def _line(epoch: Epoch, epochs: int, metric: Metric | None) -> str:
    """Return one line about an epoch of training."""
    return (
        f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}  loss {epoch.loss:.4f}  penalty {epoch.penalty:.4f}  "
        f"{epoch.shown(metric)}  max|w|/std {epoch.range_mean:.2f} (worst {epoch.range_max:.2f})  "
        f"{epoch.images_per_second:,.0f} images/s"
    )
