"""Networks that come as an ONNX file: do they go out as they came in, and how good are they on integers?

25 networks of torchvision and timm (as in networks.py: random weights, BatchNorms that have seen noise). The first ten
each in a file of torch's TorchScript exporter (opset 11, 13 or 17) and in one of its dynamo exporter (opset 18), the
batch free in one of them and 1 in the other; the rest in one of the two by turns. `round trip`: `r2cli.export` of what
was read, against the file itself, both in ONNX Runtime. The first six are quantized too (W8A8, nearest rounding), and
proved.

Then files that others have published, in packages of the registry: a YOLOv8 of `nudenet`, and of
`rapidocr-onnxruntime` a detector of text, a recogniser and a classifier of direction. They are quantized on pictures of
text that is drawn here, and on the two photographs of scikit-learn, and compared with ONNX Runtime's `quantize_static`
(QDQ, per channel, minimum and maximum) on the same pictures.

    pip download --no-deps -d packages nudenet rapidocr-onnxruntime
    python benchmarks/onnx_networks.py --packages packages --work-dir onnx --output benchmarks/onnx_networks.md

One JSON file a row in the work directory: a run that was stopped goes on where it was.
"""

import argparse
import json
import logging
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from given_images import data_of
from networks import BATCH, network, noise, proved, tried
from onnx import version_converter
from onnx_speed import machine, table
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quant_pre_process, quantize_static
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images
from torch import Tensor

import r2cli
from r2cli import __version__
from r2cli.calibration import deployed
from r2cli.data import own
from r2cli.deploy import runtime
from r2cli.models import onnx as onnx_in
from r2cli.ptq import brecq
from r2cli.quantized.decibels import decibels
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import InputSpec, NetworkInput

NETWORKS = (
    "mobilenet_v2 resnet18 mobilenet_v3_small shufflenet_v2_x0_5 efficientnet_b0 squeezenet1_1 timm:efficientnet_lite0 "
    "timm:mobilenetv4_conv_small timm:ghostnet_050 timm:vit_tiny_patch16_224 densenet121 googlenet vit_b_32 mnasnet0_5 "
    "regnet_y_400mf inception_v3 resnext50_32x4d timm:lcnet_050 timm:repvgg_a0 timm:mobilevit_xxs timm:efficientvit_b0 "
    "timm:levit_128s timm:convnext_atto timm:mobileone_s0 timm:fastvit_t8"
).split()
BOTH, QUANTIZED = 10, 6  # of them, from the first on
LEAST_OPSET = dict.fromkeys(("vit_b_32", "timm:vit_tiny_patch16_224", "timm:mobilevit_xxs", "timm:fastvit_t8"), 17)
HEAD = [
    "network",
    "exporter",
    "opset",
    "batch",
    "nodes",
    "round trip",
    "W8A8",
    "layers on integers",
    "dB to float",
    "s",
]
PUBLIC_HEAD = [
    *(
        "file",
        "input",
        "nodes",
        "round trip",
        "proof",
        "on integers",
        "dB, agreement",
        "the same of quantize_static",
        "ms float",
    ),
    *("ms", "ms quantize_static", "MB float", "MB", "MB quantize_static"),
]
FEW_BITS_HEAD = ["file", "nearest: dB, agreement", "BRECQ: dB, agreement", "s nearest", "s BRECQ", "MB", "proof"]
TRAINED_HEAD = ["file", "steps", "loss, epoch by epoch", "dB, agreement", "s", "proof"]


# --- exports ---------------------------------------------------------------------------------------------------------


def exported(made: Checkpoint, path: Path, exporter: str, opset: int, *, free: bool) -> None:
    """Write the network of `made` as one of torch's exporters does."""
    size = made.input.size
    given: dict[str, Any] = {"opset_version": opset, "input_names": ["image"], "output_names": ["scores"]}
    if exporter == "dynamo":
        given |= {"dynamo": True, "verbose": False, "external_data": False}
        given |= {"dynamic_shapes": ({0: torch.export.Dim("n")},)} if free else {}
    else:
        given |= {"dynamo": False} | ({"dynamic_axes": {"image": {0: "n"}, "scores": {0: "n"}}} if free else {})
    torch.backends.mha.set_fastpath_enabled(False)  # attention as operators: the exporters know no other
    with torch.no_grad():
        torch.onnx.export(deployed.network(made), (torch.randn(2 if free else 1, 3, size, size),), path, **given)


