"""How near OpenVINO comes to ONNX Runtime on r2's files.

Three networks are trained on digits, quantized in every form, and run in both on the 597 test images. "Plain" is
OpenVINO without its low-precision transformations, which computes in float what the file's integers stand for: it shows
that the file is read rightly.

    python benchmarks/engines.py --output benchmarks/engines.md        # some ten minutes, most of them training
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
from onnx_speed import machine, table

import r2cli
from r2cli import __version__
from r2cli.api import proof_inputs
from r2cli.calibration.result import Result
from r2cli.data import Data
from r2cli.deploy import engines, likeness, parity, runtime
from r2cli.deploy.engines import ENGINES, Arrays
from r2cli.storage.checkpoint import Checkpoint

NETWORKS = ("mobilenet_v1", "resnet8", "mobilenet_v2")
WIDTHS = {f"W{bits}A8": r2cli.PtqConfig(weight_bits=bits) for bits in (8, 7, 4, 3, 2)}
WIDTHS |= {"W4A4": r2cli.PtqConfig(weight_bits=4, act_bits="4"), "W4": r2cli.PtqConfig(weight_bits=4, act_bits="none")}
PALETTE = "palette of 16"


def forms(made: Checkpoint, source: Data) -> dict[str, Result]:
    """A network in every form."""
    found: dict[str, Result] = {name: r2cli.quantize(made, source, config) for name, config in WIDTHS.items()}
    palettes = r2cli.PalettizeConfig(method="kmeans", bits=4)
    return found | {PALETTE: r2cli.palettize(made, source, palettes)}


def row(path: Path, given: Sequence[Arrays]) -> list[str]:
    """dB and percent of equal argmax of OpenVINO beside ONNX Runtime: by its usual kernels, and by its plain ones."""
    usual = engines.together(ENGINES["onnxruntime"].load(path, 0, False), given)
    told = []
    for plain in (False, True):
        own = engines.together(ENGINES["openvino"].load(path, 0, plain), given)
        (like,) = likeness.compared(own, usual, noise_db=parity.SQNR_DB)
        told += [f"{like.sqnr_db:.0f}", f"{like.agreement:.1f}"]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    arguments = parser.parse_args()
    source = r2cli.load_data("digits")
    content = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.networks:
            trained = r2cli.pretrain(name, source, r2cli.PretrainConfig(reg="margin", epochs=arguments.epochs))
            float_path, path = Path(folder) / "float.onnx", Path(folder) / "file.onnx"
            r2cli.export(trained, float_path)
            batches = proof_inputs.of_data(float_path, source, most=len(source.test)).batches
            content.append([name, "float32", *row(float_path, batches)])
            for form, result in forms(trained.checkpoint, source).items():
                r2cli.export(result, path)
                content.append([name, form, *row(path, batches)])
                print(content[-1], flush=True)
    import openvino

    columns = ["network", "file", "dB", "argmax, %", "dB, plain", "argmax, plain, %"]
    text = "\n\n".join(
        [
            "# OpenVINO beside ONNX Runtime",
            f"{machine()} ({runtime.cpu()}), {len(source.test)} test images of digits; r2cli {__version__}, "
            f"ONNX Runtime {onnxruntime.__version__}, OpenVINO {openvino.__version__.partition('-')[0]}.",
            table(columns, content),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
