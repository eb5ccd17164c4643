"""Checkpoints: each is one safetensors file. A float checkpoint can be read without r2.

A float tensor is stored under its state_dict name. A quantized weight `p` is stored as `p.codes` (packed), `p.scale`,
and `p.zero_point` or `p.lut`. The metadata key `r2` holds JSON: format, model, input, class names, the codec of each
quantized tensor, the grid of each activation, and the history of commands. It holds no times, so that the same work
gives the same bytes.

Loading a checkpoint never runs code: safetensors holds only tensors and text.
"""

import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from r2cli import __version__
from r2cli.config import targets
from r2cli.errors import InputError
from r2cli.quantized.coded import Codec, Coded
from r2cli.quantized.grid import Grid
from r2cli.quantized.packing import packed_bytes, unpack
from r2cli.quantized.palette import Palette
from r2cli.storage import finite, schema
from r2cli.storage.atomic import write_atomically
from r2cli.storage.formats import ActivationEntry, CheckpointEntry, CodecEntry, InputEntry, ModelEntry, PalettesEntry
from r2cli.storage.input_spec import InputSpec as InputSpec
from r2cli.storage.input_spec import NetworkInput, TensorSpec, TensorsSpec
from r2cli.storage.keywords import is_own, require_safe
from r2cli.storage.schema import Malformed, of_text

FORMAT = 1


@dataclass(frozen=True)
class ModelSpec:
    """What `models.build` needs to make the network again. `stem` is 'small' (stride 1) or 'imagenet'.

    `args` are the keywords of the network's factory. `factory` is the user's own code, and is never written to a file:
    the file holds its name, and the code runs only when the command line names it.
    """

    name: str
    classes: int
    channels: int = 3
    stem: str = "imagenet"
    width: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    factory: Callable[..., Any] | None = field(default=None, compare=False, repr=False)

    def described(self) -> dict[str, Any]:
        """Return the spec as it is written to JSON."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "factory"}


def model_spec(entry: ModelEntry, origin: str) -> ModelSpec:
    """The network that the checkpoint `origin` names.

    Raises InputError for keywords with which the network's factory could load something.
    """
    # The keywords of the user's own code need no check: that code runs only when the command line names it.
    if not is_own(entry.name):
        require_safe(entry.name, entry.args, origin)
    return ModelSpec(entry.name, entry.classes, entry.channels, entry.stem, entry.width, entry.args)


def input_spec(entry: InputEntry) -> NetworkInput:
    """The inputs that a checkpoint, or an ONNX file of ours, records. Raises Malformed for half of a preprocessing."""
    if entry.tensors:
        names = [one.name for one in entry.tensors]
        if len(set(names)) < len(names):
            raise Malformed(f"'input' has two tensors of one name: {', '.join(names)}")
        largest = max(math.prod(one.shape) for one in entry.tensors)
        if largest > LARGEST_INPUT:
            raise Malformed(f"'input' has a tensor of {largest} numbers, which none of ours has")
        return TensorsSpec(tuple(TensorSpec(one.name, one.shape, one.kind, one.most) for one in entry.tensors))
    if entry.channels is None or entry.size is None or entry.resize is None:
        raise Malformed("'input' lacks its channels, size or resize")
    spec = InputSpec(entry.channels, entry.size, entry.resize, entry.mean, entry.std, entry.tokenizer, entry.width)
    if {len(spec.mean), len(spec.std)} != {0 if spec.is_text else spec.channels}:
        raise Malformed(f"'input' has {spec.channels} channels, {len(spec.mean)} means, {len(spec.std)} deviations")
    return spec


LARGEST_INPUT = 1 << 28  # numbers of one sample: a file cannot make us take memory for more
LOGITS = ("logits",)  # the outputs of a classifier


@dataclass(frozen=True)
class Checkpoint:
    """A network: float, or with quantized weights and perhaps quantized activations.

    `floats` and `coded` together hold every tensor of the network's state_dict, by name. `folded` says that every
    BatchNorm was folded into the scales and biases of the layer before it, and is no longer in the network.
    `activations` maps the name of a node in the traced graph to the grid of its output. `target` is the row of
    `config.targets` that the grids were found for. `outputs` are the names of what the network gives, in order.
    """

    model: ModelSpec
    input: NetworkInput
    class_names: tuple[str, ...]
    floats: Mapping[str, Tensor]
    coded: Mapping[str, Coded] = field(default_factory=dict)
    activations: Mapping[str, Grid] = field(default_factory=dict)
    folded: bool = False
    history: tuple[Mapping[str, Any], ...] = ()
    target: str = targets.DEFAULT
    origin: str = field(default="the checkpoint", compare=False)  # the file it was read from, for messages
    outputs: tuple[str, ...] = LOGITS

    def then(self, command: str, options: Mapping[str, Any], metrics: Mapping[str, Any]) -> "Checkpoint":
        """Return this checkpoint with one more entry in its history."""
        versions = {"r2cli": __version__, "torch": torch.__version__.split("+")[0]}
        entry = {"command": command, "options": dict(options), "versions": versions, "metrics": dict(metrics)}
        return replace(self, history=(*self.history, entry))

    @property
    def bits_per_weight(self) -> float:
        """Bits of all weights, those that stay float too, with scales and tables, for each weight.

        Biases and other tensors of one axis are no weights.
        """
        floats = [one for one in self.floats.values() if one.ndim > 1 and one.is_floating_point()]
        sizes = [one.payload_bytes() for one in self.coded.values()] + [one.numel() * 4 for one in floats]
        count = sum(one.count for one in self.coded.values()) + sum(one.numel() for one in floats)
        return 8 * sum(sizes) / count if count else 32.0


def require_float(checkpoint: Checkpoint) -> None:
    """Raise InputError for a checkpoint whose weights are codes already."""
    if checkpoint.coded:
        raise quantized_already(checkpoint.origin)


def quantized_already(origin: str) -> InputError:
    """Return the error for the file `origin`, whose weights are codes already."""
    return InputError(f"{origin} is quantized already: give the float one that it was made from")


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write `checkpoint` to `path`, atomically. Raises R2Error if the file cannot be written."""
    write_atomically(path, to_bytes(checkpoint))


