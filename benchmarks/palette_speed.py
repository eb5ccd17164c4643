"""Palettized files in ONNX Runtime beside the float file of the same network: time, size, and what runs on integers.

    r2 palettize resnet20.safetensors --bits 2 --lut-bits 8 --act-bits 8 -o resnet20.b2d1.safetensors
    python benchmarks/palette_speed.py resnet20.safetensors resnet20.b2d1.safetensors --output palette_speed.md

The first checkpoint is the float one. One image, one thread; all files take turns in one process, in a random order in
every round, and the least time of each counts. 'inlined' is the time over that of the same file without functions.
"""

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import torch
from onnx_speed import COUNTED, FLOAT_LAYERS, least_ms, machine, table

import r2cli
from r2cli import __version__
from r2cli.deploy import runtime
from r2cli.storage import checkpoint

COLUMNS = ["file", "bytes", "ms", "/ float32", *COUNTED, "float layers"]


def rows(given: list[Path], folder: Path, rounds: int) -> list[list[str]]:
    """The table's rows of one network: its float checkpoint, then its palettized ones."""
    loaded = [checkpoint.load(path) for path in given]
    paths = [folder / f"{path.stem}.onnx" for path in given]
    for path, made in zip(paths, loaded, strict=True):
        r2cli.export(made, path)
    image = torch.randn(1, *loaded[0].input.shape, generator=torch.Generator().manual_seed(0))
    least = least_ms({str(path): runtime.runner(path, threads=1) for path in paths}, rounds, image)
    found = []
    for path in paths:
        counts, own = runtime.node_counts(path), least[str(path)]
        left = sum(counts.get(operator, 0) for operator in FLOAT_LAYERS)
        nodes = [str(counts.get(operator, 0)) for operator in COUNTED]
        cells = [f"{path.stat().st_size:,}", f"{own:.2f}", f"{own / least[str(paths[0])]:.2f}", *nodes, str(left)]
        found.append([path.stem, *cells])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of palettized ONNX files beside the float one.")
    parser.add_argument("files", nargs="+", type=Path, help="checkpoints of one network, the float one first")
    parser.add_argument("--output", type=Path, help="also add the table to this file")
    parser.add_argument("--rounds", type=int, default=200, help="timed runs of every file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        content = rows(arguments.files, Path(folder), arguments.rounds)
    head = (
        f"{machine()} ({runtime.cpu()}), 1 thread, batch 1, least of {arguments.rounds} runs in turn; "
        f"r2cli {__version__}, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}."
    )
    text = f"{head}\n\n{table(COLUMNS, content)}\n"
    print(text)
    if arguments.output:
        with arguments.output.open("a") as output:
            output.write(f"\n{text}")


if __name__ == "__main__":
    main()
