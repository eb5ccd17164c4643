"""Noise with a trace of its class, in the shape asked for: `fake:3x224x224:1000`. For timing and trying things out."""

import re

import torch
from torch import Tensor

from r2cli.data.request import Data, Request, in_memory
from r2cli.errors import InputError

TRAIN, TEST = 1024, 256  # images; at least one a class
LARGEST = 1024  # pixels


def load(request: Request) -> Data:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+)", request.where)
    if not match:
        raise InputError(f"fake:{request.where} is not fake:CxHxW:CLASSES, for example fake:3x32x32:10")
    channels, height, width, classes = map(int, match.groups())
    if channels not in (1, 3) or not 4 <= height <= LARGEST or height != width or not 2 <= classes <= 100_000:
        raise InputError(
            f"fake:{request.where} is out of range: give 1 or 3 channels, square images of 4 to {LARGEST} pixels, "
            "and at least 2 classes"
        )
    spec = request.input(channels, height, mean=(0.5,), std=(0.25,))
    generator = torch.Generator().manual_seed(0)
    shades = torch.randint(0, 96, (classes, channels, 1, 1), generator=generator, dtype=torch.uint8)

    def half(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(max(count, classes)) % classes
        shape = (len(labels), channels, height, width)
        noise = torch.randint(0, 160, shape, generator=generator, dtype=torch.uint8)
        return noise.add_(shades[labels]), labels

    names = [str(number) for number in range(classes)]
    name = f"fake:{request.where}"
    return in_memory(name, names, spec, train=half(TRAIN), test=half(TEST), augments=True)
