"""Networks that come as an ONNX file: do they go out as they came in, and how good are they on integers?

25 networks of torchvision and timm (as in networks.py: random weights, BatchNorms that have seen noise). The first ten
each in a file of torch's TorchScript exporter (opset 11, 13 or 17) and in one of its dynamo exporter (opset 18), the
batch free in one of them and 1 in the other; the rest in one of the two by turns. `round trip`: `r2cli.export` of what
was read, against the file itself, both in ONNX Runtime. The first six are quantized too (W8A8, nearest rounding), and
proved.

Then files that others have published, in packages of the registry: a YOLOv8 of `nudenet`, and of
`rapidocr-onnxruntime` a detector of text, a recogniser and a classifier of direction. They are quantized on pictures of
text that is drawn here, and on parts of scikit-image's photographs (labelled_pictures.py), and compared with ONNX
Runtime's `quantize_static` (QDQ, per channel, minimum and maximum) on the same pictures.

    pip download --no-deps -d packages nudenet rapidocr-onnxruntime scikit-image
    python benchmarks/onnx_networks.py --packages packages --work-dir onnx --output benchmarks/onnx_networks.md

One JSON file a row in the work directory: a run that was stopped goes on where it was.
"""

import argparse
import json
import logging
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import labelled_pictures
import numpy as np
import onnx
import onnxruntime
import torch
from given_images import data_of
from networks import network, noise, proved, tried
from onnx import version_converter
from onnx_speed import machine, table
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quant_pre_process, quantize_static
from torch import Tensor

import r2cli
from r2cli import __version__
from r2cli.calibration import deployed
from r2cli.data import own
from r2cli.deploy import runtime
from r2cli.models import onnx as onnx_in
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
]
PUBLIC_HEAD = [
    *("file", "input", "nodes", "round trip", "proof", "on integers", "float: right", "W8A8: dB, agreement, right"),
    *("the same of quantize_static", "time, float = 1", "time of quantize_static", "MB float", "MB"),
    "MB quantize_static",
]
TRIED_HEAD = ["file", "options", "dB, agreement, right", "MB", "proof"]
LINE = 320  # pixels of the longest line of text; what takes less is given it narrowed, as the programs around it do
CALIBRATION, TEST, PROVED = 32, 256, 16  # pictures; the last are of TEST


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
    ]


# --- published files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    package: str
    file: str
    shape: tuple[int, int, int]
    kind: str  # of pictures: photographs, pages of text, lines, or lines of which half stand on their head
    mean: float
    std: float
    classes: int = 0  # of each decision, the output's last axis; 0: each number above `least` is one
    least: float = 0.3

    def pictures(self, count: int, seed: int, packages: Path) -> tuple[Tensor, list[Any]]:
        """Normalized images (n, c, h, w), and what is right: texts, boxes, whether they are turned, or nothing."""
        generator = np.random.default_rng(seed)
        drawn, truths = [], list[Any]()
        for number in range(count):
            truth: Any
            if self.kind == "photographs":
                whole, truth = labelled_pictures.photograph(self.shape, generator, packages)
                image = labelled_pictures.pixels(whole)
            elif self.kind == "pages":
                whole, truth = labelled_pictures.page(self.shape, generator)
                image = labelled_pictures.pixels(whole)
            else:
                line, truth = labelled_pictures.cut_line((3, self.shape[1], LINE), generator)
                if self.kind == "turned":
                    truth = number % 2
                    line = line.rotate(180 * (number % 2)).resize((min(line.width, self.shape[2]), self.shape[1]))
                image = labelled_pictures.padded(labelled_pictures.pixels(line), self.shape[2])
            drawn.append(image)
            truths.append(truth)
        return (torch.stack(drawn) - self.mean) / self.std, truths

    def agreement(self, found: Tensor, expected: Tensor) -> float:
        """Percent of decisions that are the float file's: of greatest scores, or of what either says yes to."""
        if self.classes:
            pairs = [each.reshape(-1, self.classes).argmax(1) for each in (found, expected)]
            return 100 * float((pairs[0] == pairs[1]).float().mean())
        if self.kind == "photographs":  # four rows of the boxes, then one of each class
            found, expected = found[:, 4:], expected[:, 4:]
        yes, wanted = found > self.least, expected > self.least
        return 100 * float((yes & wanted).sum() / max(1, int((yes | wanted).sum())))

    def right(self, found: Tensor, truths: Sequence[Any], path: Path) -> float:
        """Percent that is right of what is there: characters, lines found, directions, or faces (AP at a half)."""
        if self.kind == "photographs":
            return labelled_pictures.average_precision(found, truths, FACES)
        if self.kind == "turned":
            return 100 * float((found.argmax(1) == torch.tensor(truths)).float().mean())
        if self.kind == "pages":
            return labelled_pictures.lines_right(found, truths)
        named = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        return labelled_pictures.characters_right(
            labelled_pictures.written(found, [*named["character"].split("\n"), " "]), truths
        )


