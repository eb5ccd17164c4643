"""Codecs: how integers stand for weights and activations, and how those integers are packed into bytes.

A codec turns values into codes and codes into values; `Coded` is a codec with the codes that a method chose. The codes
are the result: AdaRound's or DKM's are not the nearest neighbours of the original weight, so they are kept, not found
again at export.

    Grid      value = scale * (code - zero_point)
    Grid odd  value = scale * (2 * code - (2**bits - 1))         no zero level; codes 0 .. 2**bits - 1
    Palette   value = scale * lut[group, code]                   one code for `dim` neighbouring output channels
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BITS = 8
LARGEST_INTEGER = 64  # the greatest integer that a table of few bits gives


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
    midrise: bool = False

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed and not self.midrise else 0

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.lowest < 0 else torch.uint8

    @property
    def integer_factor(self) -> int:
        """What an ONNX file multiplies the integers by, and divides the scale by: a power of two, the same values.

        A bias is an integer in units of scale_x * scale_w, and with two or four levels such a unit is a large part of
        what a channel gives. Where integers come out of a table they may as well be large; up to 64, two products with
        8-bit activations fit the 16 bits that processors without VNNI add them in.
        """
        if self.bits > 4 or (self.bits == 4 and not self.midrise):
            return 1
        most = 2**self.bits - 1 if self.midrise else -self.lowest
        return 1 << (LARGEST_INTEGER // most).bit_length() - 1 if most else 1

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest levels, ties to even as ONNX QuantizeLinear has it. Shape of `x`, int8 or uint8."""
        levels = x / self.along(self.scale, x.ndim)
        if self.midrise:
            # The shift is a half-integer multiple of 2, so it is added before the rounding.
            codes = torch.round((levels + (2**self.bits - 1)) / 2)
        else:
            codes = torch.round(levels) + self.along(self.zero_point, x.ndim)
        return codes.clamp_(self.lowest, self.highest).to(self.dtype)

    def integers(self, codes: Tensor) -> Tensor:
        """The integers that the scale multiplies: what an ONNX file stores. Shape of `codes`, int32."""
        wide = codes.to(torch.int32)
        if self.midrise:
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


# --- vectors -------------------------------------------------------------------------------------------------------


# --- packing -------------------------------------------------------------------------------------------------------
