"""Palettes for the weights of any safetensors file, without its network: k-means, tensor by tensor, in bounded memory.

A tensor is read in pieces: once or twice for its centroids, and once to write its codes. The result holds codes, tables
and scales as a checkpoint does, all other tensors unchanged, and no network. `checkpoint.load_state` decodes it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from r2cli.errors import InputError
from r2cli.palettes import kmeans, tables
from r2cli.palettes.compression import PaletteSettings, PalettizedLayer, few, with_exceptions
from r2cli.palettes.tables import PaletteForm
from r2cli.quantized.decibels import decibels
from r2cli.quantized.packing import pack_planes, packed_bytes, planes
from r2cli.quantized.palette import Palette, nearest
from r2cli.quantized.value_counts import PATTERNS, SIXTEEN_BIT
from r2cli.storage import checkpoint, stream
from r2cli.storage.stream import PIECE, Stored

SAMPLE = 4 * kmeans.SAMPLE  # how many vectors of a tensor its centroids are found on
NAMES = {dtype: name for name, dtype in stream.DTYPES.items()}

Advance = Callable[[int], None]


def find(source: Path) -> tuple[list[Stored], list[Stored]]:
    """Return the weights of a file and its other tensors. A weight is floating and has two dimensions or more.

    Raises InputError for a file that cannot be read, is quantized already, or has no weight.
    """
    stored = stream.tensors_of_model(source)
    if any("r2" in stream.metadata(Path(file)) for file in {each.file for each in stored}):
        raise checkpoint.quantized_already(str(source))
    weights: list[Stored] = []
    others: list[Stored] = []
    for each in stored:
        if each.dtype is None:
            raise InputError(
                f"{each.file}: tensor '{each.name}' has the type {each.kind}, which torch lacks: save it as float32"
            )
        (weights if each.dtype.is_floating_point and len(each.shape) >= 2 and each.size else others).append(each)
    if not weights:
        raise InputError(f"{source} has no floating tensor of two dimensions or more to palettize")
    names = {each.name for each in stored}
    for each in weights:
        for part in ("codes", "lut", "scale"):
            if f"{each.name}.{part}" in names:
                raise InputError(f"{source} has a tensor '{each.name}.{part}' already: it is quantized in another way")
    return weights, others


def parts(source: Path) -> list[Path]:
    """The files that hold the tensors of `source`, which may be an index of shards or their directory."""
    return sorted({Path(each.file) for own in find(source) for each in own})


def total(source: Path) -> int:
    """Return the bytes of `source`'s tensors: the total of what `write` tells `advance`."""
    weights, others = find(source)
    return sum(each.bytes for each in (*weights, *others))


def write(
    source: Path, opened: AbstractContextManager[IO[bytes]], settings: PaletteSettings, *, seed: int, advance: Advance
) -> list[PalettizedLayer]:
    """Palettize every weight of `source` into the file that `opened` opens.

    `advance` is called with the number of bytes that are done. Returns a row for every weight. Raises InputError for
    settings that do not fit a tensor, and for values that are not finite.
    """
    weights, others = find(source)
    by_layer = {each.name.removesuffix(".weight"): each for each in weights}
    forms = with_exceptions(by_layer, settings)
    for layer, each in by_layer.items():
        tables.require_fit(each.name, each.shape, forms[layer])
    wanted = {each.name: forms[layer] for layer, each in by_layer.items()}
    header, places = _layout(weights, others, wanted, {"command": "palettize", "seed": seed})
    rows = []
    with opened as file:
        file.write(header)
        for each in others:
            for piece in each.pieces():
                file.seek(places[each.name])
                file.write(piece.reshape(-1).view(torch.uint8).numpy().tobytes())
                places[each.name] += piece.numel() * piece.element_size()
            advance(each.bytes)
        for each in weights:
            rows.append(_Layer(each, wanted[each.name], advance).write(file, places, seed))
    return rows


