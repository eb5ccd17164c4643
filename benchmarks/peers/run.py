"""Other tools on the float models that r2 is measured on: accuracy, time, memory, bytes and speed of what they make.

One command runs a peer's cells, one after the other. It makes the peer's virtual environment under --work-dir, writes
the float ONNX file of every checkpoint (as `r2 export` does) and the images as .npy files (r2's data path, so that all
tools see the same pixels), and runs each cell in a process of its own with one thread. The file that comes out is then
run in this environment's ONNX Runtime, one thread: top-1 on the test split without images that were calibrated on, and
the time of one image beside the float file's, in turns. Results are JSON lines; cells that are there and did not fail
are not run again. --table prints them.

    python benchmarks/peers/run.py --peer ort   --checkpoint *.safetensors --data imagefolder:cifar10 --work-dir peers
    python benchmarks/peers/run.py --peer aimet --checkpoint *.safetensors --data imagefolder:cifar10 --work-dir peers
    python benchmarks/peers/run.py --table --work-dir peers

--beside-r2 runs `r2 ptq --method brecq`'s work in the same minute, behind each cell of AdaRound, and records the ratio
of the times.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnxruntime
import torch

import r2cli
from r2cli import data
from r2cli.deploy import runtime
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import InputSpec

HERE = Path(__file__).parent
CHANNEL, TENSOR, UNFOLDED = "channel", "tensor", "unfolded"
R2 = "r2"


@dataclass(frozen=True)
class Cell:
    """What is asked of a tool. `steps` is AdaRound's, a layer; None is the tool's default. `keep` is r2's option."""

    weight_bits: int
    granularity: str
    method: str
    steps: int | None = None
    act_bits: int = 8
    keep: tuple[str, ...] = ()

    def __str__(self) -> str:
        steps = "".join(f"-{one}" for one in (self.steps, *self.keep) if one)
        return f"w{self.weight_bits}a{self.act_bits}-{self.granularity}-{self.method}{steps}"


def every(methods: Sequence[str], bits: Sequence[int] = (8, 4, 3, 2)) -> list[Cell]:
    return [Cell(b, granularity, method) for method in methods for b in bits for granularity in (CHANNEL, TENSOR)]


ADAROUND = [
    *(Cell(4, CHANNEL, "adaround", steps) for steps in (200, 500)),
    *(Cell(bits, CHANNEL, "adaround", 500) for bits in (3, 2)),
    Cell(4, TENSOR, "adaround", 500),
    Cell(4, TENSOR, "cle+adaround", 500),
]
CELLS: Mapping[str, Sequence[Cell]] = {
    "ort": every(["nearest"]),
    "aimet": [
        *every(["nearest", "cle"]),
        *every(["seqmse"], bits=(4, 3, 2)),
        *ADAROUND,
        Cell(4, CHANNEL, "adaround"),
        *(Cell(bits, CHANNEL, "adaround", 1000, act_bits=4) for bits in (4, 2)),
    ],
    R2: [
        *every(["none", "dfq"]),
        *(Cell(bits, UNFOLDED, method) for method in ("none", "brecq") for bits in (8, 4, 3, 2)),
        *every(["brecq", "adaround"], bits=(4, 3, 2)),
        *(Cell(bits, granularity, "auto") for granularity in (CHANNEL, TENSOR) for bits in (8, 4, 3, 2)),
        *(Cell(bits, CHANNEL, method, act_bits=4) for bits in (4, 2) for method in ("brecq", "brecq+qdrop")),
    ],
}


# --- what goes in --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Where the images lie: calibration.npy, images.npy and labels.npy of one preprocessing."""

    calibration: Path
    images: Path
    labels: Path


def write_images(name: str, spec: InputSpec, count: int, seed: int, work: Path) -> Images:
    """The `count` images that `r2 ptq --seed` calibrates on, and the other images of the test split."""
    asked = {"data": name, "spec": dataclasses.asdict(spec), "count": count, "seed": seed, "unseen": True}
    folder = work / "images" / hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    found = Images(folder / "calibration.npy", folder / "images.npy", folder / "labels.npy")
    done = folder / "done.json"
    if done.exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    cpu = torch.device("cpu")
    loaded = r2cli.load_data(name, spec=spec)
    batches = list(loaded.test.batches(250, cpu))
    calibration = _joined([images for images, _ in data.calibration(loaded, count, cpu, seed)])
    images, labels = _joined([images for images, _ in batches]), torch.cat([labels for _, labels in batches]).numpy()
    # A method that learns knows its images by heart: at two bits 76 % of them were right, and 8 % of others.
    seen = {image.tobytes() for image in calibration}
    unseen = [place for place, image in enumerate(images) if image.tobytes() not in seen]
    np.save(found.calibration, calibration)
    np.save(found.images, images[unseen])
    np.save(found.labels, labels[unseen])
    done.write_text(json.dumps(asked))
    return found


def _joined(batches: Sequence[torch.Tensor]) -> Any:
    return torch.cat(list(batches)).contiguous().numpy()


