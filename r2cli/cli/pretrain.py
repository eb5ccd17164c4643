"""`r2 pretrain`: train a float network with a range regularizer."""

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from r2cli import console, registry, values
from r2cli.cli import gates
from r2cli.options import (
    DATA,
    DataDir,
    DryRun,
    Json,
    Mean,
    MinAccuracy,
    ModelArg,
    Optimizer,
    Overwrite,
    Precision,
    Seed,
    Size,
    Std,
    Stem,
    Weights,
    Workers,
    _option,
    resume_state,
)
from r2cli.options import Device as DeviceName

if TYPE_CHECKING:
    from r2cli.storage import checkpoint
    from r2cli.train.hooks import Epoch

LR, LR_BATCH = 0.1, 64  # the default rate grows with the batch (Goyal et al. 2017)
ADAMW_LR, ADAMW_REG_LR = 1e-4, 0.1

REG = f"none; {registry.described(registry.REGULARIZERS)}."


def pretrain(
    model: Annotated[
        str,
        _option(
            "--model",
            help="mobilenet_v1, resnet8, 20 to 110, any of torchvision's, timm:NAME, FILE.py:FACTORY; for text, "
            "mobilebert or text:DIR, from its pre-trained weights.",
        ),
    ] = "mobilenet_v1",
    width: Annotated[
        float | None, _option("--width", help="Channel multiplier of a MobileNet. (default: V1 0.25, V2 1)")
    ] = None,
    data: Annotated[str, _option("--data", help=DATA)] = "digits",
    data_dir: DataDir = None,
    weights: Weights = None,
    model_arg: ModelArg = None,
    stem: Stem = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    reg: Annotated[
        str,
        _option("--reg", help=REG, panel="Regularization", check=registry.one_of(registry.REGULARIZERS, "none")),
    ] = "none",
    reg_weight: Annotated[
        float | None,
        _option(
            "--reg-weight",
            help="Strength; of clip, how many deviations. (default: 0.01, for small images what measured best; clip 2)",
            panel="Regularization",
            min=0,
        ),
    ] = None,
    reg_form: Annotated[
        str,
        _option(
            "--reg-form",
            help="stable, or paper: equations 1 to 3 to the letter.",
            panel="Regularization",
            check=values.one_of("--reg-form", "stable", "paper"),
        ),
    ] = "stable",
    reg_dim: Annotated[
        int,
        _option("--reg-dim", help="Vector length of a later palette.", panel="Regularization", min=1, max=8),
    ] = 1,
    reg_lr: Annotated[
        float | None,
        _option(
            "--reg-lr",
            help="Rate of margin's M and soft-minmax's alpha; with adamw, of what the regularizer does to weights too. "
            "(default: --lr; paper form 0.01; adamw 0.1)",
            panel="Regularization",
            min=0,
        ),
    ] = None,
    margin_k: Annotated[
        int,
        _option(
            "--margin-k",
            help="Margin: divide the hinge by K (1: the paper's).",
            panel="Regularization",
            min=1,
        ),
    ] = 1,
    epochs: Annotated[int, _option("--epochs", help="Passes over the data.", min=1)] = 40,
    batch_size: Annotated[int, _option("--batch-size", help="Images a step.", min=2)] = 64,
    optimizer: Optimizer = None,
    lr: Annotated[
        float | None,
        _option(
            "--lr",
            help="Peak learning rate; a cosine falls from it to 0. (default: 0.1 for each 64 of --batch-size; "
            "adamw 1e-4)",
            min=0,
        ),
    ] = None,
    momentum: Annotated[float, _option("--momentum", help="Nesterov momentum.", min=0, max=1)] = 0.9,
    weight_decay: Annotated[float, _option("--weight-decay", help="L2 on weights; 10x L2 is 4e-4.", min=0)] = 4e-5,
    warmup: Annotated[float, _option("--warmup", help="Share of the steps that the rate rises.", min=0, max=1)] = 0.05,
    label_smoothing: Annotated[float, _option("--label-smoothing", help="0 to 1.", min=0, max=1)] = 0.0,
    clip_grad: Annotated[
        float | None, _option("--clip-grad", help="Most length of the gradient, all weights together.", min=0)
    ] = None,
    ema: Annotated[
        float | None,
        _option("--ema", help="Keep a running average of the weights, 0.999 for example.", min=0, max=1),
    ] = None,
    precision: Precision = "auto",
    compile: Annotated[bool, _option("--compile", help="Compile the network (torch.compile).")] = False,
    seed: Seed = 0,
    device: DeviceName = "auto",
    workers: Workers = 2,
    output: Annotated[Path, _option("--output", "-o", help="The checkpoint to write.", panel="Output")] = Path(
        "model.safetensors"
    ),
    resume: Annotated[bool, _option("--resume", help="Go on where a stopped run left off.", panel="Output")] = False,
    overwrite: Overwrite = False,
    min_accuracy: MinAccuracy = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> dict[str, Any]:
    """Train a float network, with a regularizer of its weights' range."""
    gates.require_output(output, ".safetensors")
    state = resume_state(output)
    gates.require_free([output], overwrite=overwrite)
    gates.require_no_state(state, resume=resume, overwrite=overwrite)

    from r2cli import data as datasets
    from r2cli import models
    from r2cli.cli import subject
    from r2cli.models import text
    from r2cli.storage import checkpoint, foreign
    from r2cli.train import distributed, hooks, loop, regularizers
    from r2cli.train.loop import ADAMW, TrainSettings

    started = perf_counter()
    source = subject.Images(data, data_dir, workers, size, mean, std).load(data, model=model)
    spec = subject.Network(model, weights, model_arg, stem).spec(model, source, width)
    setting = None
    if reg != "none":
        strength = reg_weight
        if strength is None:
            strength = registry.default_strength(
                reg, size=source.input.size, images=len(source.train), is_text=source.input.is_text
            )
        setting = regularizers.RegularizerSpec(reg, strength, reg_form == "stable", reg_dim, margin_k)
    steps_by = gates.optimizer(optimizer, is_text=source.input.is_text)
    usual = ADAMW_LR if steps_by == ADAMW else LR * batch_size / LR_BATCH
    rate = usual if lr is None else lr
    usual = ADAMW_REG_LR if steps_by == ADAMW else rate if reg_form == "stable" else 0.01
    own_lr = usual if reg_lr is None else reg_lr
    where = loop.device(device)
    settings = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=rate,
        momentum=momentum,
        weight_decay=weight_decay,
        warmup=warmup,
        label_smoothing=label_smoothing,
        reg_lr=own_lr,
        seed=seed,
        clip_grad=clip_grad,
        ema=ema,
        precision=loop.precision(precision, where),
        compile=compile,
        optimizer=steps_by,
    )
    told = f"{reg} {setting.strength:g} ({reg_form})" if setting else "no regularizer"
    plan = f"{spec.name}{_stem(spec, source.input)} on {data} at {_size(source.input)}, {told}, {epochs} epochs"
    options = _options(datasets.recorded(data), spec.described(), setting, settings)
    options |= {} if weights is None else {"weights": weights.name}
    if dry_run:
        console.tell([f"would train {plan} -> {output}"], as_json=json)
        return {"command": "pretrain", "options": options}
    console.note(f"training {plan} on {where}")
    loop.seed_everything(seed)
    network = models.build(spec)
    models.require_fit(network, spec, source.input.shape)
    if weights is None and text.has(model):
        fresh = text.start(network, model)
        console.note(f"weights of {model}; new are {', '.join(fresh) or 'none'}")
    if weights is not None:
        tensors, beside = foreign.load(weights, network, spec.name)
        network.load_state_dict(tensors)
        subject.tell_beside(weights, beside)
    total = epochs * loop.steps_per_epoch(len(source.train), batch_size)
    with gates.told_of(state), console.bar("pretrain", total) as progress:
        watch = hooks.Progress(progress.advance, lambda epoch: progress.line(_line(epoch, epochs)))
        history = loop.fit(
            network, source, settings, device=where, setting=setting, state=state, resume=resume, watch=watch
        )
    distributed.end_others()
    last = history[-1]
    metrics = {"top1": last.top1, "range_max": last.range_max, "range_mean": last.range_mean}
    floats = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    made = checkpoint.Checkpoint(spec, source.input, source.class_names, floats)
    checkpoint.save(made.then("pretrain", options, metrics), output)
    state.unlink(missing_ok=True)
    unreadable = sorted({*source.train.unreadable, *source.test.unreadable})
    report = {
        "command": "pretrain",
        "output": output,
        "bytes": output.stat().st_size,
        "parameters": sum(p.numel() for p in network.parameters()),
        **metrics,
        "epochs": [epoch.__dict__ for epoch in history],
        "unreadable": unreadable,
        "seconds": round(perf_counter() - started, 1),
        "options": options,
    }
    ratio = f"max|w|/std {last.range_mean:.2f} mean, {last.range_max:.2f} worst layer"
    summary = f"{output}: top-1 {last.top1:.2f} %, {ratio}, {report['parameters']:,} parameters"
    more = f"{' --act-bits none' if source.input.is_text else ''}{'' if data == 'digits' else f' --data {data}'}"
    follow = console.next_step(f"r2 ptq {output} --weight-bits 4{more}")
    console.tell([summary, *gates.unreadable(unreadable), follow], as_json=json)
    gates.require(report, min_accuracy=min_accuracy, top1=last.top1)
    return report


def _stem(spec: "checkpoint.ModelSpec", given: "checkpoint.InputSpec") -> str:
    return "" if spec.factory or given.is_text else f" ({spec.stem} stem)"


def _size(given: "checkpoint.InputSpec") -> str:
    return f"{given.size} tokens" if given.is_text else f"{given.size}x{given.size}"


def _line(epoch: "Epoch", epochs: int) -> str:
    return (
        f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}  loss {epoch.loss:.4f}  penalty {epoch.penalty:.4f}  "
        f"top-1 {epoch.top1:.2f} %  max|w|/std {epoch.range_mean:.2f} (worst {epoch.range_max:.2f})  "
        f"{epoch.images_per_second:,.0f} images/s"
    )


def _options(data: str, spec: dict[str, Any], setting: Any, settings: Any) -> dict[str, Any]:
    """What the work depended on: no paths of files, no device, so that the same work gives the same bytes."""
    return {"data": data, "model": spec, "reg": setting.__dict__ if setting else None, **settings.__dict__}
