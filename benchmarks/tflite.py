"""Files of TensorFlow Lite: what LiteRT makes of them beside ONNX Runtime, and what they take on an Ethos-U.

Trained networks on digits at 8, 4, 3 and 2 bits; networks of torchvision and timm with random weights (networks.py) at
8 and 4. "ONNX Runtime itself" is how near that is to itself without optimisation: single codes at the edge of two.

    python benchmarks/tflite.py --output benchmarks/tflite.md
"""

import argparse
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from networks import network, noise
from onnx_speed import table
from torch import Tensor

import r2cli
from r2cli import data
from r2cli.data import Data
from r2cli.deploy import onnx_export, runtime, tflite_export, tflite_run, vela
from r2cli.errors import R2Error
from r2cli.ptq import post_training
from r2cli.quantized.decibels import sqnr
from r2cli.storage.checkpoint import Checkpoint

DIGITS = ("mobilenet_v1", "resnet8")
RANDOM = (
    "resnet18 mobilenet_v2 mobilenet_v3_small efficientnet_b0 mnasnet0_5 shufflenet_v2_x0_5 squeezenet1_1 "
    "regnet_y_400mf regnet_x_400mf densenet121 googlenet timm:mobilenetv4_conv_small timm:mobilenetv3_small_050 "
    "timm:efficientnet_lite0"
)
COLUMNS = [
    *("network", "bits", "images", "same class", "dB", "ONNX Runtime itself, dB", "bytes"),
    *("on the NPU", "flash, KiB", "SRAM, KiB", "cycles"),
]
PIXELS = 64


def row(name: str, bits: int, made: Checkpoint, images: Tensor) -> list[str]:
    """A checkpoint for `tflite` in both runtimes on `images` (n, c, h, w), and in Vela."""
    with tempfile.TemporaryDirectory() as folder:
        onnx, lite = Path(folder) / "model.onnx", Path(folder) / "model.tflite"
        onnx.write_bytes(onnx_export.to_bytes(made))
        lite.write_bytes(tflite_export.to_bytes(onnx.read_bytes()))
        expected, found = runtime.runner(onnx)(images), tflite_run.runner(lite, 1)(images)
        again = runtime.runner(onnx, optimise=False)(images)
        size, device = lite.stat().st_size, vela.report(lite)
    same = 100 * float((expected.argmax(1) == found.argmax(1)).double().mean())
    near = ["equal" if torch.equal(one, expected) else f"{sqnr(one, expected):.1f}" for one in (found, again)]
    cells = [name, str(bits), str(len(images)), f"{same:.1f} %", *near, f"{size:,}"]
    return cells + (["", "", "", ""] if device is None else on_device(device))


def on_device(told: dict[str, Any]) -> list[str]:
    operators = f"{told['on_npu']} of {told['on_npu'] + told['on_cpu']}"
    sizes = [f"{told[key] / 1024:.1f}" for key in ("flash_bytes", "sram_bytes")]
    return [operators, *sizes, f"{told['cycles']:,}"]


def digits(name: str, source: Data) -> list[list[str]]:
    trained = r2cli.pretrain(name, source, r2cli.PretrainConfig(reg="margin", epochs=8))
    images = torch.cat([batch for batch, _ in source.test.batches(256, torch.device("cpu"))])
    rows = []
    for bits in (8, 4, 3, 2):
        config = r2cli.PtqConfig(weight_bits=bits, target="tflite", calibration=64)
        rows.append(row(f"{name}, digits", bits, r2cli.quantize(trained, source, config).checkpoint, images))
    return rows


def random(name: str) -> list[list[str]]:
    rows = []
    for bits in (8, 4):
        try:
            made = network(name, PIXELS)
            size = made.input.size
            settings = post_training.PtqSettings("none", bits, 8, "channel", {}, target="tflite")
            quantized, _ = post_training.quantize(made, settings, noise(3, 1, size), torch.device("cpu"))
            rows.append(row(name, bits, quantized, torch.cat(noise(4, 2, size))))
        except R2Error as error:  # what has no form is a row that says so
            rows.append([name, str(bits), str(error), *[""] * (len(COLUMNS) - 3)])
        print(rows[-1], flush=True)
    return rows


def written(rows: Sequence[list[str]]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("ai-edge-litert", "ethos-u-vela", "onnxruntime"))
    about = (__doc__ or "").partition("\n\n")[2]
    return f"# Files of TensorFlow Lite\n\n{about}\n{versions}; {vela.ACCELERATOR}.\n\n{table(COLUMNS, list(rows))}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--networks", default=RANDOM, help="networks with random weights")
    arguments = parser.parse_args()
    source = data.load("digits")
    rows = [one for name in DIGITS for one in digits(name, source)]
    rows += [one for name in arguments.networks.split() for one in random(name)]
    print(written(rows))
    if arguments.output:
        arguments.output.write_text(written(rows))


if __name__ == "__main__":
    main()