FACES = (1, 12)  # of the classes of nudenet: those of a woman and of a man
OCR = "rapidocr_onnxruntime/models/"
PUBLISHED = (
    Published("rapidocr_onnxruntime", f"{OCR}ch_ppocr_mobile_v2.0_cls_infer.onnx", (3, 48, 192), "turned", 0.5, 0.5, 2),
    Published("nudenet", "nudenet/320n.onnx", (3, 320, 320), "photographs", 0.0, 1.0, least=0.25),
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


class Given:
    """A published file, the pictures that it is calibrated and measured on, and what it says of these itself."""

    def __init__(self, one: Published, packages: Path, folder: Path, calibration: int = CALIBRATION) -> None:
        self.one, self.path = one, unpacked(one, packages, folder)
        self.calibration = one.pictures(calibration, 1, packages)[0]
        self.images, self.truths = one.pictures(TEST, 2, packages)
        self.source = own.to_data(one.package, ([(self.calibration, None)], [(self.images[:PROVED], None)]))
        self.made = of_file(self.path, self.source.input)
        self.expected = run(self.path, self.images)

    def likeness(self, file: Path) -> list[float]:
        """dB and agreement in percent of a file's first output with the float file's, and how much it has right."""
        found = run(file, self.images)
        error = decibels(float(self.expected.square().sum()), float((found - self.expected).square().sum()))
        return [error, self.one.agreement(found, self.expected), self.right(found)]

    def right(self, found: Tensor) -> float:
        return self.one.right(found, self.truths, self.path)


def told(proof: Any) -> str:
    return "passed" if proof.passed else "; ".join(check.detail for check in proof.checks if not check.passed)


def published_row(one: Published, packages: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"file": Path(one.file).name, "shape": one.shape}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = Given(one, packages, folder)
        plain, out, theirs = (folder / f"{each}.onnx" for each in ("plain", "out", "theirs"))
        row["nodes"] = len(onnx.load(given.path).graph.node)
        r2cli.export(given.made, plain)
        row["away"] = away(run(plain, given.images), given.expected)
        result = r2cli.quantize(given.made, given.source, r2cli.PtqConfig(device="cpu"))
        r2cli.export(result, out)
        proof = r2cli.verify(out, result, given.source)
        row["proof"], row["share"] = told(proof), proof.measures["integer_share"]
        row["prepared"] = by_quantize_static(given.path, theirs, given.calibration)
        row["right"] = given.right(given.expected)
        row["ours"], row["theirs"] = given.likeness(out), given.likeness(theirs)
        files = [given.path, out, theirs]
        row["ms"] = milliseconds(files, given.images[:1])
        row["MB"] = [round(file.stat().st_size / 1e6, 2) for file in files]
    return row


Options = Mapping[str, Any]
W4A8: Options = {"weight_bits": 4}
# Methods that learn at 8 bits do so on FEW pictures, in STEPS steps a layer or block: what a slow machine can afford.
LEARNED, FEW, STEPS = ("adaround", "brecq"), 8, 20
LONG: Options = {"steps": 200, "calibration": 32}
FOUR = (W4A8, {**W4A8, "method": "brecq", **LONG})
EIGHT = ({"act_bits": "16"}, {"method": "brecq"})
# What `r2 compare` says to do next for its W8A8 file.
NAMED: Options = {"keep": ("model.2.cv1.conv=A16", "model.1.conv=A16", "model.2.m.0.cv1.conv=A16")}
# What is tried of each kind of picture beside W8A8 to the nearest level.
TRIED: Mapping[str, Sequence[Options]] = {
    "turned": (*FOUR, {**W4A8, "method": "adaround", **LONG}),
    "photographs": (NAMED, *FOUR),
    "pages": (*EIGHT, *FOUR),
    "lines": (*EIGHT, *FOUR),
}
TRAINED: Options = {"weight_bits": 4, "act_bits": "8", "epochs": 8, "batch_size": 8, "calibration": 256}
LONGER: Options = {**TRAINED, "epochs": 4, "calibration": 2048}  # which is four times as many steps, on other pictures
QAT: Mapping[str, Sequence[Options]] = {"turned": (TRAINED, LONGER), "lines": (TRAINED,)}


def shown(command: str, options: Options) -> str:
    """The command that does it."""
    pairs = [
        (name, each) for name, value in options.items() for each in (value if isinstance(value, tuple) else [value])
    ]
    return " ".join([f"`{command}", *(f"--{name.replace('_', '-')} {value}" for name, value in pairs)]) + "`"


def named(one: Published, command: str, options: Options) -> str:
    values = ["-".join(value) if isinstance(value, tuple) else str(value) for value in options.values()]
    return ".".join([Path(one.file).stem, command, *values, "json"])


def tried_row(one: Published, packages: Path, command: str, options: Options) -> dict[str, Any]:
    """One way to quantize a published file, or to train it at few bits (without labels, so what is learned are the
    float file's outputs)."""
    row: dict[str, Any] = {"file": Path(one.file).name, "options": shown(command, options)}
    with tempfile.TemporaryDirectory() as name:
        few = options.get("method") in LEARNED
        pictures = options.get("calibration", FEW if few else CALIBRATION)
        given, out = Given(one, packages, Path(name), pictures), Path(name) / "out.onnx"
        started = perf_counter()
        if command == "ptq":
            config = r2cli.PtqConfig(device="cpu", **{"steps": STEPS if few else None, **options})
            result: Any = r2cli.quantize(given.made, given.source, config)
        else:
            result = r2cli.finetune(given.made, given.source, r2cli.QatConfig(device="cpu", **options))
            row["losses"] = [epoch.loss for epoch in result.epochs]
        row["s"] = round(perf_counter() - started)
        r2cli.export(result, out)
        row["ours"] = given.likeness(out)
        row["MB"] = round(out.stat().st_size / 1e6, 2)
        row["proof"] = told(r2cli.verify(out, result, given.source, timed=False))
    return row


def likeness_cell(found: Sequence[float]) -> str:
    error, agreement, right = found
    return f"{error:.1f}, {agreement:.1f} %, {right:.1f} %"


def published_cells(row: dict[str, Any]) -> list[str]:
    first, *others = row["ms"]
    return [
        row["file"],
        "x".join(map(str, row["shape"])),
        str(row["nodes"]),
        f"{row['away']:.1e}",
        row["proof"],
        f"{row['share']:.1f} %",
        f"{row['right']:.1f} %",
        likeness_cell(row["ours"]),
        f"{likeness_cell(row['theirs'])}{'' if row['prepared'] else ' *'}",
        *(f"{each / first:.2f}" for each in others),
        *map(str, row["MB"]),
    ]


def tried_cells(row: dict[str, Any]) -> list[str]:
    return [row["file"], row["options"], likeness_cell(row["ours"]), str(row["MB"]), row["proof"]]


def kept(file: Path, make: Any, *given: Any) -> dict[str, Any]:
    """The row in `file`, made of what is `given` where it is not there."""
    if not file.exists():
        file.write_text(json.dumps(make(*given)))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Networks that come as ONNX files.")
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--packages", type=Path, help="the folder of the packages that hold published files")
    parser.add_argument("--work-dir", type=Path, default=Path("onnx"), help="a JSON file for every row")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    parser.add_argument("--no-new-rows", action="store_true", help="tables of the rows that are there already")
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    published: list[Any] = []
    tried_rows: list[Any] = []
    given = PUBLISHED if arguments.packages else ()
    for one in given:
        file = arguments.work_dir / f"{Path(one.file).stem}.json"
        published.append(kept(file, published_row, one, arguments.packages))
        print(published[-1], flush=True)
    for one in given:
        trials = [("ptq", each) for each in TRIED[one.kind]] + [("qat", each) for each in QAT.get(one.kind, ())]
        for command, options in trials:
            file = arguments.work_dir / named(one, command, options)
            if arguments.no_new_rows and not file.exists():
                continue
            tried_rows.append(kept(file, tried_row, one, arguments.packages, command, options))
            print(tried_rows[-1], flush=True)
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
            f"`dB`: of the output against the float file's, in ONNX Runtime, on {TEST} other pictures than the "
            f"{CALIBRATION} calibrated on; `agreement`: decisions that are the float file's; `right`: of what is in "
            "the pictures, directions, faces (average precision, overlap of a half), lines (harmonic mean of "
            "precision and recall, overlap of a half), and characters. Times of one image on one thread; median of 15, "
            f"in turn. The proof is on {PROVED} of the pictures. A * marks files that do not load after ONNX Runtime's "
            "own preparation (`quant_pre_process`): it was left out.",
            f"{machine()} ({runtime.cpu()}).",
            table(PUBLIC_HEAD, [published_cells(row) for row in published]),
            "Other ways (`r2 ptq FILE.onnx --data …`), learned on the same pictures; `qat` without labels, from the "
            "float file's outputs alone (`--loss distill`):",
            table(TRIED_HEAD, [tried_cells(row) for row in tried_rows]),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