def session(path: Path) -> onnxruntime.InferenceSession:
    """One thread, and integer products that do not overflow."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry(runtime.EXACT_PRODUCTS, "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, images: Tensor) -> Tensor:
    """The first output of a file, image by image."""
    one = session(path)
    name = one.get_inputs()[0].name
    return torch.cat([torch.from_numpy(one.run(None, {name: image[None].numpy()})[0]) for image in images])


def away(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def of_file(path: Path, given: NetworkInput, classes: Sequence[str] = ()) -> Checkpoint:
    spec, taken, tensors = onnx_in.read(path, given, len(classes))
    outputs = onnx_in.program(spec).outputs
    return Checkpoint(spec, taken, tuple(classes), tensors, origin=path.name, outputs=outputs)


def export_row(name: str, exporter: str, opset: int, *, free: bool, quantized: bool) -> dict[str, Any]:
    started = perf_counter()
    row: dict[str, Any] = {"network": name, "exporter": exporter, "opset": opset, "batch": "free" if free else "1"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, out = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
            original = network(name, 96 if name == "inception_v3" else 64)
            exported(original, path, exporter, opset, free=free)
            assert isinstance(original.input, InputSpec)
            made = of_file(path, original.input, original.class_names)
            row["nodes"] = len(onnx.load(path).graph.node)
            r2cli.export(made, out)
            images = noise(1, 4, original.input.size)[0][:4]
            row["away"] = away(run(out, images), run(path, images))
            if quantized:
                model = deployed.network(made)
                with torch.inference_mode():
                    test = [(images, model(images).argmax(1)) for images in noise(1, 3, original.input.size)]
                source = data_of(original.input, made.class_names, noise(2, 2, original.input.size), test)
                config = r2cli.PtqConfig(device="cpu")
                row["W8A8"], measures = tried(lambda: proved(r2cli.quantize(made, source, config), source))
                row |= {key: measures.get(key) for key in ("integer_share", "float_sqnr_db")}
    except Exception as error:  # a row says what became of it
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row | {"seconds": round(perf_counter() - started, 1)}


def cells(row: dict[str, Any]) -> list[str]:
    share, sqnr = row.get("integer_share"), row.get("float_sqnr_db")
    return [
        *(str(row[key]) for key in ("network", "exporter", "opset", "batch")),
        str(row.get("nodes", "")),
        row["failed"] if "failed" in row else f"{row['away']:.1e}",
        row.get("W8A8", ""),
        "" if share is None else f"{share:.1f} %",
        "" if sqnr is None else f"{sqnr:.1f}",
        str(row["seconds"]),
    ]


# --- published files -------------------------------------------------------------------------------------------------

WORDS = "integer weights run on every phone and a palette of sixteen values is enough for most of them".split()


def line_of_text(shape: Sequence[int], generator: np.random.Generator, lines: int = 1) -> Image.Image:
    """Black words on a light ground, or light on dark, a little turned."""
    _, height, width = shape
    dark = generator.random() < 0.3
    ground, ink = (tuple(int(c) for c in generator.integers(*bounds, 3)) for bounds in ((190, 256), (0, 90)))
    image = Image.new("RGB", (width, height), ink if dark else ground)
    draw, row = ImageDraw.Draw(image), height / lines
    for line in range(lines):
        font = ImageFont.load_default(size=row * generator.uniform(0.45, 0.75))
        text = " ".join(generator.choice(WORDS, 4))
        draw.text((4, row * line + row * 0.1), text, fill=ground if dark else ink, font=font)
    return image.rotate(generator.uniform(-2, 2), fillcolor=ink if dark else ground)


def photograph(shape: Sequence[int], generator: np.random.Generator) -> Image.Image:
    """A part of one of scikit-learn's two photographs."""
    _, height, width = shape
    whole = Image.fromarray(load_sample_images().images[int(generator.integers(2))])
    side = int(generator.integers(160, 427))
    left, top = (int(generator.integers(size - side + 1)) for size in whole.size)
    return whole.crop((left, top, left + side, top + side)).resize((width, height))


