"""Which sensitivity spends a budget of bits best: top-1 of the same networks at the same mean bits, for each of them.

python benchmarks/mixed.py FLOAT.safetensors… [--data imagefolder:DIR] [--method none] [--bits 4 3 2.5 2.2 2]
"""

import argparse
from pathlib import Path
from time import perf_counter

import torch

import r2cli
from r2cli import data
from r2cli.ptq import mixed_precision
from r2cli.storage import checkpoint
from r2cli.train import evaluation

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--method", default="none")
    parser.add_argument("--bits", nargs="+", type=float, default=[4.0, 3.0, 2.5, 2.2, 2.0])
    names = list(mixed_precision.SENSITIVITIES)
    parser.add_argument("--sensitivities", nargs="+", default=names)
    parser.add_argument("--data", help="such as imagefolder:DIR; by itself what the checkpoint was trained on")
    given = parser.parse_args()
    print("| network | bits | " + " | ".join(given.sensitivities) + " |\n|---|---|" + "---|" * len(given.sensitivities))
    for path in given.files:
        made = checkpoint.load(path)
        source = data.load(given.data or data.named_in(made.history, made.origin), spec=made.input)
        found: dict[float, list[str]] = {bits: [] for bits in given.bits}
        for name in given.sensitivities:
            started = perf_counter()
            for bits in given.bits:
                config = r2cli.PtqConfig(
                    target_bits=bits, sensitivity=name, method=given.method, weight_range="mse", device="cpu"
                )
                network = r2cli.quantize(made, source, config).network
                found[bits].append(f"{evaluation.evaluate(network, source.test, CPU):.1f}")
            print(f"{path.stem}, {name}: {perf_counter() - started:.0f} s", flush=True)
        for bits, row in found.items():
            print(f"| {path.stem} | {bits:g} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
