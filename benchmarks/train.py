"""What `r2 pretrain` leaves of a bare training loop's speed, on CIFAR-10 as a folder of JPEGs.

"ours" is `r2cli.pretrain` on the folder's 50,000 images, which is what the command calls: shuffled, shifted and
mirrored, normalised, with schedule, progress and the epoch's books. "bare" is the loop that everybody writes first,
with nothing of that, over the same images as normalised float32 tensors in memory. Both train channels last with SGD,
Nesterov momentum and weight decay, on the same batches' size and the same threads (or the GPU, where there is one).

They take turns on the same machine: a round is some steps of one, then of the other. The ratio is bare's median time of
a step over ours. Decoding all images, which ours does once in a run, is told beside it.

    mkdir cifar10 && tar xzf cifar10.tar.gz -C cifar10
    python benchmarks/train.py cifar10 --output benchmarks/train.md              # some five minutes
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

import r2cli
from r2cli import __version__, models
from r2cli.data import Data, KeptSplit
from r2cli.deploy import runtime
from r2cli.train import loop

WARM_UP = 2  # steps of a round that are not counted


@dataclass(frozen=True)
class Case:
    name: str
    width: float | None
    batch: int
    steps: int  # a round


CASES = (Case("mobilenet_v1", 0.25, 128, 40), Case("resnet20", None, 128, 20), Case("resnet18", None, 128, 6))


class Enough(Exception):
    """Stops a training run after the steps that are measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    where = loop.device(chosen.device)
    source = r2cli.load_data(f"imagefolder:{chosen.folder}")
    assert isinstance(source.train, KeptSplit)
    started = perf_counter()
    source.train.require(torch.arange(len(source.train)))
    decoding = perf_counter() - started
    images, labels = in_memory(source, where)
    what = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{runtime.cpu()}, {threads()}"
    rows = [measure(case, source, images, labels, where, chosen.rounds) for case in CASES]
    text = "\n".join(
        [
            "# `r2 pretrain` against a bare training loop",
            "",
            f"CIFAR-10, {len(source.train):,} JPEGs in a folder; {what}; medians over {chosen.rounds} rounds each, in "
            f"turn; r2cli {__version__}, torch {torch.__version__}. Decoding all, once in a run: {decoding:.1f} s.",
            "",
            "| network | batch | bare, images/s | `pretrain`, images/s | ratio |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text)
    if chosen.output:
        chosen.output.write_text(text)


def threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


def in_memory(source: Data, where: torch.device) -> tuple[Tensor, Tensor]:
    """All training images as the network takes them, float32 (n, 3, 32, 32), and their labels."""
    pairs = list(source.train.batches(4096, torch.device("cpu")))
    images = torch.cat([images for images, _ in pairs]).contiguous(memory_format=torch.channels_last)
    return images.to(where), torch.cat([labels for _, labels in pairs]).to(where)


def measure(case: Case, source: Data, images: Tensor, labels: Tensor, where: torch.device, rounds: int) -> str:
    """One row: images a second of the two loops and their ratio."""
    ours: list[float] = []
    bare: list[float] = []
    for _ in range(rounds):
        bare += bare_steps(network(case), case, images, labels, where)
        ours += our_steps(network(case), case, source, where)
    speeds = [case.batch / median(times) for times in (bare, ours)]
    name = f"{case.name} {case.width:g}" if case.width else case.name
    return f"| {name} | {case.batch} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {speeds[1] / speeds[0]:.2f} |"


def network(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return models.build(models.spec(case.name, classes=10, channels=3, size=32, width=case.width))


def bare_steps(
    model: nn.Module, case: Case, images: Tensor, labels: Tensor, where: torch.device, precision: str = "float32"
) -> list[float]:
    model.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=4e-5)
    criterion = nn.CrossEntropyLoss()
    model.train()
    order = torch.randperm(len(labels), device=where)
    clock = Clock(where, case.steps)
    for index in torch.split(order, case.batch)[: WARM_UP + case.steps]:
        optimizer.zero_grad()
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = criterion(model(images[index]), labels[index])
        loss.backward()
        optimizer.step()
        clock.tick()
    return clock.steps


def our_steps(
    model: nn.Module,
    case: Case,
    source: Data,
    where: torch.device,
    precision: str = "float32",
    compile: bool = False,
) -> list[float]:
    config = r2cli.PretrainConfig(
        epochs=1,
        batch_size=case.batch,
        lr=0.01,
        momentum=0.9,
        weight_decay=4e-5,
        warmup=0.0,
        label_smoothing=0.0,
        precision=precision,
        compile=compile,
        device=str(where),
    )
    clock = Clock(where, case.steps)
    try:
        r2cli.pretrain(model, source, config, reporter=Watch(clock))
    except Enough:
        pass
    return clock.steps


@dataclass
class Watch:
    """Whom `pretrain` tells of its steps: a clock, which ends the run."""

    clock: "Clock"

    def note(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator["Watch"]:
        yield self

    def advance(self, steps: int = 1) -> None:
        if steps and self.clock.tick():
            raise Enough

    def line(self, text: str) -> None:
        pass


class Clock:
    """Seconds of each step after the first ones."""

    def __init__(self, where: torch.device, wanted: int) -> None:
        self.wait: Callable[[], object] = torch.cuda.synchronize if where.type == "cuda" else lambda: None
        self.steps: list[float] = []
        self.wanted, self.seen, self.last = wanted, 0, perf_counter()

    def tick(self) -> bool:
        """Count a step; whether it was the last that is wanted."""
        self.wait()
        now = perf_counter()
        if self.seen >= WARM_UP:
            self.steps.append(now - self.last)
        self.seen, self.last = self.seen + 1, now
        return len(self.steps) == self.wanted


if __name__ == "__main__":
    main()