@dataclass(frozen=True)
class Published:
    package: str
    file: str
    shape: tuple[int, int, int]
    kind: str  # of pictures: photographs, lines or pages of text
    mean: float
    std: float
    classes: int = (
        0  # of each decision, the output's last axis; 0: each number above 0.3 is one, as the detectors have it
    )

    def images(self, count: int, seed: int) -> Tensor:
        generator = np.random.default_rng(seed)
        drawn = []
        for _ in range(count):
            if self.kind == "photographs":
                image = photograph(self.shape, generator)
            else:
                image = line_of_text(self.shape, generator, 6 if self.kind == "pages" else 1)
            drawn.append(torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1))
        return (torch.stack(drawn) - self.mean) / self.std

    def agreement(self, found: Tensor, expected: Tensor) -> float:
        """Percent of decisions that are the float file's: of greatest scores, or of what either says yes to."""
        if self.classes:
            pairs = [each.reshape(-1, self.classes).argmax(1) for each in (found, expected)]
            return 100 * float((pairs[0] == pairs[1]).float().mean())
        yes, wanted = found > 0.3, expected > 0.3
        return 100 * float((yes & wanted).sum() / max(1, int((yes | wanted).sum())))


OCR = "rapidocr_onnxruntime/models/"
PUBLISHED = (
    Published("rapidocr_onnxruntime", f"{OCR}ch_ppocr_mobile_v2.0_cls_infer.onnx", (3, 48, 192), "lines", 0.5, 0.5, 2),
    Published("nudenet", "nudenet/320n.onnx", (3, 320, 320), "photographs", 0.0, 1.0),
    Published("rapidocr_onnxruntime", f"{OCR}ch_PP-OCRv4_det_infer.onnx", (3, 320, 320), "pages", 0.45, 0.225),
    Published("rapidocr_onnxruntime", f"{OCR}ch_PP-OCRv4_rec_infer.onnx", (3, 48, 320), "lines", 0.5, 0.5, 6625),
)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, images: Tensor) -> None:
        self.rows: Iterator[dict[str, Any]] = iter([{name: image[None].numpy()} for image in images])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.rows, None)


