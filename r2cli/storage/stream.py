"""The tensors of any safetensors file, read in pieces, so that memory does not grow with the file.

A safetensors file is 8 bytes of header length, the header (JSON: dtype, shape and byte range of every tensor), and the
bytes. Pieces are read into memory that the reader provides. A mapped file would be no faster, and its pages would count
as memory of the process.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import torch
from torch import Tensor

from r2cli.errors import InputError
from r2cli.quantized.scratch import Scratch
from r2cli.storage import pth, schema
from r2cli.storage.schema import LARGEST, Between, Malformed

# Elements of one piece, a megabyte of float32: small enough that all steps on a piece find it in the processor's cache.
PIECE = 1 << 18
TABLE: Any = Mapping[str, Any]
TEXTS: Any = Mapping[str, str]
MOST_HEADER = 100_000_000  # bytes; the safetensors format sets this limit

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in the header of a safetensors file; `data_offsets` are its first byte and the one after its last."""

    dtype: str
    shape: tuple[Annotated[int, Between(0, LARGEST)], ...]
    data_offsets: tuple[Annotated[int, Between(0, LARGEST)], ...]


@dataclass(frozen=True)
class IndexEntry:
    """An index of shards: which file holds a tensor."""

    weight_map: Mapping[str, str]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file or in memory that can be read in pieces.

    `read(start, stop, memory)` gives its elements start to stop in order, 1-D and in its own dtype. They are in
    `memory`, where the next read with it overwrites them, or in the tensor's own. `dtype` is None, and nothing can be
    read, where torch has no such type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    kind: str  # the dtype's name, in the file's words where torch has none
    file: str  # where it is from, for messages
    read: Callable[[int, int, Scratch], Tensor]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * (self.dtype.itemsize if self.dtype else 1)

    def pieces(self, elements: int = PIECE, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield the elements from `start` to `stop` in pieces of at most `elements`. Each overwrites the one before."""
        end, memory = self.size if stop is None else stop, Scratch()
        for at in range(start, end, elements):
            yield self.read(at, min(end, at + elements), memory)


def from_memory(name: str, tensor: Tensor, file: str) -> Stored:
    """Wrap a tensor in memory, so that it reads like one in a file."""
    flat = tensor.detach().contiguous().reshape(-1)
    kind = str(tensor.dtype).removeprefix("torch.")
    return Stored(name, tuple(tensor.shape), tensor.dtype, kind, file, lambda start, stop, _: flat[start:stop])


def tensors_of_model(path: Path) -> list[Stored]:
    """Return the tensors of a model: a safetensors file, an index of shards, a directory that holds one of them, or a
    file that torch.save wrote.

    They are sorted by name, and numbers within names by value ('layer.2' before 'layer.10'). Raises InputError with the
    name of the file and of the tensor that cannot be read.
    """
    if path.is_dir():
        path = _in_directory(path)
    if path.is_file() and pth.is_saved_by_torch(path):
        tensors = [
            from_memory(name, tensor, str(path)) for name, tensor in pth.with_masks_applied(pth.load(path)).items()
        ]
    else:
        tensors = _of_shards(path) if path.name.endswith(".index.json") else tensors_of_file(path)

    def natural(stored: Stored) -> list[str]:
        # Zeros in front make text sort as numbers do.
        return [part.zfill(12) if part.isdigit() else part for part in re.split(r"(\d+)", stored.name)]

    return sorted(tensors, key=natural)


def tensors_of_file(path: Path) -> list[Stored]:
    """Return the tensors of one safetensors file in the order of their bytes. Raises InputError for a damaged file."""
    entries, _, start = _header(path)
    descriptor = _Descriptor(path)
    tensors = [
        (entry.data_offsets[0], _stored(path, name, entry, start, descriptor)) for name, entry in entries.items()
    ]
    # Reading from front to back is what disks do best.
    return [stored for _, stored in sorted(tensors, key=lambda pair: pair[0])]


def metadata(path: Path) -> Mapping[str, str]:
    """Return the metadata of one safetensors file: texts by name. What torch.save wrote has none."""
    if path.is_file() and pth.is_saved_by_torch(path):
        return {}
    return _header(path)[1]


# --- one file ------------------------------------------------------------------------------------------------------


class _Descriptor:
    """An open file that closes when the last tensor that reads from it is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):  # it is missing where os.open failed
            os.close(self.number)

    def read(self, offset: int, buffer: memoryview, name: str) -> None:
        """Fill `buffer` with the bytes at `offset`. Raises InputError with the tensor's `name`."""
        while buffer:  # one call may read less than it is asked for
            try:
                got = _read_at(self.number, buffer, offset)
            except OSError as error:
                raise InputError(f"{self.path}: tensor '{name}' cannot be read ({error.strerror or error})") from error
            if not got:
                raise InputError(f"{self.path} ends inside the tensor '{name}': copy or write it again")
            offset, buffer = offset + got, buffer[got:]


