"""Uniform grids: evenly spaced levels, and the integers that stand for them.

    plain     value = scale * (code - zero_point)
    midrise   value = scale * (2 * code - (2**bits - 1))

A midrise grid has no zero level: its levels are the odd multiples of the scale, -3, -1, 1, 3 times it for two bits. The
grids of one bit are of this kind, with the levels -scale and scale, and so are the weight grids of DoReFa and EWGS.

A grid turns values into codes (`encode`) and codes into values (`decode`). The codes are what a method chooses, and
what is stored. They need not be those of the nearest levels: AdaRound's are not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from r2cli.quantized.channels import per_channel

MAX_BITS = 8
LARGEST_INTEGER = 64  # of a weight, when `Grid.integer_factor` makes integers larger


@dataclass(frozen=True)
class Grid:
    """A uniform grid of 2**bits levels, or one for each channel, or for each group of inputs of each channel.

    Codes run from `lowest` to `highest`: from -2**(bits-1) on if the grid is signed and plain, else from 0 on.
    """

    scale: Tensor  # float32, () for one grid, or (channels,) along `axis`, or (outputs, groups); > 0
    zero_point: Tensor  # int32, the shape of `scale`: the code of the value 0; all zero for a midrise grid
    bits: int
    signed: bool
    axis: int | None = None  # of the values that are encoded; None for one grid
    midrise: bool = False
    group: int = 0  # of a weight (outputs, inputs): how many inputs share a scale, (outputs, groups); 0: all of them
    inputs: int = 0  # of such a weight: the last group may be shorter

    @property
    def lowest(self) -> int:
        """The least code."""
        return -(1 << (self.bits - 1)) if self.signed and not self.midrise else 0

    @property
    def highest(self) -> int:
        """The greatest code."""
        return self.lowest + (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the codes: int8 if some are negative, else uint8; int32 for those of an activation's 16 bits."""
        if self.bits > MAX_BITS:
            return torch.int32
        return torch.int8 if self.lowest < 0 else torch.uint8

    @property
    def integer_factor(self) -> int:
        """What an ONNX file multiplies the integers by and divides the scale by: a power of two, so values stay exact.

        Biases are integers too, in units of scale_x * scale_w. With two or four levels scale_w is large, and rounding a
        bias to such a unit would change what a channel gives. Larger integers have a smaller scale. Up to 64, the sum
        of two products with 8-bit activations fits the 16 bits in which processors without VNNI add them.
        """
        if self.bits > 4 or (self.bits == 4 and not self.midrise):
            return 1
        most = 2**self.bits - 1 if self.midrise else -self.lowest
        return 1 << (LARGEST_INTEGER // most).bit_length() - 1 if most else 1

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of the levels nearest to `x`: int8 or uint8, the shape of `x`.

        A value in the middle of two levels gets the even code, as in ONNX's QuantizeLinear.
        """
        if self.midrise:
            codes = torch.round(self.unrounded(x))
        else:  # rounded before the zero point is added: an odd one would turn ties to the odd code
            codes = torch.round(x / self.along(self.scale, x.ndim)) + self.along(self.zero_point, x.ndim)
        return codes.clamp_(self.lowest, self.highest).to(self.dtype)

    def unrounded(self, x: Tensor) -> Tensor:
        """Return where `x` lies in units of codes, neither rounded nor clipped: 2.5 is between the codes 2 and 3.

        The result is float32, in the shape of `x`.
        """
        levels = x / self.along(self.scale, x.ndim)
        if self.midrise:
            return levels.add(2**self.bits - 1).div(2)
        return levels + self.along(self.zero_point, x.ndim)

    def integers(self, codes: Tensor) -> Tensor:
        """Return what the scale multiplies, in the shape of `codes`: int32, or floats for floating `codes`.

        Floating codes may lie between integers, as while AdaRound learns. An ONNX file stores these integers,
        `integer_factor` times as large.
        """
        codes = codes if codes.is_floating_point() else codes.to(torch.int32)
        if self.midrise:
            return codes.mul(2).sub(2**self.bits - 1)
        return codes - self.along(self.zero_point, codes.ndim)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of `codes`: float32, the shape of `codes`."""
        return self.integers(codes).to(torch.float32) * self.along(self.scale, codes.ndim)

    def along(self, parameter: Tensor, ndim: int) -> Tensor:
        """Return `parameter`, which has the shape of the scale, so that it broadcasts against values of `ndim` axes."""
        if self.group and self.axis is not None:
            return parameter.repeat_interleave(self.group, 1)[:, : self.inputs]
        return per_channel(parameter, ndim, self.axis)
