"""Transposed convolutions whose weight begins with the output channels, as every other layer's does.

torch has the input channels first, (inputs, outputs of a group, ...), and so has ONNX. Here it is (outputs, inputs of a
group, ...): scales, BatchNorm's factors and palettes belong to output channels, along the first axis.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

FUNCTIONS: Mapping[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def exchanged(weight: Tensor, groups: int) -> Tensor:
    """Return the weight of a transposed convolution with its channels exchanged, from either order to the other."""
    first, second, *kernel = weight.shape
    apart = weight.reshape(groups, first // groups, second, *kernel).transpose(1, 2)
    return apart.reshape(groups * second, first // groups, *kernel)


class TransposedConv(nn.Module):
    """A transposed convolution of one to three axes. Its weight is (outputs, inputs of a group, *kernel_size).

    The sizes are tuples, one number an axis. `weight` and `bias` are set by who makes it.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, groups: int, sizes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.groups, self.kernel_size = groups, tuple(weight.shape[2:])
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        self.stride, self.padding = sizes["stride"], sizes["padding"]
        self.dilation, self.output_padding = sizes["dilation"], sizes["output_padding"]

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what this layer gives with another weight and bias, (n, outputs, ...)."""
        more: Any = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return FUNCTIONS[len(self.kernel_size)](x, exchanged(weight, self.groups), bias, *more)
