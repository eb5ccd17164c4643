"""What a range regularizer adds to a training step: closed-form gradients against the same loss through autograd.

ResNet-18 on 64 random images of 32x32 in float32: with the CIFAR stem, where a step is long, and with the ImageNet
stem, where it is ten times shorter and the weights are the same. The step is that of `r2cli.train`: channels last,
forward, backward, regularizer, SGD with Nesterov momentum. "ours" is train/regularizers.py in its stable form, which
adds gradients to `.grad` after the backward pass; "autograd" is the obvious formulation of the same loss, added to the
task's before it. Both give the same gradients, which is checked before anything is timed.

All variants take turns on one network, in a random order in every round. Times are CPU time on one thread, so that
other work on the machine counts little; a ratio is the median of a variant's steps over the median of the plain ones.

    python benchmarks/regularizers.py --output benchmarks/regularizers.md        # some fifteen minutes
"""

import argparse
import platform
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time

import torch
from torch import Tensor, nn

import r2cli
from r2cli import __version__, models, registry
from r2cli.storage.checkpoint import ModelSpec
from r2cli.train import loop
from r2cli.train.loop import TrainSettings
from r2cli.train.regularizers import Regularizer, columns

BATCH, SIZE, CLASSES, WARM_UP = 64, 32, 10, 2
STEMS = {"small": "CIFAR stem", "imagenet": "ImageNet stem"}
VARIANTS = (("linf", 1), ("margin", 1), ("soft-minmax", 1), ("kure", 1), ("margin", 2))
SETTINGS = TrainSettings(
    epochs=1,
    batch_size=BATCH,
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
    warmup=0.0,
    label_smoothing=0.0,
    reg_lr=0.01,
    seed=0,
)
criterion = nn.CrossEntropyLoss()


# --- through autograd: the formulas of `range_penalties.py` ----------------------------------------------------------


def penalty(regularizer: Regularizer) -> Tensor:
    """strength * R of every weight, with a graph."""
    setting, parts = regularizer.setting, []
    for name, w in regularizer.weights.items():
        own = regularizer.parameters.get(name, w.new_zeros(setting.dim))
        if regularizer.own.least is not None:  # the floor of the stable form, through which the slope goes
            own = own + (own.clamp(min=regularizer.own.least) - own).detach()
        assert regularizer.own.reference is not None
        parts += [
            regularizer.own.reference(column, one, setting)
            for column, one in zip(columns(w, setting.dim), own.unbind(), strict=True)
        ]
        parts += [regularizer.own.once(own)[0]] if regularizer.own.once is not None else []
    return setting.strength * torch.stack(parts).sum()


# --- the step --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to train `model`: plain, with a regularizer of ours, or with the same one through autograd."""

    model: nn.Module
    regularizer: Regularizer | None
    autograd: bool
    optimizer: torch.optim.Optimizer

    def gradients(self, images: Tensor, labels: Tensor) -> None:
        loss = criterion(self.model(images), labels)
        if self.regularizer and self.autograd:
            loss = loss + penalty(self.regularizer)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.regularizer and self.autograd:
            least = self.regularizer.own.least
            for parameter in self.regularizer.parameters.values():  # the stable form, by hand
                assert parameter.grad is not None
                if self.regularizer.setting.name == "margin":
                    parameter.grad.clamp_(-self.regularizer.setting.strength, self.regularizer.setting.strength)
                if least is not None:
                    parameter.grad.copy_(torch.where(parameter > least, parameter.grad, parameter.grad.clamp(max=0)))
        elif self.regularizer:
            self.regularizer.add_gradients()

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.gradients(images, labels)
        self.optimizer.step()


def variant(model: nn.Module, name: str, dim: int, *, autograd: bool) -> Variant:
    regularizer = None
    if name != "none":
        strength = registry.default_strength(name, size=SIZE, images=50_000)
        regularizer = r2cli.regularizer(model, name, strength, dim=dim)
    return Variant(model, regularizer, autograd, loop.optimizers(model, regularizer, SETTINGS, None)[0])


def require_equal(ours: Variant, theirs: Variant, images: Tensor, labels: Tensor) -> None:
    """Fail unless both give every weight and parameter the same gradient, to float32's sums."""
    found = []
    for one in (ours, theirs):
        assert one.regularizer
        one.optimizer.zero_grad(set_to_none=True)
        one.gradients(images, labels)
        tensors = [*one.regularizer.weights.values(), *one.regularizer.parameters.values()]
        assert all(t.grad is not None for t in tensors)
        found.append([t.grad.clone() for t in tensors if t.grad is not None])
    for a, b in zip(*found, strict=True):
        error, scale = float((a - b).abs().max()), float(b.abs().max())
        name = ours.regularizer.setting.name if ours.regularizer else ""
        assert error <= 1e-4 * scale, f"{name}: gradients differ by {error:.1e} of {scale:.1e}"


def medians(stem: str, rounds: int) -> dict[tuple[str, int, bool], float]:
    """Median ms of a step by (regularizer, dim, through autograd)."""
    torch.manual_seed(0)
    model = models.build(ModelSpec("resnet18", CLASSES, stem=stem)).train()
    model.to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (BATCH,))
    kinds = [("none", 1, False), *((name, dim, how) for name, dim in VARIANTS for how in (False, True))]
    variants = {kind: variant(model, kind[0], kind[1], autograd=kind[2]) for kind in kinds}
    for name, dim in VARIANTS:
        require_equal(variants[name, dim, False], variants[name, dim, True], images, labels)
    times: dict[tuple[str, int, bool], list[float]] = {kind: [] for kind in kinds}
    order = random.Random(0)
    for number in range(WARM_UP + rounds):
        for kind in order.sample(kinds, len(kinds)):
            start = process_time()
            variants[kind].step(images, labels)
            if number >= WARM_UP:
                times[kind].append(1000 * (process_time() - start))
    return {kind: median(own) for kind, own in times.items()}


def table(columns: list[str], content: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *content])


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a training step with each regularizer over a plain step.")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of every variant")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {stem: medians(stem, arguments.rounds) for stem in STEMS}
    rows = [
        ["none", *(f"{found[stem]['none', 1, False]:.0f} ms" if not how else "" for stem in STEMS for how in (0, 1))]
    ]
    for name, dim in VARIANTS:
        ratios = [
            found[stem][name, dim, how] / found[stem]["none", 1, False] for stem in STEMS for how in (False, True)
        ]
        rows.append([name if dim == 1 else f"{name}, dim {dim}", *(f"{ratio:.2f}" for ratio in ratios)])
    text = "\n\n".join(
        [
            "# A training step with a regularizer, over a plain one",
            f"ResNet-18, batch {BATCH}, {SIZE}x{SIZE}, float32; {machine()}, 1 thread, "
            f"medians of {arguments.rounds} steps in turn, CPU time; r2cli {__version__}, torch {torch.__version__}.",
            table(
                ["regularizer", *(f"{title}, {how}" for title in STEMS.values() for how in ("ours", "autograd"))], rows
            ),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
