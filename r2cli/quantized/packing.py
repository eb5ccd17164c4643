"""Packing: how codes of 1 to 8 bits become bytes, and come back."""

import torch
from torch import Tensor


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