def to_bytes(checkpoint: Checkpoint) -> bytes:
    """Return the bytes of the checkpoint's file. Equal checkpoints give equal bytes."""
    tensors = _plain(checkpoint.floats)
    codecs = {}
    for name, coded in checkpoint.coded.items():
        tensors[f"{name}.codes"] = coded.packed()
        parts, codecs[name] = described(coded.codec, coded.codes.shape)
        tensors |= {
            f"{name}.{part}": tensor.clone(memory_format=torch.contiguous_format) for part, tensor in parts.items()
        }
    activations = {}
    for node, grid in checkpoint.activations.items():
        _, activations[node] = _describe(grid)
        # JSON keeps float32 values exactly: Python writes the shortest text that reads back as the same float64.
        activations[node] |= {"scale": grid.scale.item(), "zero_point": int(grid.zero_point.item())}
    meta = {
        "format": FORMAT,
        "model": checkpoint.model.described(),
        "input": checkpoint.input.described(),
        "class_names": checkpoint.class_names,
        "codecs": codecs,
        "activations": activations,
        "folded": checkpoint.folded,
        "history": checkpoint.history,
        "target": checkpoint.target,
    }
    if checkpoint.outputs != LOGITS:
        meta["outputs"] = checkpoint.outputs
    return safetensors.torch.save(tensors, {"r2": json.dumps(meta, sort_keys=True)})


def load(path: Path) -> Checkpoint:
    """Read an r2 checkpoint.

    Raises InputError for a file that is missing, damaged, not from r2, or holds NaN or infinite values.
    """
    tensors, metadata = load_tensors(path)
    if "r2" not in metadata:
        raise InputError(f"{path} is a safetensors file but not an r2 checkpoint: make one with `r2 pretrain`")
    with _told_of(path):
        entry = _entry(metadata["r2"], path)
        spec, given = model_spec(entry.model, str(path)), input_spec(entry.input)
        names = len(entry.class_names) if isinstance(given, InputSpec) and entry.class_names else spec.classes
        if spec.classes != names or spec.channels != given.channels:
            raise Malformed(f"'class_names' are {len(entry.class_names)}, the network has {spec.classes} classes")
        if not entry.outputs or len(set(entry.outputs)) < len(entry.outputs):
            raise Malformed(f"'outputs' are {', '.join(entry.outputs) or 'none'}, and each has a name of its own")
        coded = {name: _coded(name, own, tensors) for name, own in entry.codecs.items()}
        activations = {node: _activation_grid(own) for node, own in entry.activations.items()}
        if entry.target not in targets.TARGETS:
            raise Malformed(f"'target' is {entry.target[:40]!r}, which is none of `r2 targets`")
    checkpoint = Checkpoint(
        spec,
        given,
        entry.class_names,
        tensors,  # what is left: `_coded` removed the codes, scales, zero points and tables
        coded,
        activations,
        entry.folded,
        entry.history,
        entry.target,
        origin=str(path),
        outputs=entry.outputs,
    )
    _require_finite(checkpoint, path)
    return checkpoint


