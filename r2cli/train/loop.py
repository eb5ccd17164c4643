"""The training loop: SGD with Nesterov momentum or AdamW, warm-up and a cosine; evaluation; an exact resume state.

`r2 pretrain` runs it on a float network with a range regularizer; compression runs it on a network whose layers have
quantizers or palettes. The paper never has both. A run that was stopped and resumed gives the same bytes as an unbroken
one: the order of the data is a function of seed and epoch, and everything else is in the resume state.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from r2cli import data
from r2cli.data import losses
from r2cli.data.losses import Learned
from r2cli.data.own_splits import MixedSplit
from r2cli.errors import InputError, R2Error, unknown
from r2cli.graph import narrow_convolutions
from r2cli.storage.input_spec import Given, count, places
from r2cli.train import averaging, distributed, evaluation, regularizers
from r2cli.train import state as states
from r2cli.train.hooks import Epoch, Progress, TrainHooks

FLOAT32, BFLOAT16 = "float32", "bfloat16"
SGD, ADAMW = "sgd", "adamw"


@dataclass(frozen=True)
class TrainSettings:
    """One training run. `warmup` is a share of all steps; `reg_lr` is the rate of the regularizer's own parameters."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    warmup: float
    label_smoothing: float
    reg_lr: float
    seed: int
    clip_grad: float | None = None  # the greatest Euclidean norm of all gradients together; None or 0: no limit
    clip_ratio: float | None = None  # the greatest norm of a weight's gradient, as a share of the weight's; as above
    ema: float | None = None  # decay of a running average of the weights, which is what is evaluated and kept
    precision: str = FLOAT32  # or BFLOAT16: layers compute in it, while weights and their updates stay float32
    compile: bool = False
    optimizer: str = SGD  # or ADAMW


def seed_everything(seed: int) -> None:
    """Make what follows a function of `seed`: initial weights and dropout. On a GPU, choose repeatable kernels."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move `model` to `device`, in place, in the layout of images (data/splits.py), which is faster; return it."""
    plain = any(tensor.ndim == 5 for tensor in model.state_dict().values())  # of five axes torch has another layout
    model.to(device, memory_format=torch.preserve_format if plain else torch.channels_last)  # type: ignore[call-overload]
    return narrow_convolutions.keep_plain(model)


def device(name: str) -> torch.device:
    """Return the device `name`. 'auto' is a GPU if there is one, and under torchrun each process has its own.

    Raises InputError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise unknown("device", name, ["auto", "cpu", "cuda"]) from error
    if found.type not in ("cpu", "cuda"):
        raise unknown("device", name, ["auto", "cpu", "cuda"])
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name} is not there: torch sees {torch.cuda.device_count()} GPUs, use --device cpu")
    return found


def precision(name: str, where: torch.device) -> str:
    """Return the precision `name`; 'auto' is bfloat16 on a GPU that has it. Raises InputError for one that has not."""
    able = where.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == BFLOAT16 and not able:
        raise InputError(f"{torch.cuda.get_device_name(where)} has no bfloat16: give --precision float32")
    if name == "auto":
        return BFLOAT16 if where.type == "cuda" and able else FLOAT32
    return name


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Return the batches of an epoch. A last batch of one image per process is left out: BatchNorm needs two."""
    whole, rest = divmod(examples, batch_size)
    return whole + (rest >= 2 * distributed.share().world or not whole)


