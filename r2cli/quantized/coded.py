"""A tensor as integer codes, and the codec that says what they stand for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from r2cli.quantized.grid import Grid
from r2cli.quantized.packing import pack, packed_bytes
from r2cli.quantized.palette import Palette

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