def _layout(
    weights: Sequence[Stored], others: Sequence[Stored], forms: Mapping[str, PaletteForm], entry: Mapping[str, Any]
) -> tuple[bytes, dict[str, int]]:
    """Return the header of the file that is written, and the offset in the file at which every tensor begins.

    All sizes are known before a weight is read, so that codes can be written as they come.
    """
    sizes: dict[str, tuple[str, Sequence[int], int]] = {}
    codecs = {}
    for each in weights:
        form = forms[each.name]
        empty = _empty(each, form)
        groups = len(empty.lut)
        count = -(-each.shape[0] // form.dim) * prod(each.shape[1:])
        parts, codecs[each.name] = checkpoint.described(empty, (groups, count // groups))
        length = packed_bytes(count, form.bits)
        sizes[f"{each.name}.codes"] = "U8", [length], length
        for part, tensor in parts.items():
            own = NAMES[tensor.dtype], list(tensor.shape), tensor.numel() * tensor.element_size()
            sizes[f"{each.name}.{part}"] = own
    for each in others:
        assert each.dtype is not None
        sizes[each.name] = NAMES[each.dtype], each.shape, each.bytes
    meta = {"format": checkpoint.FORMAT, "model": None, "codecs": codecs, "history": [dict(entry)]}
    header: dict[str, Any] = {"__metadata__": {"r2": json.dumps(meta, sort_keys=True)}}
    at, places = 0, {}
    # Wide types first, so that every tensor begins at a multiple of its own width.
    for name, (kind, shape, length) in sorted(sizes.items(), key=lambda pair: -stream.DTYPES[pair[1][0]].itemsize):
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + length]}
        places[name] = at
        at += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + at for name, at in places.items()}


def _empty(each: Stored, form: PaletteForm) -> Palette:
    """Return a palette with the shapes that the tensor's palette will have."""
    groups = form.groups(each.shape[0])
    lut = torch.zeros(groups, form.rows, form.dim, dtype=torch.int8 if form.lut_bits == 8 else torch.float32)
    scale = torch.ones(() if groups == 1 else each.shape[:1])
    return Palette(lut, scale, form.bits, each.shape, None if groups == 1 else 0)


