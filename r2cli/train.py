"""The training loop: SGD with Nesterov momentum, warm-up and a cosine; evaluation; and a state that resumes exactly.

pretrain runs it on a float network with a range regularizer attached, compression on one whose layers have learners;
the paper never has both. An unbroken run and one that was killed and
resumed give the same bytes: the order of the data is a function of seed and epoch, and the rest is in the resume state.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from r2cli import checkpoint, data, regularizers
from r2cli.attach import Method
from r2cli.errors import InputError, R2Error, unknown

STATE_FORMAT = 1
EVALUATION_BATCH = 256
FLOAT32, BFLOAT16 = "float32", "bfloat16"

# Options whose names differ from those of the settings that they fill.
OPTIONS = {"name": "reg", "strength": "reg-weight", "stable": "reg-form", "dim": "reg-dim"}


@dataclass(frozen=True)
class Settings:
    """One training run. `warmup` is a share of all steps; `reg_lr` steps the regularizer's own parameters."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    warmup: float
    label_smoothing: float
    reg_lr: float
    seed: int
    clip_grad: float | None = None  # most Euclidean length of all gradients together
    ema: float | None = None  # decay of a running average of the weights, which is what is evaluated and kept
    precision: str = FLOAT32  # or BFLOAT16: layers compute in it, weights and their updates stay float32
    compile: bool = False


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to. `top1` in percent on the held-out split; ratios are max|w| / std over the layers."""

    epoch: int
    loss: float  # task loss, mean over the epoch
    penalty: float  # strength * R after the last step
    top1: float
    range_max: float
    range_mean: float
    images_per_second: float = 0.0  # of the training steps, evaluation and saving not counted


@dataclass(frozen=True)
class Watch:
    """Whom to tell: `step` after every optimizer step, `epoch` after every evaluation."""

    step: Callable[[int], None]
    epoch: Callable[[Epoch], None]


def seed_everything(seed: int) -> None:
    """Make what follows a function of `seed`: initial weights, dropout, and on a GPU the choice of kernels."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def device(name: str) -> torch.device:
    """The device `name`; 'auto' is a GPU when there is one. Raises InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    """The precision `name`; 'auto' is bfloat16 on a GPU that computes in it. Raises InputError where it does not."""
    able = where.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == BFLOAT16 and not able:
        raise InputError(f"--precision bfloat16 is not to be had on {torch.cuda.get_device_name(where)}: use float32")
    if name == "auto":
        return BFLOAT16 if where.type == "cuda" and able else FLOAT32
    return name


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Batches of an epoch; a last batch of one image is left out, because BatchNorm cannot train on it."""
    whole, rest = divmod(examples, batch_size)
    return whole + (rest > 1 or not whole)


