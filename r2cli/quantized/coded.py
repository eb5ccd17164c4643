"""A tensor as integer codes, with the codec that says what they stand for: a grid or a palette."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from r2cli.quantized.grid import Grid
from r2cli.quantized.packing import pack, packed_bytes
from r2cli.quantized.palette import Palette

Codec = Grid | Palette


@dataclass(frozen=True)
class Coded:
    """A weight as it is deployed: the codes that a method chose for it, and the codec that decodes them.

    The codes are kept, and never found again from decoded floats: a method's codes need not be the nearest ones.
    """

    codec: Codec
    codes: Tensor

    def decode(self) -> Tensor:
        """Return the values: float32, the shape of the weight."""
        return self.codec.decode(self.codes)

    @property
    def count(self) -> int:
        """The number of values: a code of a palette of vectors stands for several."""
        return prod(self.codec.shape) if isinstance(self.codec, Palette) else self.codes.numel()

    @property
    def is_integer(self) -> bool:
        """Whether its values are integers times a scale: a palette's may be floats."""
        return not isinstance(self.codec, Palette) or not self.codec.lut.is_floating_point()

    def packed(self) -> Tensor:
        """Return the codes as bytes, as `packing.pack` packs them: (bytes,) uint8."""
        return pack(self.codes, self.codec.bits)

    def payload_bytes(self) -> int:
        """Return the bytes of the packed codes, and of the scales, zero points and table that decode them."""
        parts = [self.codec.scale]
        if isinstance(self.codec, Palette):
            parts.append(self.codec.lut)
        elif bool(self.codec.zero_point.any()):
            parts.append(self.codec.zero_point.to(torch.int8))
        return packed_bytes(self.codes.numel(), self.codec.bits) + sum(p.numel() * p.element_size() for p in parts)
