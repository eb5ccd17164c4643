"""Time of r2's W8A8 files beside those of ONNX Runtime's own tool and beside float, in ONNX Runtime, one thread.

Where an integer file is slower than float, is it the file or the runtime's kernels? runtimes.py makes the files:

    python benchmarks/runtimes.py --work-dir runtimes …
    python benchmarks/tool_speed.py runtimes/files
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx_speed import table
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from r2cli.deploy import runtime

sys.path.append(str(Path(__file__).parent / "peers"))
import common  # noqa: E402


class Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Any) -> None:
        self.left = iter([{"input": images[i : i + 1]} for i in range(min(64, len(images)))])

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self.left, None)


def made_by_the_tool(plain: Path, images: Any, folder: Path) -> Path:
    """The float file `plain` as `quantize_static` makes it: one grid a channel, QDQ, UINT8 activations."""
    prepared, made = folder / "prepared.onnx", folder / "made.onnx"
    quant_pre_process(plain, prepared)
    options = {"quant_format": QuantFormat.QDQ, "per_channel": True}
    quantize_static(
        prepared, made, Images(images), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, **options
    )
    return made


def session(path: Path, exact: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if exact:  # without VNNI: the kernels that do not overflow
        options.add_session_config_entry(runtime.EXACT_PRODUCTS, "1")
    own = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = own.get_inputs()[0].name
    return lambda images: own.run(None, {name: images})


def main() -> None:
    parser = argparse.ArgumentParser(description="r2's W8A8 files and ONNX Runtime's tool's, beside float.")
    parser.add_argument("files", type=Path, help="the folder `files` in the work directory of runtimes.py")
    parser.add_argument("--rounds", type=int, default=1000, help="timed runs of every file, in turns")
    arguments = parser.parse_args()
    rows = []
    for folder in sorted(path for path in arguments.files.iterdir() if (path / "W8A8.onnx").exists()):
        images = np.load(folder / "images.npy").astype(np.float32)
        with tempfile.TemporaryDirectory() as scratch:
            made = {
                "r2": folder / "W8A8.onnx",
                "tool": made_by_the_tool(folder / "float32.onnx", images, Path(scratch)),
            }
            runs = {f"{name} {exact}": session(path, exact) for name, path in made.items() for exact in (False, True)}
            runs["float"] = session(folder / "float32.onnx", False)
            least = common.least_ms(runs, images[:1], arguments.rounds)
        rows.append([folder.name, f"{least['float']:.3f}"])
        rows[-1] += [f"{least[f'{name} {exact}'] / least['float']:.2f}" for exact in (True, False) for name in made]
    head = ["network", "float, ms", "r2, no overflow", "the tool, no overflow", "r2, default", "the tool, default"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