def load_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of any safetensors file by their state_dict names. Quantized ones are decoded to float32.

    Raises InputError for a file that is missing or damaged.
    """
    coded, floats = load_coded(path)
    return {**floats, **{name: one.decode() for name, one in coded.items()}}


def load_coded(path: Path) -> tuple[dict[str, Coded], dict[str, Tensor]]:
    """Return the coded tensors of any safetensors file, and the others. Raises InputError as `load_tensors` does."""
    tensors, metadata = load_tensors(path)
    with _told_of(path):
        codecs = of_text(PalettesEntry, metadata["r2"]).codecs if "r2" in metadata else {}
        coded = {name: _coded(name, entry, tensors) for name, entry in codecs.items()}
    return coded, tensors


def has_network(path: Path, recorded: str) -> tuple[bool, bool]:
    """Whether the metadata `recorded` in `path` names a network, and whether weights are codes."""
    with _told_of(path):
        entry = of_text(PalettesEntry, recorded)
    return entry.model is not None, bool(entry.codecs)


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    try:
        yield
    except Malformed as error:
        raise InputError(f"{path} has damaged r2 metadata ({error}): write it again") from error


def _entry(recorded: str, path: Path) -> CheckpointEntry:
    """The metadata of a checkpoint with a network. Raises InputError for another version's, and Malformed."""
    meta = schema.parsed(recorded)
    version = meta.get("format") if isinstance(meta, dict) else None
    if version != FORMAT:
        raise InputError(f"{path} has format {version}, this r2 reads {FORMAT}: install the r2cli that wrote it")
    if meta.get("model", "") is None:
        raise InputError(f"{path} holds palettes of a file without a network: `r2 analyze` shows them")
    return schema.read(CheckpointEntry, meta)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors and the metadata of any safetensors file. Raises InputError if it is missing or damaged."""
    if path.is_dir():
        raise InputError(f"{path} is a directory: name the .safetensors file in it")
    if not path.exists():
        raise InputError(f"{path} does not exist: name a checkpoint, or make one with `r2 pretrain`")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _unmapped(file.get_tensor(name)) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}): copy or write it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _unmapped(tensor: Tensor) -> Tensor:
    """`tensor` in memory of its own: Windows replaces no file that is mapped, as what safetensors gives may be."""
    return tensor.clone() if sys.platform == "win32" else tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to a safetensors file, atomically. Training keeps its resume state in such a file."""
    write_atomically(path, safetensors.torch.save(_plain(tensors), dict(metadata)))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make tensors fit for safetensors: contiguous, and no two of them in the same memory (as tied weights are)."""
    out: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        out[name] = dense.clone() if dense.untyped_storage().data_ptr() in seen else dense
        seen.add(out[name].untyped_storage().data_ptr())
    return out


def into(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load `tensors` into `module`, as those of its own version: mnasnet reads the version beside the tensors."""
    given = OrderedDict(tensors)
    given._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(given)