def hash_of(shapes: Mapping[str, Any]) -> str:
    """Return a short name for an architecture, the same for tensors of the same names and shapes."""
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:8]


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the base rate at `step` of `steps`: it rises over the `warmup` share, then half a cosine."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass(frozen=True)
class _Run:
    """Everything that a run needs."""

    model: nn.Module
    forward: nn.Module  # `model` itself, or compiled, or in step with other processes
    average: AveragedModel | None  # of the model's weights and statistics, if `settings.ema` asks for it
    source: data.Data
    settings: TrainSettings
    device: torch.device
    regularizer: regularizers.Regularizer | None
    method: TrainHooks | None
    optimizers: tuple[torch.optim.Optimizer, ...]
    watch: Progress
    learned: Learned

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated and kept: with a method the model itself, whose quantizers its hooks know."""
        return self.model if self.average is None or self.method is not None else self.average.module

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.source.train), self.settings.batch_size)


def fit(
    model: nn.Module,
    source: data.Data,
    settings: TrainSettings,
    *,
    device: torch.device,
    setting: regularizers.RegularizerSpec | TrainHooks | None,
    state: Path,
    resume: bool,
    watch: Progress,
) -> list[Epoch]:
    """Train `model` in place. After every epoch the whole state is in the file `state`; `resume` starts from it.

    `setting` is a range regularizer, or the hooks of a method of compression. Under torchrun the processes train
    together, with `settings.batch_size` images per step in all. Raises R2Error if the loss is no longer finite (the
    state of the last good epoch is kept), and if the network cannot be compiled; InputError for
    inputs of several sizes.
    """
    if isinstance(source.train, MixedSplit):
        raise InputError(f"{source.name} has inputs of several sizes, which calibrate: train on one size")
    to_device(model, device)
    with distributed.together(device):
        run = _run(model, source, settings, device, setting, watch)
        history = _epochs(run, _state(run, state), resume=resume)
    if run.average is not None:
        # What a method keeps in buffers was set for the averaged weights before the last evaluation.
        if run.method is not None:
            averaging.copy_parameters(run.average.module, model)
        else:
            model.load_state_dict(run.average.module.state_dict())
    return history


def _run(
    model: nn.Module,
    source: data.Data,
    settings: TrainSettings,
    device: torch.device,
    setting: regularizers.RegularizerSpec | TrainHooks | None,
    watch: Progress,
) -> _Run:
    """Return everything that the training of `model`, which is on `device`, needs."""
    average = None
    method = setting if isinstance(setting, TrainHooks) else None
    if settings.ema is not None:
        average = averaging.running(model, settings.ema, statistics=method is None)
    penalty = method.regularizer if method else setting
    regularizer = (
        regularizers.Regularizer(penalty, model) if isinstance(penalty, regularizers.RegularizerSpec) else None
    )
    steps_by = optimizers(model, regularizer, settings, method)
    forward = distributed.wrapped(model, device)
    if settings.compile:
        forward = torch.compile(forward)  # type: ignore[assignment]
    task = source.task
    own = None if method is None else method.learned
    learned = own or losses.of_target(task.loss, task.outputs, settings.label_smoothing)
    return _Run(model, forward, average, source, settings, device, regularizer, method, steps_by, watch, learned)


def _epochs(run: _Run, state: states.State, *, resume: bool) -> list[Epoch]:
    """Train, evaluate and save, epoch by epoch, from where the state stands. Returns the results of all epochs."""
    history = states.restore(state) if resume and state.path.exists() else []
    run.watch.step(len(history) * run.steps_per_epoch)
    for number in range(len(history) + 1, run.settings.epochs + 1):
        if run.method is not None:
            run.method.before_epoch(number)
        loss, penalty, speed = _one_epoch(run, number)
        if not math.isfinite(loss):
            _require_numbers(run)
            kept = f"; {state.path} holds the end of epoch {number - 1}" if number > 1 else ""
            raise R2Error(f"training diverged in epoch {number} (loss {loss}): use a lower --lr or --reg-weight{kept}")
        distributed.spread_buffers(run.model, run.average)
        with averaging.parameters(run.model, run.average if run.method else None):
            if run.method is not None:
                run.method.before_evaluation(number)
            ratios = list(range_ratios(run.result).values()) or [0.0]
            found = evaluation.of_task(run.result, run.source, run.device)
        top1, value = (None, None) if found is None else (found.top1, found.value)
        mean = sum(ratios) / len(ratios)
        history.append(Epoch(number, loss, penalty, top1, max(ratios), mean, speed, value))
        if distributed.share().rank == 0:
            states.save(state, history)
        run.watch.epoch(history[-1])
    return history


def _one_epoch(run: _Run, number: int) -> tuple[float, float, float]:
    """Train epoch `number` (from 1). Returns its mean task loss, its last step's penalty, and images per second."""
    settings, share = run.settings, distributed.share()
    run.forward.train()
    if share.world > 1:  # otherwise dropout draws the same in every process
        torch.manual_seed((settings.seed * 1_000_003 + number) * share.world + share.rank)
    # Of seed and epoch only, so that a resumed run sees the same order. A prime keeps seeds and epochs apart.
    order = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    step = (number - 1) * run.steps_per_epoch
    total, penalty, seen = torch.zeros((), device=run.device), torch.zeros(()), 0
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    started = perf_counter()
    batches = run.source.train.batches(settings.batch_size, run.device, order, augment=True, share=share)
    for index, (images, labels) in enumerate(itertools.islice(batches, run.steps_per_epoch)):
        factor = learning_rate(step, settings.epochs * run.steps_per_epoch, settings.warmup)
        for group in groups:
            group["lr"] = group["base_lr"] * factor
        loss = _loss(run, images, labels)
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=True)
        _weighed(loss, count(images), index, run).backward()
        if run.method is not None:
            run.method.add_gradients()
        # Before the gradients are clipped: the bound is on all that moves the weights. AdamW: see `optimizers`.
        if run.regularizer and settings.optimizer == SGD:
            penalty = run.regularizer.add_gradients()
        _clip(run.model, settings)
        for optimizer in run.optimizers:
            optimizer.step()
        if run.regularizer and settings.optimizer == ADAMW:
            penalty = run.regularizer.step(settings.reg_lr * factor)
        if run.regularizer:
            run.regularizer.after_step()
        if run.average is not None:
            run.average.update_parameters(run.model)
        total += loss.detach() * count(images)
        seen += count(images)
        step += 1
        run.watch.step(1)
    total, all_seen = distributed.add_up(total, torch.tensor(seen, device=run.device))
    mean = float(total) / max(1, int(all_seen))  # waits for the device, so that the time is that of all work
    return mean, float(penalty), int(all_seen) / (perf_counter() - started)