def hash_of(shapes: Mapping[str, Any]) -> str:
    """A short name for an architecture: the same for the same tensors."""
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:8]


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the base rate at `step` of `steps`: linear up over the `warmup` share, then half a cosine to 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass(frozen=True)
class _Run:
    """Everything that a run holds; `identity` is what must be equal for a stopped run to go on."""

    model: nn.Module
    forward: nn.Module  # `model` itself, or compiled
    average: AveragedModel | None  # of the model's weights and statistics, where Settings.ema asks for it
    source: data.Data
    settings: Settings
    device: torch.device
    regularizer: regularizers.Regularizer | None
    method: Method | None
    optimizer: torch.optim.SGD
    state: Path
    watch: Watch

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated and kept."""
        return self.model if self.average is None else self.average.module

    @property
    def identity(self) -> dict[str, Any]:
        setting = self.regularizer.setting if self.regularizer else None
        shapes = {name: list(tensor.shape) for name, tensor in self.model.state_dict().items()}
        source = {"data": self.source.name, "size": self.source.input.size, "images": len(self.source.train)}
        return {
            "settings": asdict(self.settings),
            "regularizer": asdict(setting) if setting else None,
            "source": source,
            "model": {"model": f"of {len(shapes)} tensors, {hash_of(shapes)}"},
        } | ({"method": dict(self.method.identity)} if self.method else {})

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.source.train), self.settings.batch_size)


def fit(
    model: nn.Module,
    source: data.Data,
    settings: Settings,
    *,
    device: torch.device,
    setting: regularizers.Setting | Method | None,
    state: Path,
    resume: bool,
    watch: Watch,
) -> list[Epoch]:
    """Train `model` in place. After every epoch the whole state is in the file `state`; `resume` starts from it.

    `setting` is what comes to the task: a range regularizer, or a method of compression.

    Raises R2Error where the loss is no longer finite (the last good epoch's state is kept), and where the network
    cannot be compiled.
    """
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward: nn.Module = torch.compile(model) if settings.compile else model  # type: ignore[assignment]
    average = None
    if settings.ema is not None:
        average = AveragedModel(model, multi_avg_fn=_running_average(settings.ema), use_buffers=True)
    method = setting if isinstance(setting, Method) else None
    regularizer = regularizers.Regularizer(setting, model) if isinstance(setting, regularizers.Setting) else None
    optimizer = _optimizer(model, regularizer, settings, method.groups if method else ())
    run = _Run(model, forward, average, source, settings, device, regularizer, method, optimizer, state, watch)
    history = _restore(run) if resume and state.exists() else []
    watch.step(len(history) * run.steps_per_epoch)
    for number in range(len(history) + 1, settings.epochs + 1):
        if method is not None:
            method.before_epoch(number)
        loss, penalty, speed = _one_epoch(run, number)
        if not math.isfinite(loss):
            kept = f"; {state} holds the end of epoch {number - 1}" if number > 1 else ""
            raise R2Error(f"training diverged in epoch {number} (loss {loss}): use a lower --lr or --reg-weight{kept}")
        if method is not None:
            method.before_evaluation(number)
        ratios = list(range_ratios(run.result).values()) or [0.0]
        accuracy = evaluate(run.result, source.test, device)
        mean = sum(ratios) / len(ratios)
        history.append(Epoch(number, loss, penalty, accuracy, max(ratios), mean, speed))
        _save(run, history)
        watch.epoch(history[-1])
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    return history


def _one_epoch(run: _Run, number: int) -> tuple[float, float, float]:
    """Mean task loss over epoch `number` (from 1), the penalty at its last step, and images a second."""
    settings = run.settings
    run.forward.train()
    order = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    step = (number - 1) * run.steps_per_epoch
    total, penalty, seen = torch.zeros((), device=run.device), torch.zeros(()), 0
    started = perf_counter()
    batches = run.source.train.batches(settings.batch_size, run.device, order, augment=True)
    for images, labels in itertools.islice(batches, run.steps_per_epoch):
        factor = learning_rate(step, settings.epochs * run.steps_per_epoch, settings.warmup)
        for group in run.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        loss = _loss(run, images, labels)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if run.regularizer:
            penalty = run.regularizer.add_gradients()
        if settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip_grad)
        run.optimizer.step()
        if run.average is not None:
            run.average.update_parameters(run.model)
        total += loss.detach() * len(labels)
        seen += len(labels)
        step += 1
        run.watch.step(1)
    mean = float(total) / max(1, seen)  # waits for the device, so that the time is the work's
    return mean, float(penalty), seen / (perf_counter() - started)


def _running_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """An exponential average that starts short, so that it soon forgets the initial weights (as TensorFlow's does)."""

    def update(averaged: Any, current: Any, count: Tensor) -> None:
        steps = int(count)
        own = min(decay, (1 + steps) / (10 + steps))
        get_ema_multi_avg_fn(own)(averaged, current, count)  # type: ignore[no-untyped-call]

    return update


def _loss(run: _Run, images: Tensor, labels: Tensor) -> Tensor:
    """The task loss of one batch. Raises R2Error where the network cannot be compiled."""
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.settings.precision == BFLOAT16):
        try:
            logits = run.forward(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            told = " ".join(str(error).split())[:300]
            raise R2Error(f"the network cannot be compiled ({told}): leave --compile out") from error
        return nn.functional.cross_entropy(logits, labels, label_smoothing=run.settings.label_smoothing)


def evaluate(model: nn.Module, split: data.Split, device: torch.device) -> float:
    """Top-1 accuracy of `model` on `split`, in percent."""
    model.eval()
    return top1(model, split, device)


@torch.inference_mode()
def top1(
    predict: Callable[[Tensor], Tensor],
    split: data.Split,
    device: torch.device,
    *,
    advance: Callable[[int], None] = lambda images: None,
) -> float:
    """Top-1 accuracy on `split`, in percent, of a function from images (n, c, s, s) to logits (n, classes)."""
    correct, seen = 0, 0
    for images, labels in split.batches(EVALUATION_BATCH, device):
        correct += int((predict(images).argmax(1).to(device) == labels).sum())
        seen += len(labels)
        advance(len(labels))
    return 100 * correct / seen


def range_ratios(model: nn.Module) -> dict[str, float]:
    """max|w| / std of every regularized weight, by name: 1 for two levels, 1.7 if uniform, 4 and more with outliers."""
    ratios = {}
    for name, weight in regularizers.regularized(model).items():
        w = weight.detach().double()
        ratios[name] = float(w.abs().max() / w.std(correction=0).clamp_min(1e-12))
    return ratios


def _optimizer(
    model: nn.Module,
    regularizer: regularizers.Regularizer | None,
    settings: Settings,
    more: Sequence[Mapping[str, Any]] = (),
) -> torch.optim.SGD:
    """Weights decay; biases and norms do not; the regularizer's own parameters neither, and they have no momentum."""
    own = {id(p) for group in more for p in group["params"]}
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in own]
    plain = [p for p in model.parameters() if p.ndim <= 1 and id(p) not in own]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay, "base_lr": settings.lr},
        {"params": plain, "weight_decay": 0.0, "base_lr": settings.lr},
    ]
    groups += [dict(group) for group in more]
    if regularizer and regularizer.parameters:
        groups.append(
            {
                "params": list(regularizer.parameters.values()),
                "weight_decay": 0.0,
                "base_lr": settings.reg_lr,
                "momentum": 0.0,
                "nesterov": False,
            }
        )
    nesterov = settings.momentum > 0
    # Fused: one pass over weights, gradients and momenta, where the plain form makes five.
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=True)