@dataclass(frozen=True)
class Network:
    """A checkpoint, its float ONNX file and what that reaches."""

    name: str
    checkpoint: Path
    sha: str
    onnx: Path
    images: Images
    float_top1: float
    code: str = ""


def network(path: Path, arguments: argparse.Namespace) -> Network:
    sha = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    folder = arguments.work_dir / "float"
    onnx, told = folder / f"{path.stem}-{sha}.onnx", folder / f"{path.stem}-{sha}.json"
    made = checkpoint.load(path)
    assert isinstance(made.input, InputSpec), "a network of images"
    images = write_images(arguments.data, made.input, arguments.calibration, arguments.seed, arguments.work_dir)
    if not told.exists():
        folder.mkdir(parents=True, exist_ok=True)
        r2cli.export(made, onnx)
        top1 = common.top1(common.runner(onnx), np.load(images.images, mmap_mode="r"), np.load(images.labels))
        told.write_text(json.dumps({"top1": top1}))
    return Network(path.stem, path.resolve(), sha, onnx, images, json.loads(told.read_text())["top1"])


def python_of(peer: str, work: Path) -> Path:
    """The interpreter of the peer's own environment, made if it is not there; r2's is this one."""
    if peer == R2:
        return Path(sys.executable)
    wanted = HERE / f"requirements-{peer}.txt"
    folder = work.resolve() / "env" / peer
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if not done.exists() or done.read_text() != wanted.read_text():
        print(f"making {folder} from {wanted.name}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", wanted], check=True, stdout=sys.stderr)
        done.write_text(wanted.read_text())
    return python


# --- a cell --------------------------------------------------------------------------------------------------------


