"""Does post-training quantization reach its ONNX file on networks of every shape? Twelve of torchvision's.

Each network has random weights; its BatchNorms have seen noise, each image of a contrast and a colour of its own, and
their shifts are 1 instead of 0: a deep random network is chaotic otherwise (see onnx_speed.py). ConvNeXt's layer
scales, 1e-6 before training, are drawn anew so that its blocks count. The network is quantized by `r2cli.quantize`
(W8A8, and some W4A8, per channel, nearest rounding) and exported; the file is proved as `r2 ptq` proves it: audited,
run in ONNX Runtime with optimisation off and at its default, 30 dB of logits against torch's. The labels are the float
network's answers.

    python benchmarks/networks.py --work-dir networks --output benchmarks/networks.md

One JSON file a row in the work directory: a run that was stopped goes on where it was. With --speed the float32 file is
made too, and the time of one image on one thread compared, files in turn, the least of --rounds.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

import onnxruntime
import torch
from given_images import data_of
from onnx_speed import least_ms, machine, table
from torch import Tensor, nn

import r2cli
from r2cli import __version__, models
from r2cli.calibration import deployed
from r2cli.deploy import runtime
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec

NETWORKS = (
    *("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "squeezenet1_1"),
    *("regnet_y_400mf", "vit_b_16", "swin_t", "densenet121", "googlenet", "convnext_tiny"),
)
FOUR_BITS = ("resnet18", "mobilenet_v3_small", "vit_b_16")  # W4A8 as well
CLASSES, BATCH = 1000, 8
INTEGER = ("QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearConcat")
HEAD = [
    *("network", "form", "proof", "layers", "integer nodes", "other nodes", "float, as announced"),
    *("dB to torch", "dB to float", "bytes", "/ float32 time", "s ptq", "s export", "s proof"),
]


def noise(batches: int, seed: int, size: int) -> list[Tensor]:
    """`batches` batches of normal noise, each image of its own contrast and colour: float32 (BATCH, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> Tensor:
        pixels = torch.randn(BATCH, 3, size, size, generator=generator)
        contrast = 2 * torch.rand(BATCH, 3, 1, 1, generator=generator)
        return pixels * contrast + torch.randn(BATCH, 3, 1, 1, generator=generator)

    return [batch() for _ in range(batches)]


def network(name: str, size: int) -> Checkpoint:
    """A random network whose BatchNorms have seen noise."""
    torch.manual_seed(0)
    spec = ModelSpec(name, CLASSES, args={"image_size": size} if name.startswith("vit") else {})
    model = models.build(spec).train()
    for key, parameter in model.named_parameters():
        if key.endswith("layer_scale"):
            nn.init.normal_(parameter, 0, 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.bias)
            module.momentum = None  # average over the batches
    if isinstance(getattr(model, "heads", None), nn.Sequential):
        # torchvision's is zero: logits that say nothing.
        nn.init.normal_(list(model.get_submodule("heads").parameters())[-2], 0, 0.02)
    with torch.no_grad():
        for images in noise(4, 1, size):
            model(images)
    state = {key: tensor.contiguous() for key, tensor in model.eval().state_dict().items()}
    spec_of_input = InputSpec(3, size, size, mean=(0.0,) * 3, std=(1.0,) * 3)
    return Checkpoint(spec, spec_of_input, tuple(map(str, range(CLASSES))), state)


@torch.inference_mode()
def row(name: str, bits: int, size: int, rounds: int) -> dict[str, Any]:
    """One network at one width, quantized, exported and proved; `rounds` 0 leaves the time out."""
    made = network(name, size)
    float_model = deployed.network(made)
    test = [(images, float_model(images).argmax(1)) for images in noise(2, 3, size)]
    source = data_of(made.input, made.class_names, noise(2, 2, size), test)
    started = perf_counter()
    result = r2cli.quantize(made, source, r2cli.PtqConfig(weight_bits=bits, device="cpu"))
    quantized = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        r2cli.export(result, path)
        exported = perf_counter()
        proof = r2cli.verify(path, result, source)
        proved = perf_counter()
        ratio = None
        if rounds:
            float_file = Path(folder) / "float.onnx"
            r2cli.export(made, float_file)
            image = noise(1, 4, size)[0][:1]
            runs = {each.stem: runtime.runner(each, threads=1) for each in (path, float_file)}
            least = least_ms(runs, rounds, image)
            ratio = least[path.stem] / least[float_file.stem]
    failed = [f"{check.name}: {check.detail}" for check in proof.checks if not check.passed]
    return {
        "network": name,
        "form": f"W{bits}A8",
        "failed": failed,
        "layers": len(result.layers),
        "nodes": proof.measures["nodes"],
        "float": dict(Counter(each["kind"] for each in proof.measures["float_operations"])),
        "parity": next(check.detail for check in proof.checks if check.name == "parity"),
        "sqnr": proof.measures["sqnr_db"],
        "sqnr_to_float": proof.measures["float_sqnr_db"],
        "bytes": proof.measures["bytes"],
        "ratio": ratio,
        "seconds": [round(b - a, 1) for a, b in ((started, quantized), (quantized, exported), (exported, proved))],
    }


def cells(one: dict[str, Any]) -> list[str]:
    """A row of the table."""
    nodes = {op: count for op, count in one["nodes"].items() if op.startswith("Q") or op in INTEGER}
    nodes.pop("QuantizeLinear", None)
    others = {op: count for op, count in one["nodes"].items() if op not in nodes}
    told = [", ".join(f"{count} {op}" for op, count in kinds.items()) for kinds in (nodes, others, one["float"])]
    ratio = "" if one["ratio"] is None else f"{one['ratio']:.2f}"
    numbers = [f"{one['sqnr']:.0f}", f"{one['sqnr_to_float']:.1f}", f"{one['bytes']:,}", ratio]
    proof = "passed" if not one["failed"] else f"FAILED {'; '.join(one['failed'])}"
    return [one["network"], one["form"], proof, str(one["layers"]), *told, *numbers, *map(str, one["seconds"])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Twelve networks of torchvision, quantized, exported and proved.")
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--size", type=int, default=224, help="pixels of the images")
    parser.add_argument("--work-dir", type=Path, default=Path("networks"), help="a JSON file for every row")
    parser.add_argument("--speed", action="store_true", help="compare with the float32 file's time")
    parser.add_argument("--rounds", type=int, default=30, help="timed runs of every file")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    done = []
    for name in arguments.networks:
        for bits in (8, 4) if name in FOUR_BITS else (8,):
            file = arguments.work_dir / f"{name}-w{bits}-{arguments.size}.json"
            if not file.exists():
                found = row(name, bits, arguments.size, arguments.rounds if arguments.speed else 0)
                file.write_text(json.dumps(found))
                print(" | ".join(cells(found)), flush=True)
            done.append(json.loads(file.read_text()))
    text = "\n\n".join(
        [
            "# Twelve networks from float to a proved integer file",
            f"`python benchmarks/networks.py{' --speed' if arguments.speed else ''} --size {arguments.size}`; "
            f"{machine()} ({runtime.cpu()}); r2cli {__version__}, torch {torch.__version__}, "
            f"ONNX Runtime {onnxruntime.__version__}; seeds 0 to 4 in the script.",
            "Nodes are those that ONNX Runtime runs at its default; `dB to torch`: logits of the file in ONNX Runtime "
            "against the quantized network in torch; `dB to float`: against the float one.",
            table(HEAD, [cells(one) for one in done]),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
