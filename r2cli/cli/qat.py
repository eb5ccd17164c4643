"""`r2 qat`: train a network as it will be deployed, with weights and activations on few levels."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from r2cli import console, values
from r2cli.cli import gates
from r2cli.errors import InputError
from r2cli.options import (
    DEFAULT_SOURCE,
    DataDir,
    DataName,
    DryRun,
    Json,
    MaxBytes,
    MaxDrop,
    Mean,
    MinAccuracy,
    ModelArg,
    ModelName,
    Overwrite,
    Seed,
    Size,
    Source,
    Std,
    Stem,
    Weights,
    Workers,
    _option,
    resume_state,
)
from r2cli.options import Device as DeviceName

if TYPE_CHECKING:
    from r2cli import data as datasets
    from r2cli.qat.prepare import TrainedLayer
    from r2cli.storage import checkpoint
    from r2cli.train.hooks import Epoch

METHODS = ("dorefa", "pact", "lsq", "ewgs")
EXTRAS, SCRATCH = "What comes to the training", "From scratch"
LR = 0.05
EWGS_LR = 1e-3  # of the quantizers, by Adam: the authors' 1e-5 is for 400 epochs
CLIP = 1.0
WARM_UP = 0.05  # of the steps


def _delta(text: str) -> None:
    """Raises InputError for what is no --delta."""
    if text != "hessian":
        try:
            positive = float(text) >= 0
        except ValueError:
            positive = False
        if not positive:
            raise InputError(f"--delta {text} is impossible: give a number from 0 up, or hessian")


def qat(
    source: Source = None,
    weight_bits: Annotated[
        int, _option("--weight-bits", help="lsq 8 to 2, the others 7 to 1.", check=values.bits("--weight-bits"))
    ] = 4,
    act_bits: Annotated[
        str,
        _option("--act-bits", help="8 to 1, or none to leave activations float.", check=values.trained_act_bits),
    ] = "8",
    method: Annotated[
        str,
        _option(
            "--method",
            help="lsq, ewgs, dorefa, or pact: its activations with dorefa's weights.",
            check=values.one_of("method", *METHODS),
        ),
    ] = "lsq",
    keep: Annotated[
        list[str] | None,
        _option(
            "--keep",
            help="PATTERN=BITS: other weight bits for some layers, and inputs of as many; repeatable.",
            check=values.keep,
        ),
    ] = None,
    activations: Annotated[
        str,
        _option(
            "--activations",
            help="outputs: all that computes is rounded, 8 bits where sums read it; inputs: what layers read, as in "
            "the papers.",
            check=values.one_of("--activations", "outputs", "inputs"),
        ),
    ] = "outputs",
    start: Annotated[
        str,
        _option(
            "--start",
            help="Where steps and ranges begin: fitted, where least is lost, or as in the paper: paper.",
            check=values.one_of("--start", "fitted", "paper"),
        ),
    ] = "fitted",
    epochs: Annotated[int, _option("--epochs", help="Passes over the data.", min=1)] = 20,
    batch_size: Annotated[int, _option("--batch-size", help="Images a step.", min=2)] = 64,
    images: Annotated[
        int | None, _option("--images", help="Train on so many of the images. (default: all)", min=2)
    ] = None,
    lr: Annotated[float, _option("--lr", help="Peak learning rate; a cosine falls from it to 0.", min=0)] = LR,
    quantizer_lr: Annotated[
        float | None,
        _option("--quantizer-lr", help="Of steps and ranges. (default: --lr; ewgs, by Adam, 0.001)", min=0),
    ] = None,
    momentum: Annotated[float, _option("--momentum", help="Nesterov momentum.", min=0, max=1)] = 0.9,
    clip_grad: Annotated[
        float,
        _option(
            "--clip-grad",
            help="Most length of the gradient, all weights together, 0: any; a channel gone dead has a huge one.",
            min=0,
        ),
    ] = CLIP,
    weight_decay: Annotated[
        float | None,
        _option("--weight-decay", help="L2 on weights. (default: 1e-4; half of it at 3 bits, a quarter below)", min=0),
    ] = None,
    distill: Annotated[
        float,
        _option("--distill", help="Weight of the distance to the float network's predictions.", min=0, panel=EXTRAS),
    ] = 0.0,
    progressive: Annotated[
        bool, _option("--progressive", help="Begin at 8 bits, go on at 4, end at those wanted.", panel=EXTRAS)
    ] = False,
    bin_reg: Annotated[
        float,
        _option(
            "--bin-reg", help="lsq: draw weights to their levels in the second half, so strongly.", min=0, panel=EXTRAS
        ),
    ] = 0.0,
    delta: Annotated[
        str,
        _option("--delta", help="ewgs: a number, or hessian: from its trace, every epoch.", panel=EXTRAS, check=_delta),
    ] = "0.001",
    norms: Annotated[
        str,
        _option(
            "--norms",
            help="BatchNorm's statistics before each evaluation: again, over the calibration images; or running, as "
            "training left them.",
            panel=EXTRAS,
            check=values.one_of("--norms", "again", "running"),
        ),
    ] = "again",
    from_scratch: Annotated[
        bool,
        _option("--from-scratch", help="Fresh weights, of the checkpoint's network or of --model.", panel=SCRATCH),
    ] = False,
    reg: Annotated[
        str,
        _option(
            "--reg",
            help="none, linf, margin, soft-minmax, kure or clip, as in pretrain.",
            panel=SCRATCH,
            check=values.one_of("regularizer", *values.REGULARIZERS),
        ),
    ] = "none",
    reg_weight: Annotated[
        float | None, _option("--reg-weight", help="Strength. (default: as in pretrain)", min=0, panel=SCRATCH)
    ] = None,
    data: DataName = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    weights: Weights = None,
    model_arg: ModelArg = None,
    stem: Stem = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    calibration: Annotated[
        int | None,
        _option(
            "--calibration",
            help="Training images that quantizers start on, and ranges are set by. (default: 512)",
            min=2,
        ),
    ] = None,
    precision: Annotated[
        str,
        _option(
            "--precision",
            help="Of training: float32, bfloat16 (mixed), or auto: bfloat16 on a GPU with it.",
            check=values.one_of("--precision", *values.PRECISIONS),
        ),
    ] = "auto",
    seed: Seed = 0,
    device: DeviceName = "auto",
    workers: Workers = 2,
    output: Annotated[
        Path | None,
        _option(
            "--output", "-o", help="The checkpoint; .onnx goes beside it. (default: SOURCE.w4a8-lsq...)", panel="Output"
        ),
    ] = None,
    resume: Annotated[bool, _option("--resume", help="Go on where a stopped run left off.", panel="Output")] = False,
    overwrite: Overwrite = False,
    min_accuracy: MinAccuracy = None,
    max_drop: MaxDrop = None,
    max_bytes: MaxBytes = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> dict[str, Any]:
    """Train with quantized weights and activations: codes, an ONNX file, and its proof."""
    started = perf_counter()
    acts, kept = values.trained_act_bits(act_bits), values.keep(keep or [])
    _require_consistent(method, delta=delta, bin_reg=bin_reg, from_scratch=from_scratch, reg=reg)
    fresh = from_scratch and model is not None and source is None and weights is None
    source = gates.source(source, weights, DEFAULT_SOURCE)
    suffix = f"w{weight_bits}{f'a{acts}' if acts else ''}-{method}"
    output = output or gates.beside(source, f"{suffix}.safetensors")
    gates.require_output(output, ".safetensors", source=source)
    onnx, state = output.with_suffix(".onnx"), resume_state(output)
    gates.require_free([output, onnx], overwrite=overwrite)
    gates.require_no_state(state, resume=resume, overwrite=overwrite)

    from r2cli import data as datasets
    from r2cli.calibration import deployed
    from r2cli.cli import deliver, subject
    from r2cli.qat import finetune
    from r2cli.qat import prepare as worker
    from r2cli.qat.prepare import QatSettings, QatTask
    from r2cli.train import distributed, hooks, loop, regularizers
    from r2cli.train.loop import TrainSettings

    for bits, what in [(weight_bits, "--weight-bits"), *((own, f"--keep {name}=") for name, own in kept.items())]:
        worker.require_bits(method, bits, f"{what}{'' if what.endswith('=') else ' '}{bits}")
    network = subject.Network(model, weights, model_arg, stem)
    wanted = subject.Images(data, data_dir, workers, size, mean, std)
    made, loaded = _fresh(network, wanted, seed) if fresh else subject.load(source, network, wanted)
    loaded = loaded if images is None else datasets.with_fewer(loaded, images, seed)
    where, there = loop.device(device), len(loaded.train)
    calibration = subject.calibration(calibration, loaded)
    decay = 1e-4 * {3: 0.5, 2: 0.25, 1: 0.25}.get(weight_bits, 1.0) if weight_decay is None else weight_decay
    setting = None
    if reg != "none":
        usual = regularizers.default_strength(reg, size=loaded.input.size, images=there)
        setting = regularizers.RegularizerSpec(reg, usual if reg_weight is None else reg_weight)
    training = TrainSettings(
        epochs,
        batch_size,
        lr,
        momentum,
        decay,
        WARM_UP,
        0.0,
        lr,
        seed,
        clip_grad=clip_grad,
        precision=loop.precision(precision, where),
    )
    plan = finetune.QatPlan(
        training,
        (EWGS_LR if method == "ewgs" else lr) if quantizer_lr is None else quantizer_lr,
        distill=distill,
        progressive=progressive,
        bin_reg=bin_reg,
        delta=None if delta == "hessian" else float(delta),
        norms=norms == "again",
        regularizer=setting,
    )
    settings = QatSettings(method, weight_bits, acts, kept, activations, start)

    def batches() -> "Iterator[datasets.Batch]":
        return datasets.calibration(loaded, calibration, where, seed)

    work = QatTask(made, settings, batches, where, from_scratch)
    options = {**plan.identity(work), **training.__dict__, "calibration": calibration, "images": images}
    options |= {"reg": setting.__dict__ if setting else None}
    if dry_run:
        lines = [f"would train {source} ({made.model.name}) as {suffix} -> {output}, {onnx}"]
        console.tell(lines, as_json=json)
        return {"command": "qat", "options": options}
    loop.seed_everything(seed)
    before = None if fresh else loop.evaluate(deployed.network(made).to(where), loaded.test, where)
    told = "" if before is None else f": float top-1 {before:.2f} %"
    console.note(f"training {made.model.name} as {suffix} on {where}{told}")
    with gates.told_of(state), console.bar(method, epochs * loop.steps_per_epoch(there, batch_size)) as progress:
        watch = hooks.Progress(progress.advance, lambda epoch: progress.line(_line(epoch, epochs)))
        following = hooks.RunControl(state, resume, watch)
        coded, rows, history = finetune.by_training(work, plan, loaded, following)
    distributed.end_others()
    order = deliver.Order("qat", output, options, data, started, json, min_accuracy, max_drop, max_bytes, state)
    more = {
        "trained_top1": history[-1].top1,
        "layers": [row.__dict__ for row in rows],
        "epochs": [epoch.__dict__ for epoch in history],
    }
    original = None if fresh else made
    return deliver.compressed(order, coded, loaded, before, original=original, more=more, table=lambda _: _layers(rows))


def _require_consistent(method: str, *, delta: str, bin_reg: float, from_scratch: bool, reg: str) -> None:
    """Raises InputError for options that do not go together."""
    if bin_reg and method != "lsq":
        raise InputError(f"--bin-reg belongs to --method lsq: {method} has no step whose levels weights are drawn to")
    if delta != "0.001" and method != "ewgs":
        raise InputError(f"--delta belongs to --method ewgs: {method} passes gradients straight through")
    if reg != "none" and not from_scratch:
        raise InputError(f"--reg {reg} belongs to --from-scratch: pretrain with it, and fine-tune without")


def _fresh(network: Any, images: Any, seed: int) -> "tuple[checkpoint.Checkpoint, datasets.Data]":
    """A network of `--model` that nobody has trained, with its data."""
    from r2cli import data as datasets
    from r2cli import models
    from r2cli.storage import checkpoint
    from r2cli.train import loop

    name = images.data or "digits"
    loaded = images.load(name)
    spec = network.spec(network.model, loaded)
    loop.seed_everything(seed)
    model = models.build(spec)
    models.require_fit(model, spec, loaded.input.shape)
    made = checkpoint.Checkpoint(spec, loaded.input, loaded.class_names, model.state_dict(), origin=spec.name)
    options = {"data": datasets.recorded(name), "model": spec.described()}
    return made.then("new", options, {}), loaded


def _line(epoch: "Epoch", epochs: int) -> str:
    return (
        f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}  loss {epoch.loss:.4f}  top-1 {epoch.top1:.2f} %  "
        f"{epoch.images_per_second:,.0f} images/s"
    )


def _layers(rows: "Sequence[TrainedLayer]") -> Any:
    cells = [
        (row.layer, "x".join(map(str, row.shape)), row.bits, row.act_bits or "float", row.levels, row.note)
        for row in rows
    ]
    return console.table(("layer", "shape", "bits", "reads", "levels used", "note"), cells)