def run(peer: str, own: Network, cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantize in a process of the peer's on one core, then measure the file here: one result."""
    folder = arguments.work_dir.resolve() / "files"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"{own.name}-{own.sha}.{peer}.{cell}.onnx"
    output.unlink(missing_ok=True)
    job = common.Job(
        model=str(own.onnx.resolve()),
        checkpoint=str(own.checkpoint),
        calibration=str(own.images.calibration.resolve()),
        images=str(own.images.images.resolve()),
        labels=str(own.images.labels.resolve()),
        output=str(output),
        code=own.code,
        **vars(cell),
    )
    order = output.with_suffix(".json")
    order.write_text(json.dumps(vars(job)))
    command = ["nice", "-n", str(arguments.nice), str(python_of(peer, arguments.work_dir)), str(HERE / f"{peer}.py")]
    done = subprocess.run([*command, str(order)], capture_output=True, text=True, env=_one_thread(), cwd=folder)
    result: dict[str, Any]
    if done.returncode:
        result = {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    else:
        result = json.loads(done.stdout.strip().splitlines()[-1])
    if output.exists() and "failed" not in result and "refused" not in result:
        result |= measure(output, own, arguments.rounds)
    return result


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def measure(path: Path, own: Network, rounds: int) -> dict[str, Any]:
    """Accuracy, bytes and speed of a file in ONNX Runtime."""
    images, labels = np.load(own.images.images, mmap_mode="r"), np.load(own.images.labels)
    runs = {"float": common.runner(own.onnx), "file": common.runner(path)}
    least = common.least_ms(runs, np.ascontiguousarray(images[:1]), rounds)
    return {
        "top1": common.top1(runs["file"], images, labels),
        "bytes": path.stat().st_size,
        "weights": common.weight_types(path),
        "latency_ms": round(least["file"], 4),
        "latency_ratio": round(least["file"] / least["float"], 3),
    }


def key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    named = (record.get(name) for name in ("peer", "network", "sha", "weight_bits", "granularity", "method", "steps"))
    return *named, act_bits(record), tuple(record.get("keep", ()))


def act_bits(record: Mapping[str, Any]) -> int:
    """A result's bits of activations: 8 where it was written before there were others."""
    return int(record.get("act_bits", 8))


def bits(record: Mapping[str, Any]) -> str:
    return f"W{record['weight_bits']}A{act_bits(record)}"


def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The results so far; of two of one cell the later one."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(record): record for record in map(json.loads, lines)}


def results(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run what is not there yet, and append each result as it comes."""
    there = read(arguments.output)
    for path in arguments.checkpoint:
        own = network(path, arguments)
        for cell in CELLS[arguments.peer]:
            name = f"{own.name} {arguments.peer} {cell}"
            if not any(part in name for part in arguments.only):
                continue
            facts = {"network": own.name, "sha": own.sha, "float_top1": own.float_top1, **vars(cell)}
            record = {"peer": arguments.peer, **facts}
            beside = arguments.beside_r2 and "adaround" in cell.method and arguments.peer != R2
            old = there.get(key(record), {"failed": "not run yet"})
            if "failed" not in old and (not beside or "r2" in old):
                continue
            print(name, file=sys.stderr)
            record |= run(arguments.peer, own, cell, arguments)
            if beside:
                record |= beside_r2(record, own, cell, arguments)
            record |= {"cpu": runtime.cpu(), "runtime": onnxruntime.__version__, "calibration": arguments.calibration}
            with arguments.output.open("a") as file:
                file.write(json.dumps(record) + "\n")
            yield record


def beside_r2(record: Mapping[str, Any], own: Network, cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """r2's BRECQ on the same cell, right behind the peer's AdaRound, and how many times longer the peer took."""
    ours = run(R2, own, replace(cell, method="brecq", steps=None), arguments)
    ratio = {
        what: round(record[what] / ours[what], 2)
        for what in ("seconds", "cpu_seconds")
        if what in record and what in ours
    }
    return {"r2": ours, "times_r2": ratio}


# --- the table -----------------------------------------------------------------------------------------------------

COLUMNS = (
    "tool",
    "weights",
    "grid",
    "method",
    "top-1 %",
    "drop",
    "stored as",
    "bytes",
    "/ float32",
    "s",
    "CPU s",
    "MB",
)
PAIRS = ("network", "cell", "top-1 %", "r2", "s", "r2", "CPU s", "r2", "times r2's", "in CPU s")


def accuracy(record: Mapping[str, Any]) -> float | None:
    """Top-1 of the file; where there is none, of the tool's own simulation."""
    found: float | None = record.get("top1", record.get("simulated_top1"))
    return found


def method(record: Mapping[str, Any]) -> str:
    if record.get("chosen"):
        return f"{record['method']}: {record['chosen']}"
    if record.get("keep"):
        return ", ".join([record["method"], *record["keep"]])
    return f"{record['method']}, {record['steps']} steps" if record["steps"] else str(record["method"])


def row(record: Mapping[str, Any]) -> list[str]:
    top1 = accuracy(record)
    if top1 is None:
        why = "refused" if "refused" in record else "failed"
        reached = ["", "", f"{why}: {record[why]}"]
    else:
        stored = record.get("weights", "no file: simulated")
        reached = [f"{top1:.2f}", f"{record['float_top1'] - top1:.2f}", stored]
    forms = {"bytes": ",", "latency_ratio": ".2f", "seconds": ".1f", "cpu_seconds": ".1f", "grown_mb": ",.0f"}
    numbers = [format(record[name], form) if name in record else "" for name, form in forms.items()]
    return [record["peer"], bits(record), record["granularity"], method(record), *reached, *numbers]


def pair(record: Mapping[str, Any]) -> list[str]:
    ours = record["r2"]
    cell = f"{record['peer']} {bits(record)} {record['granularity']} {method(record)}"
    top1 = [f"{value:.2f}" if value is not None else "" for value in map(accuracy, (record, ours))]
    times = [f"{one[what]:.1f}" for what in ("seconds", "cpu_seconds") for one in (record, ours)]
    return [record["network"], cell, *top1, *times, *(f"{value:.2f}" for value in record["times_r2"].values())]


def table(columns: Sequence[str], content: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *content])


def told(records: Sequence[Mapping[str, Any]]) -> str:
    """All results as Markdown: a table for each network, and the pairs of AdaRound."""
    parts = []
    for name, top1 in dict.fromkeys((record["network"], record["float_top1"]) for record in records):
        own = sorted((record for record in records if record["network"] == name), key=_order)
        parts += [f"## {name}, float {top1:.2f}", table(COLUMNS, [row(record) for record in own])]
    pairs = [record for record in records if len(record.get("times_r2", {})) == 2]
    if pairs:
        parts += [
            "## A peer's AdaRound, and r2's BRECQ right behind it",
            table(PAIRS, [pair(record) for record in pairs]),
        ]
    return "\n\n".join(parts)


def _order(record: Mapping[str, Any]) -> tuple[Any, ...]:
    widths = -record["weight_bits"], -act_bits(record)
    return *widths, record["granularity"], record["peer"], record["method"], record["steps"] or 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Other tools' quantization of r2's float models.")
    parser.add_argument("--peer", choices=list(CELLS))
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[])
    parser.add_argument("--data", default="imagefolder:cifar10", help="as r2's --data")
    parser.add_argument("--work-dir", type=Path, required=True, help="environments, images, files")
    parser.add_argument("--output", type=Path, help="JSON lines (default: results.jsonl in the work dir)")
    parser.add_argument("--only", nargs="+", default=[""], help="cells whose 'NETWORK PEER CELL' has one of these")
    parser.add_argument("--beside-r2", action="store_true", help="r2's BRECQ right behind each AdaRound of the peer's")
    parser.add_argument("--table", action="store_true", help="print all results as Markdown")
    parser.add_argument("--calibration", type=int, default=512, help="images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=300, help="timed runs of every file")
    parser.add_argument("--nice", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output = arguments.output or arguments.work_dir / "results.jsonl"
    if arguments.peer:
        for record in results(arguments):
            print(json.dumps({name: record.get(name) for name in ("top1", "simulated_top1", "seconds", "refused")}))
    if arguments.table:
        print(told(list(read(arguments.output).values())))


if __name__ == "__main__":
    main()
