"""Codecs: how integers stand for weights and activations, and how those integers are packed into bytes.

A codec turns values into codes and codes into values; `Coded` is a codec with the codes that a method chose. The codes
are the result: AdaRound's or DKM's are not the nearest neighbours of the original weight, so they are kept, not found
again at export.

    Grid      value = scale * (code - zero_point)
    Grid odd  value = scale * (2 * code - (2**bits - 1))         no zero level; codes 0 .. 2**bits - 1
    Palette   value = scale * lut[group, code]                   one code for `dim` neighbouring output channels
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

MAX_BITS = 8
FEW = 64  # centroids
RAISED = 64  # the greatest integer that a table of few bits gives
NEAREST_ROWS = 1 << 16  # vectors whose distances to all centroids are in memory together


@dataclass(frozen=True)
class Grid:
    """A uniform grid of 2**bits levels.

    `scale` and `zero_point` have shape () for one grid, or (channels,) along `axis`. Plain signed codes run from
    -2**(bits-1) to 2**(bits-1)-1, unsigned and odd ones from 0 to 2**bits-1.
    """

    scale: Tensor  # float32, () or (channels,), > 0
    zero_point: Tensor  # int32, the shape of scale; all zero for an odd grid
    bits: int
    signed: bool
    axis: int | None = None
    odd: bool = False

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed and not self.odd else 0

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.lowest < 0 else torch.uint8

    @property
    def raised(self) -> int:
        """What an ONNX file multiplies the integers by, and divides the scale by: a power of two, the same values.

        A bias is an integer in units of scale_x * scale_w, and with two or four levels such a unit is a large part of
        what a channel gives. Where integers come out of a table they may as well be large; up to 64, two products with
        8-bit activations fit the 16 bits that processors without VNNI add them in.
        """
        if self.bits > 4 or (self.bits == 4 and not self.odd):
            return 1
        most = 2**self.bits - 1 if self.odd else -self.lowest
        return 1 << (RAISED // most).bit_length() - 1 if most else 1

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest levels, ties to even as ONNX QuantizeLinear has it. Shape of `x`, int8 or uint8."""
        levels = x / self.along(self.scale, x.ndim)
        if self.odd:
            # The shift is a half-integer multiple of 2, so it is added before the rounding.
            codes = torch.round((levels + (2**self.bits - 1)) / 2)
        else:
            codes = torch.round(levels) + self.along(self.zero_point, x.ndim)
        return codes.clamp_(self.lowest, self.highest).to(self.dtype)

    def integers(self, codes: Tensor) -> Tensor:
        """The integers that the scale multiplies: what an ONNX file stores. Shape of `codes`, int32."""
        wide = codes.to(torch.int32)
        if self.odd:
            return 2 * wide - ((1 << self.bits) - 1)
        return wide - self.along(self.zero_point, codes.ndim)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of `codes`: float32, the shape of `codes`."""
        return self.integers(codes).to(torch.float32) * self.along(self.scale, codes.ndim)

    def along(self, parameter: Tensor, ndim: int) -> Tensor:
        """`parameter`, of the shape of the scale, in a shape that goes with values of `ndim` axes."""
        if self.axis is None:
            return parameter
        shape = [1] * ndim
        shape[self.axis] = -1
        return parameter.reshape(shape)


@dataclass(frozen=True)
class Palette:
    """A table of 2**bits centroids of `dim` values for each group of output channels.

    Codes have shape (groups, vectors of a group). Vectors are cut by `to_vectors`.
    """

    lut: Tensor  # (groups, 2**bits, dim), int8 or float32; the rows of a group are distinct
    scale: Tensor  # float32, () or (output channels,)
    bits: int
    shape: tuple[int, ...]  # of the weight: (output channels, ...)
    axis: int | None = None  # 0 where scale is per output channel

    @property
    def dim(self) -> int:
        return int(self.lut.shape[2])

    @property
    def raised(self) -> int:
        """As a grid's: an int8 table has large integers already."""
        return 1

    @property
    def positions(self) -> int:
        """Weights of an output channel."""
        return prod(self.shape[1:])

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest centroids: (groups, vectors of a group), uint8."""
        groups, _, dim = self.lut.shape
        weight = x / self._per_channel()
        vectors = to_vectors(weight, dim).reshape(groups, -1, dim)
        lut = self.lut.to(vectors.dtype)
        codes = torch.stack([nearest(v, centroids) for v, centroids in zip(vectors, lut, strict=True)])
        short = weight.shape[0] % dim  # channels in the last block: what fills it up has no value to be near to
        if short:
            count = weight[0].numel()
            codes[-1, -count:] = nearest(vectors[-1, -count:, :short], lut[-1, :, :short])
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Values of `codes`: float32, `self.shape`."""
        index = codes.long().unsqueeze(-1).expand(-1, -1, self.dim)  # (groups, vectors, dim)
        vectors = self.lut.to(torch.float32).gather(1, index)
        return from_vectors(vectors.reshape(-1, self.dim), self.shape) * self._per_channel()

    def _per_channel(self) -> Tensor:
        return self.scale if self.axis is None else self.scale.reshape(-1, *[1] * (len(self.shape) - 1))


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The row of `centroids` (k, dim) that is nearest to every vector (n, dim): (n,), uint8; some rows at once.

    Both float32.
    """
    if centroids.shape[1] == 1:
        value, order = centroids[:, 0].double().sort()
        middle = (value[1:] + value[:-1]) / 2  # exact in float64
        # A float32 is above the middle just where it is above the greatest float32 that is not.
        limit = middle.float()
        limit = torch.where(limit.double() > middle, torch.nextafter(limit, limit.new_tensor(-torch.inf)), limit)
        parts = [_above(v, limit) for v in torch.split(vectors[:, 0], NEAREST_ROWS)]
        return order.to(torch.uint8).index_select(0, torch.cat(parts))
    # Not through a matrix product: it cannot tell close centroids apart.
    exact = "donot_use_mm_for_euclid_dist"
    parts = [torch.cdist(v, centroids, compute_mode=exact).argmin(1) for v in torch.split(vectors, NEAREST_ROWS)]
    return torch.cat(parts).to(torch.uint8)


def _above(values: Tensor, limits: Tensor) -> Tensor:
    """How many of the ascending `limits` (k,) every one of `values` (n,) is above: (n,), int32."""
    if len(limits) >= FEW:
        return torch.bucketize(values, limits, out_int32=True)
    count = torch.zeros_like(values, dtype=torch.uint8)
    for limit in limits:  # a comparison each is faster than a search until there are many
        count += values > limit
    return count.int()


Codec = Grid | Palette


@dataclass(frozen=True)
class Coded:
    """A tensor as a codec and the codes that were chosen for it."""

    codec: Codec
    codes: Tensor

    def decode(self) -> Tensor:
        return self.codec.decode(self.codes)

    def packed(self) -> Tensor:
        """The codes at their packed size: uint8, one dimension."""
        return pack(self.codes, self.codec.bits)

    def payload_bytes(self) -> int:
        """Bytes of the packed codes with the scales, zero points and table that decode them."""
        parts = [self.codec.scale]
        if isinstance(self.codec, Palette):
            parts.append(self.codec.lut)
        elif bool(self.codec.zero_point.any()):
            parts.append(self.codec.zero_point.to(torch.int8))
        return packed_bytes(self.codes.numel(), self.codec.bits) + sum(p.numel() * p.element_size() for p in parts)


def sqnr(rounded: Tensor, weight: Tensor) -> float:
    """Signal to noise of `rounded` against `weight`, of one shape, in dB; infinity without noise, or without signal."""
    error = (rounded - weight).double().square().sum()
    signal = weight.double().square().sum()
    return float(10 * torch.log10(signal / error)) if error > 0 and signal > 0 else float("inf")


# --- vectors -------------------------------------------------------------------------------------------------------


def to_vectors(weight: Tensor, dim: int) -> Tensor:
    """Cut (C, ...) into vectors of `dim` neighbouring output channels at one position: (n, dim).

    Channels are taken in blocks of `dim`; vector j of a block holds its `dim` channels at position j. Where `dim` does
    not divide C, the last block is filled up with zeros, which `from_vectors` drops again.
    """
    channels = weight.shape[0]
    flat = weight.reshape(channels, -1)
    short = -channels % dim
    if short:
        flat = torch.cat([flat, flat.new_zeros(short, flat.shape[1])])
    return flat.reshape(-1, dim, flat.shape[1]).transpose(1, 2).reshape(-1, dim)


def from_vectors(vectors: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `to_vectors`: (n, dim) back to a weight of `shape`."""
    channels, dim, positions = shape[0], vectors.shape[1], prod(shape[1:])
    return vectors.reshape(-1, positions, dim).transpose(1, 2).reshape(-1, positions)[:channels].reshape(shape)


