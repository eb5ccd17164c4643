"""Top-1 at a mean number of bits a weight: r2's front beside AIMET's automatic mixed precision and NNCF's HAWQ.

    python benchmarks/mixed_peers.py FLOAT.safetensors… --data imagefolder:cifar10 --work-dir peers [--images 2000]

The environments are those of `peers/run.py`, and so are the float ONNX files and the 512 images that all calibrate on.
Every tool gives points of its own, lines of JSON in the work dir that are not made again. In the table a budget has the
point with the most bits within it: nobody chooses by the test images.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch

import r2cli
from r2cli import data
from r2cli.storage import checkpoint

HERE = Path(__file__).parent
sys.path.append(str(HERE / "peers"))
import run as peers  # noqa: E402

CPU = torch.device("cpu")
TOOLS = ("r2", "aimet tf_enhanced", "aimet min_max", "nncf")
SCRIPTS = {"aimet": "aimet_amp.py", "nncf": "nncf_hawq.py"}
BUDGETS = (8, 6, 5, 4, 3.5, 3, 2.75, 2.5, 2.25, 2)


def job_of(path: Path, own: peers.Network, arguments: argparse.Namespace) -> dict[str, str]:
    """Where the float file and the images are: of the test images so many as are asked for, evenly spread."""
    folder = arguments.work_dir.resolve() / "mixed" / own.name
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = np.load(own.images.images, mmap_mode="r"), np.load(own.images.labels)
    step = max(1, len(labels) // arguments.images)
    source = data.load(arguments.data, spec=checkpoint.load(path).input)
    known = torch.cat([labels for _, labels in data.calibration(source, arguments.calibration, CPU, arguments.seed)])
    held = {"images": np.ascontiguousarray(images[::step]), "labels": labels[::step], "known": known.numpy()}
    for name, values in held.items():
        np.save(folder / f"{name}.npy", values)
    job = {name: str(folder / f"{name}.npy") for name in held}
    return {**job, "model": str(own.onnx.resolve()), "calibration": str(own.images.calibration.resolve())}


def of_r2(path: Path, job: dict[str, str], arguments: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Every budget by r2's default choice, rounded to nearest on ranges of least error."""
    made = checkpoint.load(path)
    source = data.with_test_images(data.load(arguments.data, spec=made.input), 1)  # the accuracy is measured here
    images, labels = torch.from_numpy(np.load(job["images"])), torch.from_numpy(np.load(job["labels"]))
    for budget in BUDGETS:
        config = r2cli.PtqConfig(
            target_bits=budget, weight_range="mse", calibration=arguments.calibration, seed=arguments.seed, device="cpu"
        )
        found = r2cli.quantize(made, source, config)
        network, count = found.network.eval(), {row.layer: prod(row.shape) for row in found.layers}
        mean = sum(count[row.layer] * row.bits for row in found.bits) / sum(count.values())
        with torch.no_grad():
            right: int = sum(
                int((network(part).argmax(1) == known).sum())
                for part, known in zip(torch.split(images, 250), torch.split(labels, 250), strict=True)
            )
        yield {"bits": mean, "top1": 100 * right / len(labels)}


def of_peer(tool: str, job: dict[str, str], arguments: argparse.Namespace) -> Iterator[dict[str, float]]:
    peer, _, scheme = tool.partition(" ")
    order = Path(job["images"]).with_name(f"{peer}.json")
    order.write_text(json.dumps({**job, "scheme": scheme, "budgets": BUDGETS}))
    command = [peers.python_of(peer, arguments.work_dir), HERE / "peers" / SCRIPTS[peer], order]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=peers._one_thread(), check=True)
    yield from (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"bits"'))


def points(tool: str, path: Path, job: dict[str, str], arguments: argparse.Namespace) -> list[dict[str, float]]:
    kept = Path(job["images"]).with_name(f"{tool.replace(' ', '-')}.jsonl")
    if not kept.exists():
        found = of_r2(path, job, arguments) if tool == "r2" else of_peer(tool, job, arguments)
        lines = [json.dumps(point) + "\n" for point in found]
        kept.write_text("".join(lines))
    return [json.loads(line) for line in kept.read_text().splitlines()]


def cell(found: list[dict[str, float]], budget: float) -> str:
    within = [point for point in found if point["bits"] <= budget + 1e-9]
    if not within:
        return ""
    point = max(within, key=lambda point: point["bits"])
    return f"{point['top1']:.1f} ({point['bits']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--tools", nargs="+", default=TOOLS)
    arguments = parser.parse_args(namespace=argparse.Namespace(calibration=512, seed=0))
    print("| network | bits | " + " | ".join(arguments.tools) + " |\n|---" + "|---" * (len(arguments.tools) + 1) + "|")
    for path in arguments.files:
        own = peers.network(path, arguments)
        job = job_of(path, own, arguments)
        found = [points(tool, path, job, arguments) for tool in arguments.tools]
        for budget in BUDGETS:
            cells = [cell(each, budget) for each in found]
            print(f"| {path.stem} | {budget:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
