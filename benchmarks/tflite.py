"""Files of TensorFlow Lite: what LiteRT makes of them beside ONNX Runtime, and what they take on an Ethos-U.

Networks that are trained on digits, and with `--cifar DIR` on CIFAR-10, at 8, 4, 3 and 2 bits; one network of each
family of torchvision's, and four of timm's, with random weights (networks.py) at 8. "ONNX Runtime itself" is how near
that is to itself without optimisation: single codes at the edge of two. On the NPU: operators of all; floats, as in
attention, run beside it. Large networks are not compiled.

    python benchmarks/tflite.py --work-dir lite --output benchmarks/tflite.md

The work directory keeps the ONNX file and the row of each network: a run that was stopped goes on where it was.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from networks import TORCHVISION, network, noise
from onnx_speed import table
from torch import Tensor

import r2cli
from r2cli import data
from r2cli.data import Data
from r2cli.deploy import onnx_export, runtime, tflite_export, tflite_run, vela
from r2cli.errors import R2Error
from r2cli.ptq import post_training
from r2cli.quantized.decibels import sqnr

DIGITS, CIFAR = ("mobilenet_v1", "resnet8"), ("mobilenet_v1", "resnet20")
CIFAR_EPOCHS, CIFAR_TEST = 3, 1000
RANDOM = (
    *TORCHVISION.split(),
    *("timm:mobilenetv4_conv_small", "timm:mobilenetv3_small_050", "timm:efficientnet_lite0", "timm:mobileone_s0"),
)
COLUMNS = [
    *("network", "bits", "images", "same class", "dB", "ONNX Runtime itself, dB", "bytes"),
    *("on the NPU", "flash, KiB", "SRAM, KiB", "cycles"),
]
PIXELS = 64


def row(name: str, bits: int, content: bytes, images: Tensor) -> list[str]:
    """A file of ONNX for `tflite`, and the same as TensorFlow Lite, on `images` (n, c, h, w), and in Vela."""
    with tempfile.TemporaryDirectory() as folder:
        onnx, lite = Path(folder) / "model.onnx", Path(folder) / "model.tflite"
        onnx.write_bytes(content)
        lite.write_bytes(tflite_export.to_bytes(content))
        expected, found = runtime.runner(onnx)(images), tflite_run.runner(lite, 1)(images)
        again = runtime.runner(onnx, optimise=False)(images)
        size, device = lite.stat().st_size, compiled(lite)
    same = 100 * float((expected.argmax(1) == found.argmax(1)).double().mean())
    near = ["equal" if torch.equal(one, expected) else f"{sqnr(one, expected):.1f}" for one in (found, again)]
    return [name, str(bits), str(len(images)), f"{same:.1f} %", *near, f"{size:,}", *device]


def compiled(lite: Path) -> list[str]:
    try:
        told = vela.report(lite)
    except R2Error as error:
        return [str(error).rpartition(": ")[2][:80], "", "", ""]
    return ["", "", "", ""] if told is None else on_device(told)


def on_device(told: dict[str, Any]) -> list[str]:
    operators = f"{told['on_npu']} of {told['on_npu'] + told['on_cpu']}"
    sizes = [f"{told[key] / 1024:.1f}" for key in ("flash_bytes", "sram_bytes")]
    return [operators, *sizes, f"{told['cycles']:,}"]


def learned(name: str, source: Data, epochs: int, folder: Path) -> list[list[str]]:
    """The rows of a network that is trained on the data, or was."""
    shown = source.name.partition(":")[0].replace("imagefolder", "CIFAR-10")
    path = folder / f"{name}-{shown}.safetensors"
    if not path.exists():
        path.write_bytes(r2cli.pretrain(name, source, r2cli.PretrainConfig(reg="margin", epochs=epochs)).to_bytes())
    images = torch.cat([batch for batch, _ in source.test.batches(256, torch.device("cpu"))])
    rows = []
    for bits in (8, 4, 3, 2):
        made = r2cli.quantize(path, source, r2cli.PtqConfig(weight_bits=bits, target="tflite", calibration=64))
        rows.append(row(f"{name}, {shown}", bits, onnx_export.to_bytes(made.checkpoint), images))
        print(rows[-1], flush=True)
    return rows


def random(name: str, folder: Path) -> list[str]:
    """The row of a network, made or read."""
    file = folder / f"{name.replace(':', '_')}.onnx"
    known = file.with_suffix(".json")
    if known.exists():
        return list(json.loads(known.read_text()))
    try:
        if not file.exists():
            made = network(name, PIXELS)
            settings = post_training.PtqSettings("none", 8, 8, "channel", {}, target="tflite")
            quantized, _ = post_training.quantize(made, settings, noise(1, 1, made.input.size), torch.device("cpu"))
            file.write_bytes(onnx_export.to_bytes(quantized))
        size = runtime.opened(file).graph.input[0].type.tensor_type.shape.dim[2].dim_value
        found = row(name, 8, file.read_bytes(), torch.cat(noise(4, 2, size)))
    except R2Error as error:  # what has no form is a row that says so
        found = [name, "8", str(error), *[""] * (len(COLUMNS) - 3)]
    known.write_text(json.dumps(found))
    print(found, flush=True)
    return found


def written(rows: Sequence[list[str]]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("ai-edge-litert", "ethos-u-vela", "onnxruntime"))
    about = (__doc__ or "").partition("\n\n")[2]
    return f"# Files of TensorFlow Lite\n\n{about}\n{versions}; {vela.ACCELERATOR}.\n\n{table(COLUMNS, list(rows))}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--networks", nargs="+", default=RANDOM, help="networks with random weights")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as a folder of train/CLASS/* and test/CLASS/*")
    parser.add_argument("--work-dir", type=Path, default=Path("lite"), help="a file and a row for every network")
    arguments = parser.parse_args()
    source = data.load("digits")
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    rows = [random(name, arguments.work_dir) for name in arguments.networks]
    if arguments.cifar:
        pictures = data.with_test_images(data.load(f"imagefolder:{arguments.cifar}"), CIFAR_TEST)
        rows = [one for name in CIFAR for one in learned(name, pictures, CIFAR_EPOCHS, arguments.work_dir)] + rows
    rows = [one for name in DIGITS for one in learned(name, source, 8, arguments.work_dir)] + rows
    print(written(rows))
    if arguments.output:
        arguments.output.write_text(written(rows))


if __name__ == "__main__":
    main()
