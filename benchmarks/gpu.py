"""What a GPU gives: the tests that are for it, the speed of training, and the paper's effects on CIFAR-10.

    python benchmarks/gpu.py cifar10 --work-dir gpu --output benchmarks/gpu.md         # ten minutes in all
    python benchmarks/gpu.py cifar10 --work-dir toy --toy                              # the same, small, on any machine

`cifar10` is a folder of train/CLASS/*.jpg and test/CLASS/*.jpg. Three parts:

- tests/test_gpu.py on the device.
- Images a second of `pretrain` and `qat`, in float32, in bfloat16 and compiled, beside a bare loop (train.py).
- ResNet-18 and MobileNet-V1 1.0 with L2, L-inf and margin, one seed: rounding to nearest and BRECQ (Table 2), LSQ
  (Tables 3 and 4), and palettes.

Each result is a file in the work directory: a run that was stopped goes on where it was. A cell is not begun after
`--minutes`, and is left empty.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import train

import r2cli
from r2cli import __version__
from r2cli.calibration import deployed
from r2cli.data import Data, KeptSplit, with_fewer, with_test_images
from r2cli.deploy import runtime
from r2cli.storage import checkpoint
from r2cli.train import evaluation, loop

NETWORKS = {"resnet18": None, "mobilenet_v1": 1.0}  # with their width
REGULARIZERS = {"L2": "none", "L-inf": "linf", "margin": "margin"}
BATCH = 256


@dataclass(frozen=True)
class Run:
    """Where the work is done, how large it is, and when it ends."""

    device: torch.device
    folder: Path
    toy: bool
    ends: float

    def kept(self, name: str, work: Callable[[], Any]) -> Any:
        """What the file `name` has, or else what `work` gives, which is written there; None after the end."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            if perf_counter() > self.ends:
                return None
            started = perf_counter()
            path.write_text(json.dumps(work()))
            print(f"{name}: {path.read_text()}, {perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--toy", action="store_true", help="a few images and steps, on the CPU too")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    started = perf_counter()
    chosen.work_dir.mkdir(parents=True, exist_ok=True)
    run = Run(loop.device("auto"), chosen.work_dir, chosen.toy, started + 60 * chosen.minutes)
    if run.device.type != "cuda" and not run.toy:
        sys.exit("torch sees no GPU here: --toy tries the script without one")
    source = r2cli.load_data(f"imagefolder:{chosen.data}")
    if run.toy:
        source = with_test_images(with_fewer(source, 8 * BATCH, 0), BATCH)
    tested = run.kept("tests", lambda: tests(run.device))
    speeds = throughput(run, source)
    rows = [row for name, width in NETWORKS.items() for row in effects(run, source, name, width)]
    text = page(run, tested, speeds, rows, perf_counter() - started)
    print(text)
    if chosen.output:
        chosen.output.write_text(text)


def tests(where: torch.device) -> str:
    """How pytest ends on the device."""
    path = Path(__file__).parent.parent / "tests" / "test_gpu.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=path.parent.parent,
        env={**os.environ, "R2_TEST_DEVICE": where.type},
    )
    return (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]


# --- speed ---------------------------------------------------------------------------------------------------------


def throughput(run: Run, source: Data) -> dict[str, Sequence[float | None]]:
    """Images a second of each kind of training, by network and precision: bare, `pretrain`, compiled, `qat`."""
    assert isinstance(source.train, KeptSplit)
    images, labels = train.in_memory(source, run.device)
    found: dict[str, Sequence[float | None]] = {}
    for name, width in NETWORKS.items():
        case = train.Case(name, width, BATCH, 2 if run.toy else 60)
        for precision in ("float32", "bfloat16"):
            here = run.device, precision
            kinds: dict[str, Callable[[], list[float]]] = {
                "bare": partial(train.bare_steps, train.network(case), case, images, labels, *here),
                "pretrain": partial(train.our_steps, train.network(case), case, source, *here),
                "compiled": partial(train.our_steps, train.network(case), case, source, *here, compile=True),
                "qat": partial(qat_steps, case, source, *here),
            }
            found[f"{name}, {precision}"] = [
                run.kept(f"speed.{name}.{precision}.{kind}", _speed(steps)) for kind, steps in kinds.items()
            ]
    return found


def _speed(steps: Callable[[], list[float]]) -> Callable[[], float]:
    return lambda: BATCH / median(steps())


def qat_steps(case: train.Case, source: Data, where: torch.device, precision: str) -> list[float]:
    """Seconds of steps of LSQ at 4 bits."""
    config = r2cli.QatConfig(
        act_bits="4", epochs=1, batch_size=case.batch, precision=precision, calibration=64, device=str(where)
    )
    clock = train.Clock(where, case.steps)
    with suppress(train.Enough):
        r2cli.finetune(train.network(case), source, config, reporter=train.Watch(clock))
    return clock.steps


# --- the paper's effects -------------------------------------------------------------------------------------------


