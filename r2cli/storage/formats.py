"""What the JSON in r2's own files may hold, one class a format; `schema.read` makes them, and refuses all else.

CheckpointEntry    key `r2` of a checkpoint's metadata
PalettesEntry      the same in a file of palettes without a network
OnnxEntry          what an ONNX file of ours records under `r2.input`, `r2.history` and `r2.class_names`
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from r2cli.storage.schema import UNBOUNDED, Between

# No network of ours comes near these, and a file cannot make us take memory for more.
Size = Annotated[int, Between(1, 1 << 14)]  # pixels or tokens
Count = Annotated[int, Between(1, 1 << 20)]  # of classes, channels, or entries along an axis
Bits = Annotated[int, Between(1, 8)]
Positive = Annotated[float, Between(1e-38, 3e38)]  # a scale: float32, and neither zero nor infinite
Int32 = Annotated[int, Between(-(2**31), 2**31 - 1)]


@dataclass(frozen=True)
class ModelEntry:
    name: str
    classes: Annotated[int, Between(0, 1 << 20)]
    channels: Count
    stem: Literal["small", "imagenet"]
    width: Annotated[float, Between(1e-3, 64)]
    args: Mapping[str, Any] = field(default_factory=dict)  # files of 0.1 have none


@dataclass(frozen=True)
class InputTensorEntry:
    name: str
    shape: tuple[Annotated[int, Between(1, 1 << 30)], ...]
    kind: Literal["float32", "int64", "int32", "int16", "int8", "uint8", "bool"]
    most: Annotated[int, Between(0, 2**53)] = 0


@dataclass(frozen=True)
class InputEntry:
    """An image or a text has all but `tensors`; other inputs are `tensors` alone."""

    channels: Count | None = None
    size: Size | None = None
    resize: Size | None = None
    mean: tuple[float, ...] = ()
    std: tuple[Positive, ...] = ()
    tokenizer: str = ""
    width: Annotated[int, Between(0, 1 << 14)] = 0
    tensors: tuple[InputTensorEntry, ...] = ()


@dataclass(frozen=True)
class CodecEntry:
    """A grid has `signed` and `odd`, a palette has `weight_shape`."""

    kind: Literal["grid", "palette"]
    bits: Bits
    shape: tuple[Annotated[int, Between(1, 1 << 40)], ...]
    axis: Annotated[int, Between(0, 7)] | None
    signed: bool = False
    odd: bool = False
    group: Annotated[int, Between(0, 1 << 20)] = 0
    weight_shape: tuple[Annotated[int, Between(1, 1 << 40)], ...] = ()


@dataclass(frozen=True)
class ActivationEntry:
    scale: Positive
    zero_point: Int32
    bits: Annotated[int, Between(1, 16)]
    signed: bool
    odd: bool
    axis: None = None


@dataclass(frozen=True)
class CheckpointEntry:
    model: ModelEntry
    input: InputEntry
    class_names: tuple[str, ...]
    codecs: Mapping[str, CodecEntry]
    activations: Mapping[str, ActivationEntry]
    folded: bool
    history: tuple[Mapping[str, Any], ...]
    target: str = "onnxruntime"
    outputs: tuple[str, ...] = ("logits",)


@dataclass(frozen=True)
class PalettesEntry:
    """`model` is None where there is no network: what is read of a file before its network is."""

    codecs: Mapping[str, CodecEntry]
    model: Mapping[str, Any] | None


@dataclass(frozen=True)
class OnnxEntry:
    input: InputEntry
    class_names: tuple[str, ...]
    history: tuple[Mapping[str, Any], ...]
    outputs: tuple[str, ...] = ("logits",)


@dataclass(frozen=True)
class MetricEntry:
    name: str
    label: str
    unit: str
    higher: bool
    value: float
    shown: str


@dataclass(frozen=True)
class MeasuredOn:
    """The samples that a metric was measured on, and its keywords."""

    data: str
    samples: int
    metric_arg: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeasuredReport:
    """What is read of any report that has a metric."""

    metric: MetricEntry | None = None
    measured_on: MeasuredOn | None = None


@dataclass(frozen=True)
class TrainedReport:
    top1: float | None
    range_mean: float
    range_max: float
    parameters: int
    unreadable: tuple[str, ...]
    metric: MetricEntry | None = None


@dataclass(frozen=True)
class PalettesReport:
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class CheckEntry:
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class EmbeddingsEntry:
    coded: int
    float: int


@dataclass(frozen=True)
class CompressedReport(PalettesReport):
    """Of every command that writes a file of the network; without training before it has no float value."""

    checks: tuple[CheckEntry, ...]
    overflow_db: Annotated[float, UNBOUNDED] | None
    embeddings: EmbeddingsEntry | None
    top1: float | None = None
    float_top1: float | None = None
    entropy_coded_bits: float | None = None
    metric: MetricEntry | None = None
    float_value: float | None = None
    latency_ms: float | None = None
    float_latency_ms: float | None = None
    latency_ratio: float | None = None
    latency_costs: Mapping[str, float] | None = None