def with_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A file whose constants are initializers, and no nodes as Paddle writes them."""
    constants = [node for node in model.graph.node if node.op_type == "Constant" and node.attribute[0].HasField("t")]
    for node in constants:
        tensor = node.attribute[0].t
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
        model.graph.node.remove(node)
    return model


def by_quantize_static(path: Path, out: Path, images: Tensor) -> bool:
    """Quantize a file as ONNX Runtime does; whether its preparation was of use, or what came of it does not load."""
    for plainly in (False, True):
        prepared = out.with_suffix(".prepared.onnx")
        # Per channel it wants opset 13 or more, and weights as initializers.
        onnx.save(version_converter.convert_version(with_initializers(onnx.load(path)), 17), prepared)
        quant_pre_process(prepared, prepared, skip_symbolic_shape=True, skip_optimization=plainly)
        reader = _Reader(onnx.load(path).graph.input[0].name, images)
        quantize_static(prepared, out, reader, quant_format=QuantFormat.QDQ, per_channel=True)
        try:
            session(out)
        except Exception:  # onnxruntime's own classes share no base
            continue
        break
    return not plainly


def milliseconds(paths: Sequence[Path], image: Tensor) -> list[float]:
    """Median time of one image on one thread, the files one after the other in turn."""
    sessions = [session(path) for path in paths]
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(15):
        for one, each in zip(sessions, times, strict=True):
            given = {one.get_inputs()[0].name: image.numpy()}
            started = perf_counter()
            one.run(None, given)
            each.append(1000 * (perf_counter() - started))
    return [round(sorted(each)[len(each) // 2], 2) for each in times]


def unpacked(one: Published, packages: Path, folder: Path) -> Path:
    """The file itself, out of its package."""
    with zipfile.ZipFile(next(packages.glob(f"{one.package}-*.whl"))) as content:
        return Path(content.extract(one.file, folder))


def likeness(one: Published, file: Path, images: Tensor, expected: Tensor) -> tuple[float, float]:
    """dB and agreement in percent of the first output of a file with that of the float file."""
    found = run(file, images)
    error = float((found - expected).square().sum())
    return round(decibels(float(expected.square().sum()), error), 1), round(one.agreement(found, expected), 2)


def told(proof: Any) -> str:
    return "passed" if proof.passed else "; ".join(check.detail for check in proof.checks if not check.passed)


def published_row(one: Published, packages: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"file": Path(one.file).name, "shape": one.shape}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, plain, out = unpacked(one, packages, folder), folder / "plain.onnx", folder / "out.onnx"
        row["nodes"] = len(onnx.load(path).graph.node)
        calibration, images = one.images(32, 1), one.images(2 * BATCH, 2)
        source = own.to_data(one.package, ([(calibration, None)], [(images, None)]))
        made = of_file(path, source.input)
        r2cli.export(made, plain)
        expected = run(path, images)
        row["away"] = away(run(plain, images), expected)
        result = r2cli.quantize(made, source, r2cli.PtqConfig(device="cpu"))
        r2cli.export(result, out)
        proof = r2cli.verify(out, result, source)
        row["proof"], row["share"] = told(proof), proof.measures["integer_share"]
        theirs = folder / "theirs.onnx"
        row["prepared"] = by_quantize_static(path, theirs, calibration)
        files = [path, out, theirs]
        for key, file in zip(("dB", "theirs_dB"), files[1:], strict=True):
            row[key], row[f"{key} agreement"] = likeness(one, file, images, expected)
        row["ms"] = milliseconds(files, images[:1])
        row["MB"] = [round(file.stat().st_size / 1e6, 2) for file in files]
    return row


# Four bits are learned on few images and in few steps: what a slow machine can afford.
FEW, STEPS = 8, 20


def few_bits_row(one: Published, packages: Path) -> dict[str, Any]:
    """W4A8, to the nearest level and by BRECQ, on a few images."""
    row: dict[str, Any] = {"file": Path(one.file).name}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, out = unpacked(one, packages, folder), folder / "out.onnx"
        images = one.images(FEW, 2)
        source = own.to_data(one.package, ([(one.images(FEW, 1), None)], [(images, None)]))
        made, expected = of_file(path, source.input), run(path, images)
        brecq.FEW = STEPS
        for method in ("none", "brecq"):
            started = perf_counter()
            result = r2cli.quantize(made, source, r2cli.PtqConfig(weight_bits=4, method=method, device="cpu"))
            row[f"{method} s"] = round(perf_counter() - started)
            r2cli.export(result, out)
            row[method] = likeness(one, out, images, expected)
        row["proof"] = told(r2cli.verify(out, result, source, timed=False))
        row["MB"] = round(out.stat().st_size / 1e6, 2)
    return row


def trained_row(one: Published, packages: Path, epochs: int = 4) -> dict[str, Any]:
    """QAT at W4A8 without labels: what is learned are the float file's outputs."""
    row: dict[str, Any] = {"file": Path(one.file).name}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, out = unpacked(one, packages, folder), folder / "out.onnx"
        images = one.images(FEW, 2)
        source = own.to_data(one.package, ([(one.images(4 * FEW, 1), None)], [(images, None)]))
        made, expected = of_file(path, source.input), run(path, images)
        config = r2cli.QatConfig(weight_bits=4, act_bits="8", epochs=epochs, batch_size=8, device="cpu")
        started = perf_counter()
        result = r2cli.finetune(made, source, config)
        row["s"], row["steps"] = round(perf_counter() - started), epochs * 4 * FEW // 8
        row["losses"] = [epoch.loss for epoch in result.epochs]
        r2cli.export(result, out)
        row["trained"] = likeness(one, out, images, expected)
        row["proof"] = told(r2cli.verify(out, result, source, timed=False))
    return row


def published_cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["file"], "", "", row["failed"], *[""] * 10]
    return [
        row["file"],
        "x".join(map(str, row["shape"])),
        str(row["nodes"]),
        f"{row['away']:.1e}",
        row["proof"],
        f"{row['share']:.1f} %",
        f"{row['dB']}, {row['dB agreement']} %",
        f"{row['theirs_dB']}, {row['theirs_dB agreement']} %{'' if row['prepared'] else ' *'}",
        *map(str, (*row["ms"], *row["MB"])),
    ]


