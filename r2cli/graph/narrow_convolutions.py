"""Convolutions that torch cannot train in channels-last memory on a CPU.

A convolution of one pixel with a stride and few input channels writes past its memory there as the gradient of its
weights is computed: the process crashes, hangs, or gets wrong gradients (oneDNN issue 6035, open in 2026). In plain
memory it does not, so the input of such a layer is made plain, and its weight stays plain.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

BLOCK = 16  # channels that oneDNN's kernels take at once: 8 with AVX2, 16 with AVX-512


M = TypeVar("M", bound=nn.Module)


def keep_plain(model: M) -> M:
    """`model`, in which every such layer now runs in plain memory."""
    for module in _narrow(model):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.data = _copied(parameter.data)
        if _plain not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_plain)
    return model


def _narrow(model: nn.Module) -> Iterator[nn.Conv2d]:
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and set(module.kernel_size) == {1}
            and max(module.stride) > 1
            and module.in_channels // module.groups < BLOCK
        ):
            yield module


def _plain(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_copied(one) if isinstance(one, Tensor) else one for one in inputs)


def _copied(tensor: Tensor) -> Tensor:
    """A copy, since `contiguous()` leaves the strides of axes of size 1, by which torch takes it for channels-last."""
    return tensor.clone(memory_format=torch.contiguous_format)