def _read_at(number: int, buffer: memoryview, offset: int) -> int:
    """Read bytes of an open file from `offset` on into `buffer`, and return how many."""
    if hasattr(os, "preadv"):  # it keeps no position in the file, so threads can share the descriptor
        return os.preadv(number, [buffer], offset)
    with _moving:
        os.lseek(number, offset, os.SEEK_SET)
        part = os.read(number, len(buffer))
    buffer[: len(part)] = part
    return len(part)


_moving = Lock()  # of the position in any file, on Windows


def _stored(path: Path, name: str, entry: TensorEntry, start: int, descriptor: _Descriptor) -> Stored:
    """Return the tensor that `entry` of the header describes. Its file's tensors begin at the offset `start`."""
    dtype = DTYPES.get(entry.dtype)
    base = start + entry.data_offsets[0]

    def read(first: int, last: int, memory: Scratch) -> Tensor:
        assert dtype is not None
        part = memory.take((last - first) * dtype.itemsize, torch.uint8)
        descriptor.read(base + first * dtype.itemsize, part.numpy().data.cast("B"), name)
        return part.view(dtype)

    kind = str(dtype).removeprefix("torch.") if dtype else entry.dtype
    return Stored(name, entry.shape, dtype, kind, str(path), read)


def _header(path: Path) -> tuple[dict[str, TensorEntry], Mapping[str, str], int]:
    """Return the header: tensors by name, and the metadata; and the offset of the first tensor's bytes.

    Raises InputError for anything that the format does not allow.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory: name the .safetensors file in it")
    if not path.exists():
        raise InputError(f"{path} does not exist: name a .safetensors, .pth or .onnx file")
    try:
        pth.require_known(path)
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            # Checked before the read: a damaged length must not make us ask for terabytes.
            if total < 8 or length > MOST_HEADER or 8 + length > total:
                raise InputError(f"{path} is not a safetensors file, or its header is cut off: copy or write it again")
            header = dict(schema.read(TABLE, schema.parsed(file.read(length))))
        texts = schema.read(TEXTS, header.pop("__metadata__", {}), "__metadata__")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Malformed as error:
        raise InputError(f"{path} is not a safetensors file (its header: {error}): name another") from error
    entries = {name: _sound(path, name, entry, total - 8 - length) for name, entry in header.items()}
    return entries, texts, 8 + length


def _sound(path: Path, name: str, stored: Any, room: int) -> TensorEntry:
    """The entry of a tensor. Raises InputError unless it describes one within the file's `room` bytes."""
    try:
        entry = schema.read(TensorEntry, stored)
        start, stop = entry.data_offsets
        itemsize = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
        elements = prod(length or 1 for length in entry.shape)
        length = elements if all(entry.shape) else 0
        # Of a type that torch lacks, eight elements or fewer share a byte.
        fits = start <= stop and (length * itemsize == stop - start if itemsize else length <= 8 * (stop - start))
    except ValueError as error:  # Malformed, or not two offsets
        raise _damaged(path, name) from error
    if not fits or elements > LARGEST:
        raise _damaged(path, name)
    if stop > room:
        raise InputError(f"{path} ends inside the tensor '{name}': copy or write it again")
    return entry


def _damaged(path: Path, name: str) -> InputError:
    return InputError(f"{path}: the header's entry of '{name}' is damaged: copy or write the file again")


# --- several files -------------------------------------------------------------------------------------------------


def _in_directory(folder: Path) -> Path:
    """Return the one model in `folder`. Raises InputError where there is none, or more than one."""
    try:
        # The index first: the shards beside it are safetensors files too.
        for pattern in ("*.safetensors.index.json", "*.safetensors"):
            found = sorted(folder.glob(pattern))
            if len(found) == 1:
                return found[0]
            if found:
                named = ", ".join(path.name for path in found[:3])
                raise InputError(f"{folder} is a directory with {len(found)} models ({named}, …): name one of them")
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from error
    raise InputError(f"{folder} is a directory without a .safetensors file: name a file")


def _of_shards(index: Path) -> list[Stored]:
    """Return the tensors of all files that `index` lists. Raises InputError for a missing file or tensor."""
    try:
        weight_map = schema.of_text(IndexEntry, index.read_bytes()).weight_map
        shards: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            # The name alone, without folders: an index cannot make us read files elsewhere.
            shards.setdefault(Path(file).name or ".", []).append(name)
    except OSError as error:
        raise InputError(f"{index} cannot be read: {error.strerror or error}") from error
    except Malformed as error:
        raise InputError(
            f"{index} is not an index of safetensors files ({error}): name the .safetensors file itself"
        ) from error
    tensors = []
    for file, names in shards.items():
        path = index.parent / file
        if not os.path.isfile(path):  # Path.is_file raises for a name that no file can have
            raise InputError(
                f"{path} is missing: {index.name} says that '{names[0]}' and {len(names) - 1} other tensors are in it, "
                "so copy it too"
            )
        by_name = {stored.name: stored for stored in tensors_of_file(path)}
        missing = next((name for name in names if name not in by_name), None)
        if missing is not None:
            raise InputError(f"{path} lacks the tensor '{missing}' that {index.name} lists for it: copy both again")
        tensors += [by_name[name] for name in names]
    return tensors