def few_bits_cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["file"], row["failed"], *[""] * 5]
    found = [f"{row[method][0]}, {row[method][1]} %" for method in ("none", "brecq")]
    return [row["file"], *found, *(str(row[key]) for key in ("none s", "brecq s", "MB", "proof"))]


def trained_cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["file"], row["failed"], *[""] * 4]
    losses = ", ".join(f"{loss:.2g}" for loss in row["losses"])
    return [row["file"], str(row["steps"]), losses, "{}, {} %".format(*row["trained"]), str(row["s"]), row["proof"]]


def kept(file: Path, make: Any) -> dict[str, Any]:
    """The row in `file`, made where it is not there."""
    if not file.exists():
        file.write_text(json.dumps(make()))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Networks that come as ONNX files.")
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--packages", type=Path, help="the folder of the packages that hold published files")
    parser.add_argument("--work-dir", type=Path, default=Path("onnx"), help="a JSON file for every row")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    published: list[Any] = []
    few_bits: list[Any] = []
    trained: list[Any] = []
    for one in PUBLISHED if arguments.packages else ():
        for held, suffix, make in ((published, "", published_row), (few_bits, ".w4", few_bits_row)):
            file = arguments.work_dir / f"{Path(one.file).stem}{suffix}.json"
            held.append(kept(file, lambda one=one, make=make: make(one, arguments.packages)))
            print(held[-1], flush=True)
        if one.kind == "lines":
            file = arguments.work_dir / f"{Path(one.file).stem}.qat.json"
            trained.append(kept(file, lambda one=one: trained_row(one, arguments.packages)))
            print(trained[-1], flush=True)
    rows = []
    for place, name in enumerate(arguments.networks):
        opset = max((11, 13, 17)[place % 3], LEAST_OPSET.get(name, 11))
        files = (("TorchScript", opset, place % 2 == 0), ("dynamo", 18, place % 2 == 1))
        for exporter, version, free in files if place < BOTH else files[place // 2 % 2 :][:1]:
            quantized = exporter == "TorchScript" and place < QUANTIZED
            file = arguments.work_dir / f"{name.replace(':', '_')}-{exporter}.json"
            row = kept(
                file,
                lambda file=(name, exporter, version), free=free, quantized=quantized: export_row(
                    *file, free=free, quantized=quantized
                ),
            )
            rows.append(row)
            print(" | ".join(cells(row)), flush=True)
    read = [row for row in rows if "away" in row]
    near = [row for row in read if row["away"] <= 1e-4]
    whole = [row for row in rows if row.get("W8A8") == "passed" and (row.get("integer_share") or 0) > 99.9]
    text = "\n\n".join(
        [
            "# Networks that come as ONNX files",
            f"`python benchmarks/onnx_networks.py`; {machine()} ({runtime.cpu()}); r2cli {__version__}, torch "
            f"{torch.__version__}, ONNX Runtime {onnxruntime.__version__}.",
            f"{len(read)} of {len(rows)} exported files of {len(arguments.networks)} networks are read, "
            f"{len(near)} go out within 1e-4 of what came in, relative to the largest score. Of "
            f"{sum('W8A8' in row for row in rows)} quantized ones, {len(whole)} pass their proof with all layers on "
            "integers.",
            table(HEAD, [cells(row) for row in rows]),
            "## Published files",
            "`dB`: of the output at W8A8 against the float file, in ONNX Runtime, on 16 other pictures than calibrated "
            "on; `agreement`: decisions that are the float file's. One image on one thread; median of 15, in turn. A * "
            "marks files that do not load after ONNX Runtime's own preparation (`quant_pre_process`): it was left out.",
            table(PUBLIC_HEAD, [published_cells(row) for row in published]),
            f"The same at W4A8, learned on {FEW} images in {STEPS} steps a block (the classifier: 16 images, "
            f"100 steps), and compared on {FEW} others:",
            table(FEW_BITS_HEAD, [few_bits_cells(row) for row in few_bits]),
            f"QAT at W4A8 from the file alone (`--loss distill`), on {4 * FEW} images without labels (the classifier: "
            "64):",
            table(TRAINED_HEAD, [trained_cells(row) for row in trained]),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