def _clip(model: nn.Module, settings: TrainSettings) -> None:
    """Shorten gradients, in place: each as `clip_ratio` says, then all together as `clip_grad` says.

    The first is adaptive gradient clipping (Brock et al. 2021, equation 3), by whole weights instead of by rows. It is
    relative, because before a BatchNorm a weight that is half as large has a gradient that is twice as large.
    """
    own = [p for p in model.parameters() if p.ndim > 1 and p.grad is not None]
    if settings.clip_ratio and own:
        gradients = [p.grad for p in own if p.grad is not None]
        longest = settings.clip_ratio * torch.stack(torch._foreach_norm([p.detach() for p in own])).clamp_min(1e-3)
        factors = (longest / torch.stack(torch._foreach_norm(gradients)).clamp_min(1e-12)).clamp_max(1)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    if settings.clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)


def _weighed(loss: Tensor, own: int, index: int, run: _Run) -> Tensor:
    """Scale the mean `loss` of this process's `own` images of batch `index`.

    Then the mean over the processes, which DistributedDataParallel takes, is the mean over all images of the batch.
    """
    world, size = distributed.share().world, run.settings.batch_size
    return loss if world == 1 else loss * (own * world / min(size, len(run.source.train) - index * size))


def _loss(run: _Run, images: Given, labels: Any) -> Tensor:
    """Return the loss () of one batch, with the method's. Raises R2Error if the network cannot be compiled."""
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.settings.precision == BFLOAT16):
        try:
            logits = run.forward(*places(images))
        except torch._dynamo.exc.TorchDynamoException as error:
            told = " ".join(str(error).split())[:300]
            raise R2Error(f"the network cannot be compiled ({told}): leave --compile out") from error
        loss = run.learned(images, logits, labels)
        return loss if run.method is None or run.method.loss is None else loss + run.method.loss(images, logits)


