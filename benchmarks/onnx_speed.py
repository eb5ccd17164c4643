"""Our ONNX files against ONNX Runtime's own quantizer: is each one proved, how large is it, and how fast does it run?

ResNet-18 and MobileNet-V2 at 224x224 with 1,000 classes are quantized by `r2cli.quantize` (W8A8, W4A8 and W2A8, per
channel, nearest rounding) and exported. Each file is proved as `r2 ptq` proves its own, then timed on one image and
one thread beside two others of the same network: the float32 file, and what
`onnxruntime.quantization.quantize_static` makes of that (QDQ, per channel, uint8 activations, int8 weights, after its
pre-processing). All files take turns in one process, in a random order in every round, and the least time of each
counts: other work on the machine falls on all or on none.

Nothing is downloaded: weights are random, images are noise, and labels are the float network's own answers. Each image
has a contrast and a colour of its own: white noise all looks alike to a network, and a file that ignored its input
would pass. The shifts of the BatchNorms are 1 instead of 0: a deep random network is chaotic otherwise (MobileNet-V2
with rounded activations, on white noise: torch in float32 and torch in float64 are 23 dB apart).

    python benchmarks/onnx_speed.py --output benchmarks/onnx_speed.md        # some five minutes
"""

import argparse
import platform
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter

import onnxruntime
import torch
from given_images import data_of
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

import r2cli
from r2cli import __version__, models
from r2cli.calibration import deployed
from r2cli.deploy import runtime
from r2cli.deploy.verify import Proof
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec

NETWORKS, BITS = ("resnet18", "mobilenet_v2"), (8, 4, 2)
CLASSES, SIZE, BATCH = 1000, 224, 16
INPUT = InputSpec(3, SIZE, SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
FLOAT, REFERENCE = "float32", "quantize_static"
COUNTED = ("QLinearConv", "QLinearAdd", "QGemm")
FLOAT_LAYERS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul")


def noise(batches: int, seed: int) -> list[Tensor]:
    """`batches` batches of normal noise, each image of its own contrast and colour: float32 (BATCH, 3, SIZE, SIZE)."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> Tensor:
        pixels = torch.randn(BATCH, *INPUT.shape, generator=generator)
        contrast = 2 * torch.rand(BATCH, 3, 1, 1, generator=generator)
        return pixels * contrast + torch.randn(BATCH, 3, 1, 1, generator=generator)

    return [batch() for _ in range(batches)]


def network(name: str) -> Checkpoint:
    """A random network whose BatchNorms have seen noise."""
    torch.manual_seed(0)
    spec = ModelSpec(name, CLASSES)
    model = models.build(spec).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.bias)
            module.momentum = None  # average over the batches
    with torch.no_grad():
        for images in noise(4, seed=1):
            model(images)
    return Checkpoint(spec, INPUT, tuple(map(str, range(CLASSES))), model.state_dict())


class _Noise(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.batches = iter(noise(2, seed=2))

    def get_next(self) -> Mapping[str, object] | None:
        images = next(self.batches, None)
        return None if images is None else {"input": images.numpy()}


def reference(float_file: Path, output: Path) -> None:
    """ONNX Runtime's own static quantization of a float file."""
    prepared = output.with_suffix(".prepared.onnx")
    quant_pre_process(str(float_file), str(prepared))
    quantize_static(
        str(prepared),
        str(output),
        _Noise(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def files(name: str, folder: Path) -> tuple[dict[str, Path], dict[str, Proof]]:
    """Every file of one network by what it is, and the proofs of ours."""
    made = network(name)
    float_model = deployed.network(made)
    with torch.inference_mode():
        test = [(images, float_model(images).argmax(1)) for images in noise(4, seed=3)]
    paths = {what: folder / f"{name}.{what}.onnx" for what in (FLOAT, REFERENCE, *(f"W{bits}A8" for bits in BITS))}
    source = data_of(INPUT, made.class_names, noise(2, seed=2), test)
    r2cli.export(made, paths[FLOAT])
    reference(paths[FLOAT], paths[REFERENCE])
    proofs = {FLOAT: r2cli.verify(paths[FLOAT], made, source)}
    for bits in BITS:
        result = r2cli.quantize(made, source, r2cli.PtqConfig(weight_bits=bits, device="cpu"))
        path = paths[f"W{bits}A8"]
        r2cli.export(result, path)
        proofs[f"W{bits}A8"] = r2cli.verify(path, result, source)
    return paths, proofs


def least_ms(runs: Mapping[str, Callable[[Tensor], Tensor]], rounds: int, image: Tensor) -> dict[str, float]:
    """The least time of one image, in ms, of functions that take turns; the first five rounds do not count."""
    least = dict.fromkeys(runs, float("inf"))
    order = random.Random(0)
    for number in range(rounds + 5):
        for name in order.sample(list(runs), len(runs)):
            start = perf_counter()
            runs[name](image)
            if number >= 5:
                least[name] = min(least[name], 1000 * (perf_counter() - start))
    return least


def rows(name: str, paths: Mapping[str, Path], rounds: int) -> list[list[str]]:
    """The speed table's rows of one network."""
    runs = {what: runtime.runner(path, threads=1) for what, path in paths.items()}
    least = least_ms(runs, rounds, noise(1, 4)[0][:1])
    found = []
    for what, path in paths.items():
        counts = runtime.node_counts(path)
        left = sum(counts.get(op, 0) for op in FLOAT_LAYERS)
        ratios = [f"{least[what] / least[other]:.2f}" for other in (FLOAT, REFERENCE)]
        nodes = [str(counts.get(op, 0)) for op in COUNTED]
        found.append([name, what, f"{path.stat().st_size:,}", f"{least[what]:.1f}", *ratios, *nodes, str(left)])
    return found


def table(columns: list[str], content: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *content])


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and proofs of our ONNX files beside ONNX Runtime's quantizer.")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    parser.add_argument("--rounds", type=int, default=200, help="timed runs of every file")
    arguments = parser.parse_args()
    speed, proved = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            paths, proofs = files(name, Path(folder))
            proved += [
                [name, what, check.name, "passed" if check.passed else "FAILED", check.detail]
                for what, proof in proofs.items()
                for check in proof.checks
            ]
            speed += rows(name, paths, arguments.rounds)
    nodes = [*COUNTED, "float layers"]
    text = "\n\n".join(
        [
            "# ONNX files: speed, size and proofs",
            f"{machine()} ({runtime.cpu()}), 1 thread, batch 1, least of {arguments.rounds} runs in turn; "
            f"r2cli {__version__}, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}.",
            table(["network", "file", "bytes", "ms", f"/ {FLOAT}", f"/ {REFERENCE}", *nodes], speed),
            table(["network", "file", "check", "", "detail"], proved),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
