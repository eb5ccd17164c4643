"""Where a file is to run: a row for each target says what its file is like, and whether r2 has seen it run there.

A target that wants the zero point 0 (`symmetric`) changes the numbers: grids of activations are found for it. All else
is another form of the same numbers: INT8 codes are UINT8 codes less 128, unpacked codes are packed ones, and a bias on
the grid of its layer's sums is the same in float and in INT32.

`require` checks options before any work; `r2cli.deploy.retarget` checks a checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from r2cli.config import layer_form
from r2cli.config.layer_form import LayerForm
from r2cli.errors import InputError, unknown

LEAST_OPSET, MOST_OPSET = 13, 21
WIDE_OPSET = 21  # the first that has activations of 16 bits
ONNX, TFLITE = "onnx", "tflite"
READ = "documents only"
PER_CHANNEL_ZEROS = (1, 27)  # the first ONNX Runtime that runs a weight whose channels have different zero points


@dataclass(frozen=True)
class Target:
    """One target. The defaults are those of the plain file that r2 writes for ONNX Runtime.

    `runs` says what has run its files, or that r2 knows it from documents only. `batch` None is any number of images.
    `least_act_bits` is more than 4 where codes of activations cannot be clipped, and `most_act_bits` 16 where they may
    have two bytes. `weights_alone` says whether integer
    weights may stand beside float activations.
    """

    name: str
    about: str
    runs: str = READ
    container: str = ONNX
    most_opset: int = MOST_OPSET
    signed: bool = False  # INT8 codes of activations, or UINT8
    symmetric: bool = False  # their zero point is 0
    least_act_bits: int = 8
    most_act_bits: int = 8  # or 16
    packed: bool = False  # codes of 4 to 1 bits, or INT8 for all
    integer_biases: bool = True  # INT32 behind a DequantizeLinear, or float32
    weight_zero_points: bool = False
    weights_alone: bool = True
    integers: bool = True
    batch: int | None = None
    codes_of_result: bool = False  # the network's result has a grid too, and is given as codes

    @property
    def clips_codes(self) -> bool:
        """Whether codes may be clipped between QuantizeLinear and DequantizeLinear."""
        return self.least_act_bits < 8


DEFAULT = "onnxruntime"
ETHOS_U = "ethos-u"
HERE = "ONNX Runtime 1.17 to 1.32"
ROWS = (
    Target(
        DEFAULT,
        "any processor",
        f"{HERE}, tract 0.23, TVM 0.27, OpenCV 5",
        least_act_bits=1,
        most_act_bits=layer_form.WIDE_BITS,
        packed=True,
        weight_zero_points=True,
    ),
    Target(
        "openvino",
        "Intel processors",
        "OpenVINO 2026.4",
        most_act_bits=layer_form.WIDE_BITS,
        packed=True,
        weight_zero_points=True,
    ),
    Target("tensorrt", "NVIDIA GPUs", signed=True, symmetric=True, integer_biases=False, weights_alone=False),
    Target("qnn", "Qualcomm NPUs", most_act_bits=layer_form.WIDE_BITS, packed=True, batch=1),
    Target("npu", "other NPUs", weights_alone=False, batch=1),
    Target("xnnpack", "phones' processors", signed=True, packed=True),
    Target("rknn", "Rockchip NPUs", most_opset=19, batch=1),
    Target("st", "STM32", most_opset=20, signed=True, batch=1),
    Target(
        "tflite",
        "LiteRT, microcontrollers",
        "LiteRT 2.3",
        container=TFLITE,
        signed=True,
        weights_alone=False,
        batch=1,
        codes_of_result=True,
    ),
    Target(
        ETHOS_U,
        "Arm Ethos-U",
        "Vela 5.2, LiteRT 2.3",
        container=TFLITE,
        signed=True,
        weights_alone=False,
        batch=1,
        codes_of_result=True,
    ),
    Target("float", "other quantizers", HERE, integers=False),
)
TARGETS = {row.name: row for row in ROWS}


def get(name: str) -> Target:
    """The row of a target. Raises InputError for an unknown one, which names the nearest."""
    if name not in TARGETS:
        raise unknown("--target", name, TARGETS)
    return TARGETS[name]


def require(
    name: str, *, act_bits: int | None, zero_points: bool = False, per_channel: bool = True, integers: bool = True
) -> None:
    """Raise InputError where the target cannot hold what is asked for, with the way out.

    `act_bits` is None where activations stay float. `zero_points` says that weights have their own, `per_channel` that
    each channel has. `integers` is False for palettes of float values.
    """
    row, flag = get(name), f"--target {name}"
    if not row.integers:
        raise InputError(f"{flag} is the float network, which needs no codes: write it with `r2 export {flag}`")
    require_installed(name)
    if act_bits is None and not row.weights_alone:
        raise InputError(f"{flag} reads integer weights beside integer activations only: give --act-bits 8")
    if act_bits is not None and act_bits < row.least_act_bits:
        raise InputError(f"{flag} has no activations of {act_bits} bits: give --act-bits 8, or another target")
    if act_bits is not None and act_bits > row.most_act_bits:
        raise InputError(f"{flag} has no activations of {act_bits} bits: give 8, or --target {DEFAULT}")
    if not integers and not row.packed:
        raise InputError(f"{flag} takes INT8 weights, and a palette of float values is none: give --lut-bits 8")
    if zero_points and not row.weight_zero_points:
        raise InputError(f"{flag} takes weights whose zero point is 0: give --symmetric")
    if zero_points and per_channel and act_bits is not None and _onnxruntime() < PER_CHANNEL_ZEROS:
        found = ".".join(map(str, _onnxruntime()))
        raise InputError(
            f"--asymmetric gives each channel its own zero point, which ONNX Runtime {found} cannot "
            "run (1.27 can): give --granularity tensor or unfolded, or --symmetric"
        )


def require_forms(name: str, forms: Sequence[LayerForm], *, act_bits: int | None) -> None:
    """Raise InputError where the target cannot hold what --keep says of layers, as `require` does."""
    for form in forms:
        own = act_bits if form.act_bits is None else form.act_bits
        if form.act_bits is not None and act_bits is None:
            raise InputError(f"--keep …={form.word} puts values on grids, and --act-bits none leaves all of them float")
        if form.is_float and get(name).container == TFLITE:
            raise InputError(f"--target {name} takes no float layers beside integers: give 8 in place of float")
        finest = form.granularity in (None, "channel")
        require(name, act_bits=own, zero_points=form.symmetric is False, per_channel=finest)


def require_opset(opset: int | None, act_bits: int | None, forms: Sequence[LayerForm]) -> None:
    """Raise InputError for an --opset that has no activations of 16 bits, where some are asked for."""
    if opset is not None and opset < WIDE_OPSET and layer_form.WIDE_BITS in (act_bits, *(f.act_bits for f in forms)):
        raise InputError(f"activations of 16 bits exist from opset {WIDE_OPSET} on: give --opset {WIDE_OPSET}")


def require_installed(name: str) -> None:
    """Raise InputError where the target's file needs a library that is not there."""
    if get(name).container == TFLITE and find_spec("ai_edge_litert") is None:
        raise InputError(f"--target {name} needs LiteRT: install it with pip install 'r2cli[tflite]'")


def is_tflite(path: Path) -> bool:
    """Whether the file at `path` is one of TensorFlow Lite, by its fifth to eighth byte. False where there is none."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8)[4:] == b"TFL3"


def _onnxruntime() -> tuple[int, ...]:
    from importlib.metadata import version  # which takes a tenth of `r2 --help`

    return tuple(map(int, version("onnxruntime").split(".")[:2]))


def beside(output: Path, name: str) -> Path:
    """The file of the target `name` beside the checkpoint `output`."""
    return output.with_suffix(f".{get(name).container}")


def batch(text: str) -> int | None:
    """What `--batch` says: a number of images, or None for 'dynamic'. Raises InputError for anything else."""
    if text == "dynamic":
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1 << 16):
        raise InputError(f"--batch {text} is impossible: give a number from 1, or dynamic")
    return int(text)


def require_ending(path: str | Path | None, name: str) -> None:
    """Raise InputError for a file of the target `name` that is to be a folder, or to end as another container's do."""
    container = get(name).container
    if path is not None and (Path(path).is_dir() or Path(path).suffix in {".onnx", ".tflite"} - {f".{container}"}):
        raise InputError(f"{path} is no name for a file of target {name}: give one that ends in .{container}")