def _require_numbers(run: _Run) -> None:
    """Raise InputError where the training data holds what is no number: no rate helps then."""
    size = run.settings.batch_size
    for inputs, target in run.source.train.batches(size, torch.device("cpu")):
        given = [*places(inputs), *([target] if isinstance(target, Tensor) else [])]
        if not all(bool(one.isfinite().all()) for one in given if one.is_floating_point()):
            raise InputError(f"{run.source.name} holds NaN or infinite values: give --data without")


def range_ratios(model: nn.Module) -> dict[str, float]:
    """Return max|w| / std of every regularized weight, by name.

    It is 1 for two levels, 1.7 for a uniform distribution, and 4 or more with outliers.
    """
    ratios = {}
    for name, weight in regularizers.regularized(model).items():
        w = weight.detach().double()
        ratios[name] = float(w.abs().max() / w.std(correction=0).clamp_min(1e-12))
    return ratios


def optimizers(
    model: nn.Module, regularizer: regularizers.Regularizer | None, settings: TrainSettings, method: TrainHooks | None
) -> tuple[torch.optim.Optimizer, ...]:
    """Return SGD or AdamW for the network, and Adam for those parameters of a method that ask for it.

    Weight decay is for weights only, and not for biases, norms, and parameters of a method or a regularizer. The
    parameters of a regularizer have no momentum: with it M overshoots. With AdamW, a regularizer steps by itself
    (`Regularizer.step`): Adam divides a gradient by its size, so a weak penalty would move weights as far as the task
    does (Loshchilov & Hutter 2019 say so of weight decay).
    """
    groups, adam = (list(method.groups), list(method.adam)) if method else ([], [])
    own = {id(p) for group in [*groups, *adam] for p in group["params"]}
    usual = [p for p in model.parameters() if id(p) not in own]
    sgd: list[dict[str, Any]] = [
        {"params": [p for p in usual if p.ndim > 1], "weight_decay": settings.weight_decay, "base_lr": settings.lr},
        {"params": [p for p in usual if p.ndim <= 1], "weight_decay": 0.0, "base_lr": settings.lr},
        *({"weight_decay": 0.0, **group} for group in groups),
    ]
    if settings.optimizer == ADAMW:
        weighing = torch.optim.AdamW(sgd, lr=settings.lr, fused=True)
        return (weighing, *([torch.optim.Adam([{"weight_decay": 0.0, **group} for group in adam])] if adam else []))
    if regularizer and regularizer.parameters:
        plain = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
        sgd.append({"params": list(regularizer.parameters.values()), "base_lr": settings.reg_lr, **plain})
    nesterov = settings.momentum > 0
    # Fused: one pass over weights, gradients and momenta; the plain form makes five.
    main = torch.optim.SGD(sgd, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=True)
    if not adam:
        return (main,)
    return main, torch.optim.Adam([{"weight_decay": 0.0, **group} for group in adam], lr=settings.lr)


def _state(run: _Run, path: Path) -> states.State:
    """Return what the resume state of the run contains, and the identity that a resumed run must share."""
    setting = run.regularizer.setting if run.regularizer else None
    shapes = {name: list(tensor.shape) for name, tensor in run.model.state_dict().items()}
    identity = {
        "settings": asdict(run.settings),
        "regularizer": asdict(setting) if setting else None,
        "source": {
            "data": run.source.name,
            "size": run.source.input.size,
            "images": len(run.source.train),
        },
        "model": {"model": f"of {len(shapes)} tensors, {hash_of(shapes)}"},
    } | ({"method": dict(run.method.identity)} if run.method else {})
    modules = {"model": run.model} | ({"average": run.average} if run.average is not None else {})
    own = run.regularizer.parameters if run.regularizer else {}
    return states.State(path, identity, modules, own, run.optimizers, run.device)
