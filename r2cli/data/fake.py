"""Noise of any shape that depends a little on its class: `fake:3x224x224:1000`. To time and try things."""

import re

import torch
from torch import Tensor

from r2cli.data.request import Data, Request, in_memory
from r2cli.errors import InputError

TRAIN, TEST = 1024, 256  # images; more where there are more classes, so that each class has at least one
LARGEST = 1024  # pixels


def load(request: Request) -> Data:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+)", request.where)
    if not match:
        raise InputError(f"fake:{request.where} is not fake:CxHxW:CLASSES, for example fake:3x32x32:10")
    channels, height, width, classes = map(int, match.groups())
    sides_fit = all(4 <= side <= LARGEST for side in (height, width))
    if channels not in (1, 3) or not sides_fit or not 2 <= classes <= 100_000:
        raise InputError(
            f"fake:{request.where} is out of range: give 1 or 3 channels, sides of 4 to {LARGEST} pixels, "
            "and at least 2 classes"
        )
    spec = request.input(channels, (height, width), mean=(0.5,), std=(0.25,))
    generator = torch.Generator().manual_seed(0)
    # Each class has its own brightness. Noise up to 159 and shades up to 95 fit uint8 together.
    shades = torch.randint(0, 96, (classes, channels, 1, 1), generator=generator, dtype=torch.uint8)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(max(count, classes)) % classes
        shape = (len(labels), channels, height, width)
        noise = torch.randint(0, 160, shape, generator=generator, dtype=torch.uint8)
        return noise.add_(shades[labels]), labels

    names = [str(number) for number in range(classes)]
    name = f"fake:{request.where}"
    return in_memory(name, names, spec, train=draw(TRAIN), test=draw(TEST), augments=True)