@dataclass(frozen=True)
class _Layer:
    """One weight while it is palettized."""

    stored: Stored
    form: PaletteForm
    advance: Advance

    def write(self, file: IO[bytes], places: Mapping[str, int], seed: int) -> PalettizedLayer:
        """Find the weight's palette, and write table, scale and codes to their `places` in `file`. Returns its row."""
        stored, form, name = self.stored, self.form, self.stored.name
        groups = form.groups(stored.shape[0])
        find_own = self._scalars if form.dim == 1 else self._vectors
        found = [find_own(group, groups, seed) for group in range(groups)]
        self.advance(stored.bytes // 2)  # finding the centroids counts as half of the work
        used = min(map(len, found))
        centroids = torch.stack([tables.filled(tables.distinct(own), form.rows) for own in found])
        palette = tables.palette(centroids, stored.shape, form)
        packer = _Packer(file, places[f"{name}.codes"], form.bits, -(-stored.shape[0] // form.dim) * self._positions)
        error = signal = 0.0
        occurrences = torch.zeros(form.rows, dtype=torch.int64)
        # The scale stands once for each channel, and all channels of a group have the same.
        scales = palette.scale.reshape(-1)[:: max(1, palette.scale.numel() // groups)]
        for group in range(groups):
            lut, scale = palette.lut[group].float(), float(scales[group if len(scales) > 1 else 0])
            encode = _encoder(lut, scale, stored.dtype) if form.dim == 1 else None
            for piece, weights in self._pieces(group, groups):
                codes = nearest_in(lut, piece / scale, weights) if encode is None else encode(piece)
                packer.add(codes)
                occurrences += torch.bincount(codes.int(), minlength=form.rows)
                near = lut.index_select(0, codes.int()) * scale
                values = piece.float().reshape(near.shape)
                error += float((weights * (values - near).square()).sum(dtype=torch.float64))
                signal += float(values.square().sum(dtype=torch.float64))
        packer.finish()
        for part, tensor in (("scale", palette.scale), ("lut", palette.lut)):
            file.seek(places[f"{name}.{part}"])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.advance(stored.bytes - stored.bytes // 2)
        payload = packed_bytes(packer.count, form.bits) + tables.own_bytes(palette)
        coded = tables.entropy_coded_bytes(palette, occurrences.tolist())
        sizes = 8 * payload / stored.size, 8 * coded / stored.size
        layer = name.removesuffix(".weight")
        return PalettizedLayer(
            layer, stored.shape, form.bits, form.dim, groups, *sizes, decibels(signal, error), few(used, form)
        )

    @property
    def _positions(self) -> int:
        return prod(self.stored.shape[1:])

    def _span(self, group: int, groups: int) -> tuple[int, int]:
        """Return the first element of a group, and the one after its last."""
        return group * self.stored.size // groups, (group + 1) * self.stored.size // groups

    def _finite(self, start: int, stop: int, elements: int = PIECE) -> Iterator[Tensor]:
        """Yield the elements from `start` to `stop`, float32 or 16 bits. Raises InputError for NaN and infinities."""
        for piece in self.stored.pieces(elements, start, stop):
            own = piece if piece.dtype in SIXTEEN_BIT else piece.float()
            if not bool(torch.isfinite(own).all()):
                bad = int((~torch.isfinite(own)).sum())
                raise InputError(
                    f"{self.stored.file}: tensor '{self.stored.name}' has NaN or infinite values, {bad} of them near "
                    f"element {start}: a palette holds finite weights only"
                )
            yield own

    def _scalars(self, group: int, groups: int, seed: int) -> Tensor:
        """Return the centroids (rows, 1) of the group's weights. Nothing here is random, so `seed` is not used."""
        dtype = self.stored.dtype if self.stored.dtype in SIXTEEN_BIT else torch.float32
        assert dtype is not None
        points = kmeans.points_of_pieces(lambda: self._finite(*self._span(group, groups)), dtype)
        return torch.from_numpy(kmeans.scalar(points, self.form.rows)).float().reshape(-1, 1)

    def _vectors(self, group: int, groups: int, seed: int) -> Tensor:
        """Return the centroids (rows, dim) of a sample of the group's vectors, which are evenly spread over it."""
        start, stop = self._span(group, groups)
        every = max(1, (stop - start) // self.form.dim // SAMPLE)
        parts = [
            (piece[seed % every :: every], weights[seed % every :: every])
            for piece, weights in self._pieces(group, groups)
        ]
        v, weights = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        return kmeans.vector(v, weights, self.form.rows, torch.Generator().manual_seed(seed))

    def _pieces(self, group: int, groups: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the group's vectors (n, dim) in order, with the weight of each element.

        Vectors are float32. Scalars keep their dtype, and have the weight 1.
        """
        start, stop = self._span(group, groups)
        if self.form.dim == 1:
            for piece in self._finite(start, stop):
                yield piece.reshape(-1, 1), torch.ones(())
            return
        block = self.form.dim * self._positions  # a vector needs all its channels in one piece
        for piece in self._finite(start, stop, max(1, PIECE // block) * block):
            yield kmeans.vectors(piece.float().reshape(-1, self._positions), None, self.form.dim)


def nearest_in(lut: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """Return the row of `lut` (k, dim) nearest to each of `v` (n, dim). Elements of weight 0 do not count."""
    codes = nearest(v, lut)
    filled = (weights == 0).any(1)  # the vectors of a last block that is not full
    if bool(filled.any()):
        short = int((weights[filled][0] > 0).sum())
        codes[filled] = nearest(v[filled][:, :short], lut[:, :short])
    return codes


def _encoder(lut: Tensor, scale: float, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """Return a function from a piece (n, 1) to its codes (n,)."""
    if dtype not in SIXTEEN_BIT:
        return lambda piece: nearest(piece / scale, lut)
    # 16 bits have 65,536 patterns: the code of each is found once, and a weight's code is one look in that table.
    every = torch.arange(PATTERNS, dtype=torch.int32).to(torch.int16).view(dtype).float()
    table = nearest((every / scale).reshape(-1, 1), lut)
    return lambda piece: table.index_select(0, piece.reshape(-1).view(torch.int16).int().bitwise_and_(PATTERNS - 1))


class _Packer:
    """Writes codes at their packed size as they come. Eight codes fill whole bytes at any number of bits.

    Up to seven codes are kept back until the next come.
    """

    def __init__(self, file: IO[bytes], at: int, bits: int, count: int) -> None:
        self.file, self.bits, self.count = file, bits, count
        sizes = [plane.size(count) for plane in planes(bits)]
        self.ends = [at + before for before in (0, *accumulate(sizes[:-1]))]  # where each plane is written on
        self.left = torch.zeros(0, dtype=torch.uint8)

    def add(self, codes: Tensor) -> None:
        codes = torch.cat([self.left, codes])
        whole = len(codes) // 8 * 8
        self._write(codes[:whole])
        self.left = codes[whole:]

    def finish(self) -> None:
        self._write(self.left)

    def _write(self, codes: Tensor) -> None:
        for index, content in enumerate(pack_planes(codes, self.bits)):
            self.file.seek(self.ends[index])
            self.file.write(content.numpy().tobytes())
            self.ends[index] += len(content)
