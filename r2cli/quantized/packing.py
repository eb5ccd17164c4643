"""Packing: how codes of 1 to 8 bits become bytes, and come back.

Codes of 1, 2 and 4 bits share bytes, the first code in a byte's low bits; 5 to 8 bits take a byte each. Three bits do
not divide a byte, so they are two planes: first the high bit of every code, then the two low bits of every code.

Negative codes are packed as two's complement, so four bits are ONNX INT4's own bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plane:
    """The same `bits` bits of every code (1, 2, 4 or 8 of them), from bit `shift` on, packed together."""

    name: str
    bits: int
    shift: int = 0

    def size(self, count: int) -> int:
        """Return the bytes of the plane for `count` codes; the last byte is filled up with zeros."""
        return -(-count * self.bits // 8)

    def of(self, codes: Tensor) -> Tensor:
        """Return the plane's bits of `codes` (n,), which are uint8 without a sign: (n,) uint8."""
        return (codes >> self.shift).bitwise_and(2**self.bits - 1)


def planes(bits: int) -> tuple[Plane, ...]:
    """Return the planes of codes of `bits`, in the order of their bytes."""
    if bits == 3:
        return Plane("high", 1, shift=2), Plane("low", 2)
    return (Plane("codes", bits if bits in (1, 2, 4) else 8),)


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes `pack` makes of `count` codes."""
    return sum(plane.size(count) for plane in planes(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return `codes` (any shape) as bytes: (packed_bytes,) uint8."""
    return torch.cat(pack_planes(codes, bits))


def pack_planes(codes: Tensor, bits: int) -> list[Tensor]:
    """Return the bytes of every plane, (plane.size,) uint8 each, in the order of `planes`."""
    # Through int16, which holds both int8 and uint8; the lower bits are then the two's complement.
    flat = codes.reshape(-1).to(torch.int16).bitwise_and(2**bits - 1).to(torch.uint8)
    return [_packed(plane.of(flat), plane.bits) for plane in planes(bits)]


def split_planes(packed: Tensor, bits: int, count: int) -> list[tuple[Plane, Tensor]]:
    """Return the planes of `count` packed codes, each with its bytes."""
    each = planes(bits)
    return list(zip(each, torch.split(packed, [plane.size(count) for plane in each]), strict=True))


def unpack(packed: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """Undo `pack`: (count,) int8 where `signed`, else uint8."""
    codes = torch.zeros(count, dtype=torch.uint8)
    for plane, content in split_planes(packed, bits, count):
        codes |= unpack_plane(content, plane.bits)[:count] << plane.shift
    return twos_complement(codes, bits).to(torch.int8) if signed else codes


def unpack_plane(packed: Tensor, bits: int) -> Tensor:
    """Return all values in the bytes of a plane, with those that fill up the last one: (bytes * 8 / bits,) uint8."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (packed.unsqueeze(1) >> shifts).bitwise_and(2**bits - 1).reshape(-1)


def twos_complement(codes: Tensor, bits: int) -> Tensor:
    """Return the signed numbers with the same bits as the unsigned `codes`: int16, the shape of `codes`."""
    wide = codes.to(torch.int16)
    return torch.where(wide >= 2 ** (bits - 1), wide - 2**bits, wide)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Return one plane's `codes` (n,), uint8 below 2**bits, as bytes."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % per_byte)).reshape(-1, per_byte)
    packed = torch.zeros(codes.shape[0], dtype=torch.uint8)
    for position in range(per_byte):
        packed |= codes[:, position] << (position * bits)
    return packed
