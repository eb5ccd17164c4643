"""A training run alone, and beside others on the same cores: with OpenMP's own waiting threads, and with r2's.

A thread that waits for the others of its step spins, 300,000 times by default, before it sleeps. Where another program
wants the cores, it so takes the time that those others need. `r2` makes it 10,000. All take turns.

    python benchmarks/shared_cores.py --output benchmarks/shared_cores.md        # some five minutes
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import environment
import torch

from r2cli import __version__
from r2cli.cli.main import SPINS as OURS
from r2cli.deploy import runtime

SPINS = {"OpenMP's": "300000", "r2's": OURS}
ALONE, TWICE, BESIDE = "alone", "two at once, each", "beside one of a single thread on each core"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    speeds: dict[tuple[str, str], list[float]] = {}
    for _ in range(chosen.rounds):
        for whose, spins in SPINS.items():
            speeds.setdefault((ALONE, whose), []).append(trained(spins))
            with ThreadPoolExecutor(2) as both:
                speeds.setdefault((TWICE, whose), []).extend(both.map(trained, (spins, spins)))
            with tempfile.TemporaryDirectory() as folder:
                others = [endless(Path(folder, f"{core}.safetensors")) for core in os.sched_getaffinity(0)]
                speeds.setdefault((BESIDE, whose), []).append(trained(spins))
                for other in others:
                    other.kill()
                    other.wait()
    rows = []
    for where in (ALONE, TWICE, BESIDE):
        theirs, ours = (median(speeds[where, whose]) for whose in SPINS)
        rows.append(f"| {where} | {theirs:,.0f} | {ours:,.0f} | {ours / theirs:.2f} |")
    text = "\n".join(
        [
            "# Training on cores that others use too",
            "",
            f"`r2 pretrain`, the default network on digits, {torch.get_num_threads()} threads; {runtime.cpu()}; "
            f"medians of {chosen.rounds} rounds, in turn; r2cli {__version__}, torch {torch.__version__}.",
            "",
            "| | spinning as OpenMP does, images/s | as r2 has it | ratio |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text)
    if chosen.output:
        chosen.output.write_text(text)


def endless(output: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "r2cli", "pretrain", "--epochs", "100000", "-o", str(output)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def trained(spins: str) -> float:
    """Images a second in the last epoch of three."""
    variables = {**os.environ, "GOMP_SPINCOUNT": spins}
    variables.pop("OMP_NUM_THREADS", None)
    return environment.images_per_second(["--epochs", "3"], variables)


if __name__ == "__main__":
    main()