def effects(run: Run, source: Data, name: str, width: float | None) -> list[dict[str, Any]]:
    """A row for each regularizer: float accuracy, range, and the accuracy of each way to few bits."""
    made = []
    for shown, reg in REGULARIZERS.items():
        path = run.folder / f"{name}-{reg}.safetensors"
        trained = run.kept(f"{name}-{reg}", partial(pretrained, run, source, name, width, reg, path))
        row = {"network": name, "regularizer": shown, **(trained or {})}
        for column, work in WAYS.items() if trained else ():
            cell = f"{name}-{reg}.{column}".replace(" ", "-")
            row[column] = run.kept(cell, partial(work, run, source, path))
        made.append(row)
    return made


def pretrained(run: Run, source: Data, name: str, width: float | None, reg: str, path: Path) -> dict[str, float | None]:
    config = r2cli.PretrainConfig(
        reg=reg,
        epochs=1 if run.toy else 24,
        batch_size=BATCH,
        lr=0.2,
        weight_decay=5e-4,
        warmup=0.2,
        label_smoothing=0.1,
        device=str(run.device),
    )
    model = train.network(train.Case(name, width, BATCH, 0))
    started = perf_counter()
    found = r2cli.pretrain(model, source, config)
    path.write_bytes(found.to_bytes())
    last = found.epochs[-1]
    return {"float": last.top1, "max|w|/std": last.range_mean, "seconds": perf_counter() - started}


def _quantized(bits: int, method: str) -> Callable[[Run, Data, Path], float | None]:
    def work(run: Run, source: Data, path: Path) -> float | None:
        config = r2cli.PtqConfig(
            weight_bits=bits,
            method=method,
            granularity="tensor",
            calibration=64 if run.toy else 1024,
            device=str(run.device),
        )
        return top1(run, source, r2cli.quantize(path, source, config).checkpoint)

    return work


def _finetuned(bits: int) -> Callable[[Run, Data, Path], float | None]:
    def work(run: Run, source: Data, path: Path) -> float | None:
        config = r2cli.QatConfig(
            weight_bits=bits, act_bits=str(bits), epochs=1 if run.toy else 4, batch_size=BATCH, device=str(run.device)
        )
        return top1(run, source, r2cli.finetune(path, source, config).checkpoint)

    return work


def _palettized(bits: int) -> Callable[[Run, Data, Path], float | None]:
    def work(run: Run, source: Data, path: Path) -> float | None:
        config = r2cli.PalettizeConfig(
            bits=bits, method="dkm", epochs=3 if run.toy else 4, batch_size=BATCH, device=str(run.device)
        )
        return top1(run, source, r2cli.palettize(path, source, config).checkpoint)

    return work


WAYS = {
    "W4A8 nearest": _quantized(4, "none"),
    "W3A8 nearest": _quantized(3, "none"),
    "W3A8 BRECQ": _quantized(3, "brecq"),
    "W2A8 BRECQ": _quantized(2, "brecq"),
    "W4A4 LSQ": _finetuned(4),
    "W2A2 LSQ": _finetuned(2),
    "1 bit DKM": _palettized(1),
}


def top1(run: Run, source: Data, made: checkpoint.Checkpoint) -> float | None:
    found = evaluation.of_task(deployed.network(made).to(run.device), source, run.device)
    return None if found is None else found.top1


# --- what is told --------------------------------------------------------------------------------------------------


def page(
    run: Run,
    tested: str | None,
    speeds: dict[str, Sequence[float | None]],
    rows: Sequence[dict[str, Any]],
    seconds: float,
) -> str:
    card = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else runtime.cpu()
    columns = ("float", "max|w|/std", *WAYS)
    size = "toy size: a few images and steps; no number below means anything" if run.toy else "one seed"
    lines = [
        "# On a GPU",
        "",
        f"`python benchmarks/gpu.py`; {card}; r2cli {__version__}, torch {torch.__version__}; CIFAR-10, {size}; "
        f"{seconds / 60:.1f} minutes. Empty: not run in the time.",
        "",
        f"tests/test_gpu.py: {tested}",
        "",
        f"Images a second, batches of {BATCH}; `qat` is LSQ at 4 bits:",
        "",
        "| network | bare loop | pretrain | of bare | compiled | qat | of bare |",
        "|---|---|---|---|---|---|---|",
        *(_speeds(name, cells) for name, cells in speeds.items()),
        "",
        "Top-1 in percent, all layers, one grid a tensor where nothing is trained; torch on the device:",
        "",
        f"| network | regularizer | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
        *(
            f"| {row['network']} | {row['regularizer']} | {' | '.join(_cell(row.get(c)) for c in columns)} |"
            for row in rows
        ),
        "",
    ]
    return "\n".join(lines)


def _speeds(name: str, cells: Sequence[float | None]) -> str:
    bare, ours, compiled, qat = cells
    shares = ["" if one is None or not bare else f"{one / bare:.2f}" for one in (ours, qat)]
    shown = ["" if one is None else f"{one:,.0f}" for one in (bare, ours, compiled, qat)]
    return f"| {name} | {shown[0]} | {shown[1]} | {shares[0]} | {shown[2]} | {shown[3]} | {shares[1]} |"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
