"""`r2 pretrain` in two processes beside one, on a folder of photographs as large as ImageNet's (500 x 375 JPEGs).

A photograph is a mosaic of twelve of CIFAR-10's, enlarged: as many pixels to decode, crop and resize as ImageNet's.
One process has all cores' threads, each of two has half of them; the batch of all together is the same. What is told is
the second epoch, decoding included. Runs of one and of two processes take turns.

    mkdir cifar10 && tar xzf cifar10.tar.gz -C cifar10
    python benchmarks/processes.py cifar10 --output benchmarks/processes.md      # some six minutes
"""

import argparse
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import environment
import torch
from PIL import Image

from r2cli import __version__
from r2cli.deploy import runtime

SIZE, GRID, TILE = (500, 375), (4, 3), 125  # pixels, photographs in a mosaic, pixels of each
BATCH, CLASSES = 32, 10


@dataclass(frozen=True)
class Case:
    model: str
    options: Sequence[str]
    images: int  # an epoch


CASES = (Case("mobilenet_v1", ("--width", "0.25"), 1536), Case("resnet18", (), 384))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as made:
        for case in CASES:
            where = Path(made, case.model)
            photographs(chosen.folder / "train", where, case.images)
            speeds: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(chosen.rounds):
                for processes, found in speeds.items():
                    found.append(trained(case, where, processes))
            one, two = median(speeds[1]), median(speeds[2])
            rows.append(f"| {case.model} | {one:.1f} | {two:.1f} | {two / one:.2f} |")
    text = "\n".join(
        [
            "# Two processes beside one, on photographs of ImageNet's size",
            "",
            "`torchrun --nproc-per-node 2 -m r2cli pretrain --data imagefolder:…`: 500 x 375 JPEGs, decoded anew in "
            f"each epoch, 224 pixels, batches of {BATCH} in all, two loading workers a process; {runtime.cpu()}, "
            f"{os.cpu_count()} cores; medians of {chosen.rounds} runs each, in turn; r2cli {__version__}, torch "
            f"{torch.__version__}.",
            "",
            "| network | one process, images/s | two, images/s | ratio |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text)
    if chosen.output:
        chosen.output.write_text(text)


def photographs(source: Path, where: Path, count: int) -> None:
    """`count` mosaics to train on in `where`, and one a class to test on."""
    rng = random.Random(0)
    tiles = sorted(source.glob("*/*.jpg"))
    for half, each in (("train", count // CLASSES), ("val", 1)):
        for label in range(CLASSES):
            folder = where / half / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(each):
                mosaic = Image.new("RGB", SIZE)
                for cell, tile in enumerate(rng.sample(tiles, GRID[0] * GRID[1])):
                    with Image.open(tile) as photograph:
                        large = photograph.resize((TILE, TILE), Image.Resampling.BICUBIC)
                    mosaic.paste(large, (cell % GRID[0] * TILE, cell // GRID[0] * TILE))
                mosaic.save(folder / f"{number}.jpg", quality=90)


def trained(case: Case, folder: Path, processes: int) -> float:
    """Images a second in the second epoch of a run in so many processes."""
    options = ["--model", case.model, *case.options, "--data", f"imagefolder:{folder}", "--size", "224"]
    options += ["--epochs", "2", "--batch-size", str(BATCH), "--reg", "margin"]
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    return environment.images_per_second(options, {**os.environ, "OMP_NUM_THREADS": threads}, launcher)


if __name__ == "__main__":
    main()
