"""Decode one image file to pixels, and resize and crop it as the network's input asks. Pillow reads the file."""

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import torch
from torch import Tensor

from r2cli.storage.input_spec import InputSpec

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

# Of an image as it is stored or resized: Pillow warns of more.
MOST_PIXELS = 89_478_485
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")


def decode(path: str | os.PathLike[str], spec: InputSpec, crop: torch.Generator | None = None) -> Tensor | str:
    """Decode one file to uint8 (channels, size, size). Returns its path instead if it is not a readable image.

    The image is resized and cropped at the centre. With `crop`, a generator, it is cropped and mirrored at random, as
    for Inception (Szegedy et al., "Going Deeper with Convolutions", 2015).
    """
    colours = "L" if spec.channels == 1 else "RGB"

    def pixels_of(file: "Image.Image") -> Any:
        shorter, longer = sorted(file.size)
        if longer * spec.resize**2 > MOST_PIXELS * shorter:  # the shorter side becomes `spec.resize`
            return None
        return numpy.array(_eight_bits(file).convert(colours))

    pixels = opened(path, pixels_of)
    if pixels is None:
        return os.fspath(path)
    image = torch.from_numpy(pixels).view(*pixels.shape[:2], spec.channels).permute(2, 0, 1)
    if crop is not None:
        return _random_crop(image, spec.sides, crop)
    return image if image.shape[1:] == spec.sides == (spec.resize,) * 2 else _centre(image, spec)


def opened(path: str | os.PathLike[str], take: "Callable[[Image.Image], T | None]") -> T | None:
    """Return what `take` makes of an image file. None stands for one that cannot be read, or is too large.

    So a worker process can pass it on, and one bad image does not end the run. Its size is known from its header,
    before memory is taken for its pixels.
    """
    from PIL import Image  # here, because most commands read no image files

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of more than MOST_PIXELS
    try:
        with Image.open(path) as file:
            return take(file) if file.width * file.height <= MOST_PIXELS else None
    except Exception:  # damaged files raise OSError, ValueError, SyntaxError, struct.error, EOFError and others
        return None


def _eight_bits(file: "Image.Image") -> "Image.Image":
    """Convert an image to 8 bits a channel. Colour tables with transparency become RGBA, or Pillow would warn."""
    if file.mode.startswith("I;16"):  # Pillow would clip 16-bit values at 255 instead of scaling them
        return file.point(lambda value: value / 257).convert("L")
    return file.convert("RGBA") if file.mode == "P" and "transparency" in file.info else file


def _centre(image: Tensor, spec: InputSpec) -> Tensor:
    """Resize the shorter side to `spec.resize` and cut the centre: (channels, h, w) to (channels, size, size).

    An image that is not to be square is scaled to both sides instead.
    """
    from torchvision.transforms.v2 import functional as F

    if spec.width:
        return F.resize(image, list(spec.sides), antialias=True)  # type: ignore[no-any-return]
    scaled = image if min(image.shape[1:]) == spec.resize else F.resize(image, [spec.resize], antialias=True)
    return F.center_crop(scaled, [spec.size, spec.size])  # type: ignore[no-any-return]


def _random_crop(image: Tensor, sides: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Cut 8 to 100 % of the area, with sides in a ratio of 3/4 to 4/3, and scale it to (channels, *sides).

    Half of the crops are mirrored.
    """
    from torchvision.transforms.v2 import functional as F

    _, height, width = image.shape
    area, log_ratio, top, left, mirror = torch.rand(5, generator=generator).tolist()
    side = ((0.08 + 0.92 * area) * height * width) ** 0.5
    # The square root of the ratio. The logarithm of the ratio is uniform, so wide and tall crops are equally frequent.
    stretch = (3 / 4) ** (0.5 - log_ratio)
    h, w = min(height, max(1, round(side / stretch))), min(width, max(1, round(side * stretch)))
    box = (int(top * (height - h + 1)), int(left * (width - w + 1)), h, w)
    image = F.resized_crop(image, *box, list(sides), antialias=True)
    return F.horizontal_flip(image) if mirror < 0.5 else image
