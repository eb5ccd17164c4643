"""One image file to pixels: every mode that Pillow reads, resized and cropped as the network's input asks."""

import os
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from r2cli.storage.checkpoint import InputSpec

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")


def decode(path: str | os.PathLike[str], spec: InputSpec, crop: torch.Generator | None = None) -> Tensor | str:
    """One file as uint8 (channels, size, size), or its path where it is not a readable image.

    Centre crop after a resize; with `crop`, Inception's random resized crop and mirror (Szegedy et al. 2015).
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            pixels = numpy.array(_eight_bits(file).convert("L" if spec.channels == 1 else "RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return os.fspath(path)
    image = torch.from_numpy(pixels).view(*pixels.shape[:2], spec.channels).permute(2, 0, 1)
    if crop is not None:
        return _random_crop(image, spec.size, crop)
    return image if image.shape[1:] == (spec.size, spec.size) == (spec.resize,) * 2 else _centre(image, spec)


def _eight_bits(file: "Image.Image") -> "Image.Image":
    """The image with 8 bits a channel, and without Pillow's warning of transparency that a palette holds."""
    if file.mode.startswith("I;16"):  # Pillow clips 16 bits to 255 where it should scale them
        return file.point(lambda value: value / 257).convert("L")
    return file.convert("RGBA") if file.mode == "P" and "transparency" in file.info else file


def _centre(image: Tensor, spec: InputSpec) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    scaled = image if min(image.shape[1:]) == spec.resize else F.resize(image, [spec.resize], antialias=True)
    return F.center_crop(scaled, [spec.size, spec.size])  # type: ignore[no-any-return]


def _random_crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """8 to 100 % of the area at a ratio of 3/4 to 4/3, scaled to (channels, size, size), mirrored half of the time."""
    from torchvision.transforms.v2 import functional as F

    _, height, width = image.shape
    area, log_ratio, top, left, mirror = torch.rand(5, generator=generator).tolist()
    side = ((0.08 + 0.92 * area) * height * width) ** 0.5
    stretch = (3 / 4) ** (0.5 - log_ratio)  # square root of a ratio from 3/4 to 4/3, uniform in its logarithm
    h, w = min(height, max(1, round(side / stretch))), min(width, max(1, round(side * stretch)))
    box = (int(top * (height - h + 1)), int(left * (width - w + 1)), h, w)
    image = F.resized_crop(image, *box, [size, size], antialias=True)
    return F.horizontal_flip(image) if mirror < 0.5 else image