def described(codec: Codec, shape: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a codec, and the shape of its codes, into the tensors and the JSON that are written to a file."""
    parts, entry = _describe(codec)
    return parts, entry | {"shape": list(shape)}


def _describe(codec: Codec) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a codec into the tensors and the JSON that are written to a file."""
    parts = {"scale": codec.scale}
    entry: dict[str, Any] = {"bits": codec.bits, "axis": codec.axis}
    if isinstance(codec, Palette):
        return parts | {"lut": codec.lut}, entry | {"kind": "palette", "weight_shape": list(codec.shape)}
    if bool(codec.zero_point.any()):  # symmetric grids have zeros only, which `_coded` puts back
        parts["zero_point"] = codec.zero_point
    entry |= {"group": codec.group} if codec.group else {}
    return parts, entry | {"kind": "grid", "signed": codec.signed, "odd": codec.midrise}  # the format's word


def _coded(name: str, entry: CodecEntry, tensors: dict[str, Tensor]) -> Coded:
    """Read the quantized tensor `name`, and remove its parts from `tensors`. Raises Malformed where they do not fit."""
    count, is_palette = math.prod(entry.shape), entry.kind == "palette"
    packed = _part(tensors, name, "codes", torch.uint8, (packed_bytes(count, entry.bits),))
    weight = entry.weight_shape if is_palette else entry.shape
    if entry.axis is not None and entry.axis >= len(weight):
        raise Malformed(f"'codecs.{name}.axis' is {entry.axis}, the weight has {len(weight)} axes")
    along: tuple[int, ...] = () if entry.axis is None else (weight[entry.axis],)
    if entry.group:
        if is_palette or entry.axis != 0 or len(weight) != 2:
            raise Malformed(f"'codecs.{name}.group' is {entry.group}, and only grids of a matrix have groups")
        along = weight[0], -(-weight[1] // entry.group)
    scale = _part(tensors, name, "scale", torch.float32, along)
    codec: Codec
    if is_palette:
        codec, signed = Palette(_lut(tensors, name, entry), scale, entry.bits, weight, entry.axis), False
    else:
        zero = torch.zeros_like(scale, dtype=torch.int32)
        zero = _part(tensors, name, "zero_point", torch.int32, along) if f"{name}.zero_point" in tensors else zero
        codec = Grid(
            scale, zero, entry.bits, entry.signed, entry.axis, entry.odd, entry.group, weight[-1] * bool(entry.group)
        )
        signed = codec.lowest < 0
    codes = unpack(packed, entry.bits, count, signed).reshape(entry.shape)
    if entry.bits in (5, 6, 7) and bool((packed >> entry.bits).any()):  # these codes have a byte each
        raise Malformed(f"'{name}.codes' are not all of {entry.bits} bits")
    return Coded(codec, codes)


def _part(tensors: dict[str, Tensor], name: str, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Take a part of the coded tensor `name` out of `tensors`. Raises Malformed where it is not what its codec says."""
    found = tensors.pop(f"{name}.{part}", None)
    if found is None:
        raise Malformed(f"the tensor '{name}.{part}' is missing")
    if found.dtype != dtype or tuple(found.shape) != shape:
        raise Malformed(f"'{name}.{part}' is {found.dtype} {tuple(found.shape)}, not {dtype} {shape}")
    return found


def _lut(tensors: dict[str, Tensor], name: str, entry: CodecEntry) -> Tensor:
    """Take the tables of a palette out of `tensors`. Raises Malformed where the codes are not those of its weight."""
    lut = tensors.get(f"{name}.lut")
    if lut is None or lut.ndim != 3 or len(entry.shape) != 2 or not entry.weight_shape:
        raise Malformed(f"'{name}.lut' is no palette's: it has three axes, its codes two, and its weight one or more")
    groups, vectors = entry.shape
    blocks = -(-entry.weight_shape[0] // max(1, lut.shape[2]))
    if groups * vectors != blocks * math.prod(entry.weight_shape[1:]):
        raise Malformed(f"'codecs.{name}' has {groups * vectors} codes, which are not those of {entry.weight_shape}")
    dtype = torch.int8 if lut.dtype == torch.int8 else torch.float32
    return _part(tensors, name, "lut", dtype, (groups, 1 << entry.bits, max(1, lut.shape[2])))


def _activation_grid(entry: ActivationEntry) -> Grid:
    """Read the grid of an activation from its JSON."""
    scale, zero = torch.tensor(entry.scale), torch.tensor(entry.zero_point, dtype=torch.int32)
    return Grid(scale, zero, entry.bits, entry.signed, None, entry.odd)


def _require_finite(checkpoint: Checkpoint, path: Path) -> None:
    """Raise InputError with the name of the first tensor that holds NaN or infinite values."""
    parts = {f"{name}.scale": coded.codec.scale for name, coded in checkpoint.coded.items()}
    parts |= {f"{name}.lut": c.codec.lut for name, c in checkpoint.coded.items() if isinstance(c.codec, Palette)}
    parts |= {f"activation {node}": grid.scale for node, grid in checkpoint.activations.items()}
    way_out = "the training that wrote it diverged, so train again with a lower --lr"
    finite.require({**checkpoint.floats, **parts}, str(path), way_out)
