"""Two bits learned from labels, from the float network's own outputs, and from both: MobileNet-V1 0.25 on CIFAR-10.

The float network is trained first. Then `r2 qat` goes on from it with weights of 2 bits, and activations of 2 and of 8:
with labels, with `--loss distill`, which reads no label, and with labels and `--distill 1`. All runs of a kind have the
same images, epochs, rate and seed; the number of runs a cell is one.

    mkdir cifar10 && tar xzf cifar10.tar.gz -C cifar10
    python benchmarks/distill.py --data cifar10 --work-dir distill --output benchmarks/distill.md

The checkpoints and one JSON file a run stand in the work directory: a run that was stopped goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2cli import __version__

LEARNED = {
    "labels": (),
    "the float network alone (`--loss distill`)": ("--loss", "distill"),
    "both (`--distill 1`)": ("--distill", "1"),
}
ACTIVATIONS = ("8", "2")


def told(work: Path, name: str, command: list[str]) -> dict[str, Any]:
    """What `r2 COMMAND --json` prints: from the work directory, where it has run before."""
    kept = work / f"{name}.json"
    if not kept.exists():
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        ran = [sys.executable, "-m", "r2cli", *command, "--json", "--resume", "-o", str(work / f"{name}.safetensors")]
        done = subprocess.run(ran, stdout=subprocess.PIPE, text=True, env=variables)
        if done.returncode:
            sys.exit(f"{name} ended with {done.returncode}")
        kept.write_text(done.stdout)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def part_of(folder: Path, work: Path, counts: Mapping[str, int]) -> Path:
    """A folder of links to the first images of each class of `folder`: as many of each half as `counts` says."""
    part = work / "images"
    for half, count in counts.items():
        for kind in sorted((folder / half).iterdir()):
            own = part / half / kind.name
            own.mkdir(parents=True, exist_ok=True)
            files = sorted(kind.iterdir())
            for file in files[: count // 10]:
                link = own / file.name
                if not link.is_symlink():
                    link.symlink_to(file.resolve())
    return part


def measured(options: argparse.Namespace) -> tuple[float, dict[tuple[str, str], float]]:
    """Top-1 in percent: of the float network, and of each way of learning with each number of bits of activations."""
    work: Path = options.work_dir
    work.mkdir(parents=True, exist_ok=True)
    counts = {"train": options.images, "test": options.test}
    common = ["--batch-size", "128", "--data", f"imagefolder:{part_of(options.data, work, counts)}"]
    start = ["pretrain", "--model", "mobilenet_v1", "--width", "0.25", "--lr", "0.2", "--epochs", str(options.epochs)]
    base = told(work, "float", [*start, *common])["top1"]
    found = {}
    for bits in ACTIVATIONS:
        for place, (name, learned) in enumerate(LEARNED.items()):
            run = ["qat", str(work / "float.safetensors"), "--weight-bits", "2", "--act-bits", bits, "--lr", "0.05"]
            run += ["--epochs", str(options.quantized), *learned, *common]
            found[name, bits] = told(work, f"w2a{bits}-{place}", run)["top1"]
    return base, found


def page(options: argparse.Namespace, base: float, found: dict[tuple[str, str], float]) -> str:
    rows = [f"| {name} | " + " | ".join(f"{found[name, bits]:.2f}" for bits in ACTIVATIONS) + " |" for name in LEARNED]
    return "\n".join(
        [
            "# Two bits with and without labels",
            "",
            f"MobileNet-V1 0.25 on {options.images:,} of CIFAR-10's 50,000 training images, {options.epochs} epochs in "
            f"float: top-1 {base:.2f} % on {options.test:,} of its test images. Then {options.quantized} epochs of "
            "`r2 qat --weight-bits 2` (lsq), batch 128, one seed, one run a cell.",
            "",
            "| learned from | W2A8, top-1 % | W2A2, top-1 % |",
            "|---|---|---|",
            *rows,
            "",
            f"r2cli {__version__}; `python benchmarks/distill.py --images {options.images} --test {options.test} "
            f"--epochs {options.epochs} --quantized {options.quantized}`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("cifar10"), help="the folder with train and test in it")
    parser.add_argument("--work-dir", type=Path, default=Path("distill"))
    parser.add_argument("--images", type=int, default=50000, help="training images")
    parser.add_argument("--test", type=int, default=10000, help="test images")
    parser.add_argument("--epochs", type=int, default=30, help="of the float network")
    parser.add_argument("--quantized", type=int, default=20, help="epochs of each quantized one")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = page(options, *measured(options))
    if options.output:
        options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