# --- the resume state ----------------------------------------------------------------------------------------------


def _save(run: _Run, history: list[Epoch]) -> None:
    tensors: dict[str, Tensor] = {f"model.{name}": t for name, t in run.model.state_dict().items()}
    if run.average is not None:
        tensors |= {f"average.{name}": t for name, t in run.average.state_dict().items()}
    tensors["rng"] = torch.get_rng_state()
    if run.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(run.device)
    for name, parameter in _named(run).items():
        momentum = run.optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    if run.regularizer:
        tensors |= {f"regularizer.{name}": p for name, p in run.regularizer.parameters.items()}
    meta = {"format": STATE_FORMAT, "identity": run.identity, "history": [asdict(epoch) for epoch in history]}
    checkpoint.save_tensors(run.state, tensors, {"r2_resume": json.dumps(meta)})


def _restore(run: _Run) -> list[Epoch]:
    tensors, metadata = checkpoint.load_tensors(run.state)
    if "r2_resume" not in metadata:
        raise InputError(f"{run.state} is not a resume state: remove it, or start again with --overwrite")
    try:
        meta = json.loads(metadata["r2_resume"])
        _require_same(run.state, meta["identity"], json.loads(json.dumps(run.identity)))
        _load(run, tensors)
        return [Epoch(**epoch) for epoch in meta["history"]]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{run.state} is damaged ({error}): remove it, or start again with --overwrite") from error


@torch.no_grad()
def _load(run: _Run, tensors: Mapping[str, Tensor]) -> None:
    run.model.load_state_dict(_part(tensors, "model."))
    if run.average is not None:
        run.average.load_state_dict(_part(tensors, "average."))
    for name, parameter in (run.regularizer.parameters if run.regularizer else {}).items():
        parameter.copy_(tensors[f"regularizer.{name}"])
    for name, parameter in _named(run).items():
        if f"momentum.{name}" in tensors:
            # In the parameter's own layout: sums over memory then run in the same order as in an unbroken run.
            momentum = torch.empty_like(parameter.detach()).copy_(tensors[f"momentum.{name}"])
            run.optimizer.state[parameter]["momentum_buffer"] = momentum
    torch.set_rng_state(tensors["rng"])
    if "rng.cuda" in tensors and run.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], run.device)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _named(run: _Run) -> dict[str, nn.Parameter]:
    own = run.regularizer.parameters if run.regularizer else {}
    return dict(run.model.named_parameters()) | {f"regularizer of {name}": p for name, p in own.items()}


def _require_same(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for part, value in wanted.items():
        if stored.get(part) == value:
            continue
        old, new = stored.get(part) or {}, value or {}
        changed = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        option = OPTIONS.get(changed, changed.replace("_", "-"))
        raise InputError(
            f"{path} was made with --{option} {old.get(changed)}, not {new.get(changed)}: "
            "resume with the same options, or start again with --overwrite"
        )
