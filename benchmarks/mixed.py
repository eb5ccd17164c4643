"""Which sensitivity spends a budget of bits best: top-1 of the same networks at the same mean bits, for each of them.

python benchmarks/mixed.py FLOAT.safetensors… [--method none] [--bits 4 3 2.5 2.2]
"""

import argparse
from pathlib import Path
from time import perf_counter

import torch

import r2cli
from r2cli import data
from r2cli.ptq import bit_budget, mixed_precision
from r2cli.ptq import quantize as ptq
from r2cli.storage import checkpoint
from r2cli.train import evaluation

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--method", default="none")
    parser.add_argument("--bits", nargs="+", type=float, default=[4.0, 3.0, 2.5, 2.2])
    given = parser.parse_args()
    print("| network | bits | " + " | ".join(mixed_precision.SENSITIVITIES) + " |\n|---|---|---|---|---|")
    for path in given.files:
        made = checkpoint.load(path)
        source = data.load(data.named_in(made.history, made.origin), spec=made.input)
        batches = list(data.calibration(source, 512, CPU, 0))
        found: dict[float, list[str]] = {bits: [] for bits in given.bits}
        for name in mixed_precision.SENSITIVITIES:
            config = r2cli.PtqConfig(
                target_bits=3.0, sensitivity=name, method=given.method, weight_range="mse", device="cpu"
            )
            started = perf_counter()
            losses = bit_budget.measure(
                made, ptq.settings_of(config), ptq.target_of(config), batches, CPU, 0, source.task
            )
            seconds = perf_counter() - started
            for bits in given.bits:
                settings, *_ = bit_budget.chosen(losses, bit_budget.BitTarget(bits, None, name))
                own = r2cli.PtqConfig(
                    weight_bits=settings.weight_bits,
                    keep=settings.keep,
                    method=given.method,
                    weight_range="mse",
                    device="cpu",
                )
                network = r2cli.quantize(made, source, own).network
                found[bits].append(f"{evaluation.evaluate(network, source.test, CPU):.1f}")
            print(f"{path.stem}, {name}: measured in {seconds:.0f} s", flush=True)
        for bits, row in found.items():
            print(f"| {path.stem} | {bits:g} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
