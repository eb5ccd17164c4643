"""From a `PtqConfig` to codes: the options become settings, bits and grids are chosen, and the network is quantized."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from r2cli import data, registry
from r2cli.calibration import deployed, observers
from r2cli.calibration.result import Result
from r2cli.config import layer_form, values
from r2cli.config.methods import PtqConfig
from r2cli.data import Batch, Data
from r2cli.data.metrics import Measured, recorded
from r2cli.data.task import CLASSIFICATION
from r2cli.errors import InputError
from r2cli.graph.read import trace
from r2cli.ptq import auto, bit_budget, cost_table, equalize, mixed_precision, post_training
from r2cli.ptq.bit_budget import BitTarget, ChosenBits
from r2cli.ptq.post_training import PtqSettings
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import Given
from r2cli.train import evaluation, loop
from r2cli.train.reporter import SILENT, Reporter


@dataclass(frozen=True)
class PtqResult(Result):
    """What `quantize` returns. `settings` were chosen from `bits` and `trials`.

    `calibration` is how many images were looked at. `relu_top1` is the accuracy of the float network in percent with
    every ReLU6 replaced by ReLU, where that was asked for.
    """

    settings: PtqSettings = field(kw_only=True)
    calibration: int = field(kw_only=True)
    bits: Sequence[ChosenBits] = ()
    trials: Sequence[auto.Trial] = ()
    relu_top1: float | None = None


def looks_at_images(config: PtqConfig, *, has_data: bool) -> bool:
    """Return whether calibration images are wanted.

    DFQ works without images, unless data or a number of images is given. Raises InputError for a rule of ranges that
    would have none.
    """
    dataless = registry.get(registry.PTQ_METHODS, config.method).dataless
    looks = config.calibration != 0 and not (dataless and not has_data and config.calibration is None)
    if not looks and config.act_range is not None:
        raise InputError(
            f"--act-range {config.act_range} looks at images: give --calibration, or leave it to the BatchNorms"
        )
    return looks


def needs_data(config: PtqConfig) -> bool:
    """Return whether the work that `config` asks for cannot be done on weights alone."""
    entry = registry.get(registry.PTQ_METHODS, config.method)
    rounds_values = values.act_bits(config.act_bits) is not None
    return rounds_values or entry.looks or entry.chooses or config.is_mixed or config.minimize is not None


def settings_of(config: PtqConfig) -> PtqSettings:
    """Return the settings that `config` asks for, with the defaults of its method."""
    bits = config.weight_bits or 8
    # With mixed precision some layers may get the fewest bits, so the range rule is the one for those.
    acts, kept = values.act_bits(config.act_bits), values.keep(config.keep)
    forms = layer_form.all_of(kept)
    return PtqSettings(
        config.method,
        bits,
        acts,
        config.granularity or post_training.CHANNEL,
        kept,
        None if config.parts is None else values.parts(config.parts),
        config.relu6,
        config.weight_range
        or registry.usual_weight_range(config.method, min(mixed_precision.WIDTHS) if config.is_mixed else bits),
        config.act_range or observers.usual(min([acts or 8, *(form.act_bits for form in forms if form.act_bits)])),
        config.symmetric,
        config.embeddings,
        config.target,
        config.group_size or 0,
        config.qdrop,
        config.steps,
    )


def target_of(config: PtqConfig) -> BitTarget:
    """The budget that `config` asks for. Raises InputError for a --cost that is no table."""
    widths = () if config.act_widths is None else values.act_widths(config.act_widths)
    costs = None if config.cost is None else cost_table.read(config.cost)
    size = 0 if config.minimize == "bytes" else config.target_bytes
    return BitTarget(config.target_bits, size, config.sensitivity, costs, config.budget, widths, config.target_act_bits)


def options_of(config: PtqConfig, settings: PtqSettings, calibration: int) -> dict[str, Any]:
    """Return all values that the result depends on, by the names of options."""
    return {**settings.__dict__, "calibration": calibration, "seed": config.seed}


def bits_again(settings: PtqSettings) -> list[str]:
    """Return the bits that mixed precision chose, as options that give the same bytes."""
    kept = [word for name, bits in settings.keep.items() for word in ("--keep", f"{name}={bits}")]
    if settings.weight_range != registry.usual_weight_range(settings.method, settings.weight_bits):
        kept += ["--weight-range", settings.weight_range]
    return ["--weight-bits", str(settings.weight_bits), *kept]


def trial_again(trials: Sequence[auto.Trial]) -> list[str]:
    """Return the best of the trials, as options that give the same bytes."""
    best = auto.kept(trials)
    form = ["--method", best.method, "--granularity", best.granularity, "--weight-range", best.weight_range]
    return [*form, "--parts", ",".join(best.parts) or values.NO_PARTS]


def quantize(
    made: Checkpoint,
    source: Data | None,
    config: PtqConfig,
    *,
    calibration: int,
    reporter: Reporter = SILENT,
    before: Measured | None = None,
) -> PtqResult:
    """Quantize the float network `made` as `config` asks, with `calibration` images of `source`.

    `before` is what the float network gave, where that is known. Without `source` the accuracy is not measured, and
    nothing may look at images. Raises InputError for what does not fit the network, or needs images that are not there.
    """
    where, entry = loop.device(config.device), registry.get(registry.PTQ_METHODS, config.method)
    batches = data.Repeatable(lambda: data.calibration(source, calibration, where, config.seed) if source else iter(()))
    settings, chosen_bits, front = _within_budget(made, source, config, batches, where, reporter)
    if before is None and source is not None:
        before = evaluation.of_float(made, source, where, reporter)
    shown = f"float {before}" if before is not None else "it is not measured"
    reporter.note(f"quantizing {made.origin} to {config.suffix}: {shown}")
    images = data.Repeatable(lambda: (batch for batch, _ in batches)) if calibration else None
    trials: list[auto.Trial] = []
    if entry.chooses:
        coded, layers, settings, trials = _best(
            made, settings, config, images, where, reporter, decides=source is None or source.task.logits
        )
    else:
        if entry.equalizes and settings.parts is None and images is not None:
            judged = auto.equalization(made, settings, images, where)
            reporter.note(str(judged))
            settings = replace(settings, parts=judged.parts)
        with reporter.bar(config.method, sum(tensor.ndim > 1 for tensor in made.floats.values())) as progress:
            coded, layers = post_training.quantize(made, settings, images, where, progress.advance, progress.line)
    # What was chosen is recorded, and not what was asked for: the same choice gives the same bytes, however it came.
    options = options_of(config, settings, calibration)
    relu = _top1_with_relu(made, source, where) if entry.parts and config.relu6 == post_training.RELU else None
    details: dict[str, Any] = {
        "front": front,
        "ranges": "calibration" if calibration else "batchnorm",
        "mixed": [each.__dict__ for each in chosen_bits],
        "trials": [trial.__dict__ for trial in trials],
        "again": [*(bits_again(settings) if chosen_bits else []), *(trial_again(trials) if trials else [])],
    }
    if entry.parts and config.relu6 == post_training.RELU:
        details["relu_top1"] = relu
    return PtqResult(
        coded.then("ptq", options, recorded(before)),
        layers,
        before,
        options,
        details,
        original=made,
        settings=settings,
        calibration=calibration,
        bits=chosen_bits,
        trials=trials,
        relu_top1=relu,
    )


def _within_budget(
    made: Checkpoint,
    source: Data | None,
    config: PtqConfig,
    batches: Iterable[Batch],
    where: torch.device,
    reporter: Reporter,
) -> tuple[PtqSettings, list[ChosenBits], list[dict[str, float]]]:
    """The settings that `config` asks for; with mixed precision, those of the choice, its rows, and its front."""
    settings, task = settings_of(config), source.task if source else CLASSIFICATION
    if not config.is_mixed:
        return settings, [], []
    # `auto` has no rounding of its own yet when bits are chosen.
    chooses = registry.get(registry.PTQ_METHODS, config.method).chooses
    plain, target = replace(settings, method=auto.NEAREST) if chooses else settings, target_of(config)
    losses = bit_budget.measure(made, plain, target, batches, where, config.seed, task)
    if target.sensitivity != mixed_precision.BEST:
        plain, chosen_bits, front = bit_budget.chosen(losses, target)
        return replace(plain, method=config.method), chosen_bits, front
    choices = {name: bit_budget.chosen(own, target) for name, own in bit_budget.by_measures(losses).items()}
    images = data.Repeatable(lambda: (batch for batch, _ in batches))
    tried, decides = {name: choice[0] for name, choice in choices.items()}, source is None or source.task.logits
    away = auto.distances(made, tried, images, where, decides=decides)
    best = min(away, key=lambda name: away[name])
    shown = ", ".join(f"{name} {each:.2g}" for name, each in away.items())
    reporter.note(f"bits by {best}: the outputs are nearest ({shown}{' nats' if decides else ' of the signal'})")
    plain, chosen_bits, front = choices[best]
    return replace(plain, method=config.method), chosen_bits, front


def _best(
    made: Checkpoint,
    settings: PtqSettings,
    config: PtqConfig,
    images: Iterable[Given] | None,
    where: torch.device,
    reporter: Reporter,
    *,
    decides: bool,
) -> tuple[Checkpoint, list[post_training.QuantizedLayer], PtqSettings, list[auto.Trial]]:
    """Return what `--method auto` keeps, with its settings and all trials. Raises InputError without images."""
    if images is None:
        other = registry.PTQ_DATALESS
        raise InputError(
            f"--method {config.method} needs images: give --calibration, or --method {other}, which needs none"
        )

    grids = (config.granularity,) if config.granularity else auto.GRIDS
    rules = (config.weight_range,) if config.weight_range else ()
    return auto.choose(made, settings, images, where, grids=grids, rules=rules, decides=decides, tell=reporter.note)


def _top1_with_relu(made: Checkpoint, source: Data | None, where: torch.device) -> float | None:
    """Return the top-1 in percent of the float network with every ReLU6 replaced by ReLU; None without data."""
    if source is None or not source.measured or not source.task.decides:
        return None
    net = trace(deployed.network(made), made.input.blank(2), deployed.architecture(made))
    equalize.without_relu6(net)
    return evaluation.evaluate(net.to(where), source.test, where)