# --- packing -------------------------------------------------------------------------------------------------------


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `pack` makes of `count` codes."""
    if bits == 3:
        return packed_bytes(count, 1) + packed_bytes(count, 2)
    return -(-count * (bits if bits in (1, 2, 4) else 8) // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as uint8 bytes: 8 to 5 bits a byte each; 4, 2, 1 bits little end first, zero-padded; 3 bits as planes.

    Negative codes are packed as two's complement of `bits` bits, so four bits are ONNX INT4's own bytes. The plane of
    3-bit codes' high bits comes first, then the plane of their two low bits.
    """
    flat = codes.reshape(-1).to(torch.int16).bitwise_and(2**bits - 1).to(torch.uint8)
    if bits == 3:
        return torch.cat([pack(flat >> 2, 1), pack(flat & 3, 2)])
    if bits > 4:
        return flat
    per_byte = 8 // bits
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).reshape(-1, per_byte)
    packed = torch.zeros(flat.shape[0], dtype=torch.uint8)
    for position in range(per_byte):
        packed |= flat[:, position] << (position * bits)
    return packed


def unpack(packed: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """Undo `pack`: `count` codes, int8 where `signed`, else uint8."""
    if bits == 3:
        split = packed_bytes(count, 1)
        high, low = unpack(packed[:split], 1, count, False), unpack(packed[split:], 2, count, False)
        codes = (high << 2) | low
    elif bits > 4:
        codes = packed.clone()
    else:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        codes = ((packed.unsqueeze(1) >> shifts) & (2**bits - 1)).reshape(-1)
    codes = codes[:count]
    if not signed:
        return codes
    wide = codes.to(torch.int16)
    return torch.where(wide >= 2 ** (bits - 1), wide - 2**bits, wide).to(torch.int8)
