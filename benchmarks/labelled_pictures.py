"""Pictures with what is right about them: drawn text, as a detector, a recogniser and a classifier of direction are
given it, and photographs with faces; and how much of that a network's outputs have right.

Fonts are those that matplotlib and Pillow bring. A line is cut tightly, as a detector cuts it out: the words fill the
picture's height, and grey stands to the right. The photographs are scikit-image's.
"""

import functools
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor

WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part Invoice Total "
    "Street Price Date Open Exit Room Station Monday April Please Thank"
).split()
FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic "
    "STIXGeneral STIXGeneralBol STIXGeneralItalic"
).split()
GREY = 0.5  # to the right of a line: 0 once it is normalized, as the programs around these networks pad

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@functools.cache
def _font(name: str, size: int) -> Font:
    if not name:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def some_font(generator: np.random.Generator, size: int) -> Font:
    return _font(str(generator.choice([*FONTS, ""])), size)


def some_words(generator: np.random.Generator, most: int) -> str:
    """One word to `most`; every fourth is a number."""
    number = int(generator.integers(1, most + 1))
    drawn = [str(generator.choice(WORDS)) for _ in range(number)]
    return " ".join(str(generator.integers(10_000)) if generator.random() < 0.25 else word for word in drawn)


def two_colours(generator: np.random.Generator) -> list[tuple[int, ...]]:
    """Ground and ink: dark on light, or the other way."""
    found = [tuple(int(c) for c in generator.integers(*bounds, 3)) for bounds in ((190, 256), (0, 90))]
    return found[::-1] if generator.random() < 0.3 else found


def cut_line(shape: Sequence[int], generator: np.random.Generator) -> tuple[Image.Image, str]:
    """A line of text, of the width that it has at the height of `shape` (c, h, w), at most w; and what it says."""
    _, height, width = shape
    while True:
        text, font, (ground, ink) = some_words(generator, 5), some_font(generator, 64), two_colours(generator)
        left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
        if height * (right - left) <= width * (bottom - top):
            break
    image = Image.new("RGB", (right - left, bottom - top), ground)
    ImageDraw.Draw(image).text((-left, -top), text, fill=ink, font=font)
    return image.resize((max(1, height * image.width // image.height), height), Image.Resampling.BICUBIC), text


def page(shape: Sequence[int], generator: np.random.Generator, lines: int = 6) -> tuple[Image.Image, list[Box]]:
    """Some lines below each other, and a box around each."""
    _, height, width = shape
    (ground, ink), row, boxes = two_colours(generator), height / lines, list[Box]()
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    for line in range(lines):
        font = some_font(generator, int(row * generator.uniform(0.35, 0.65)))
        text = some_words(generator, 4)
        corner = (float(generator.integers(4, 40)), row * line + row * 0.1)
        boxes.append(draw.textbbox(corner, text, font=font))
        draw.text(corner, text, fill=ink, font=font)
    return image, [(left, top, min(right, width), bottom) for left, top, right, bottom in boxes]


PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee")
FACES: dict[str, Box] = {"astronaut": (175, 65, 275, 185), "camera": (190, 110, 270, 200)}


@functools.cache
def photographed(packages: Path, name: str) -> Image.Image:
    """A photograph of scikit-image's, out of its package."""
    with zipfile.ZipFile(next(packages.glob("scikit_image-*.whl"))) as content:
        return Image.open(io.BytesIO(content.read(f"skimage/data/{name}.png"))).convert("RGB")


def photograph(shape: Sequence[int], generator: np.random.Generator, packages: Path) -> tuple[Image.Image, list[Box]]:
    """A square part of a photograph, as it is or mirrored, lighter or darker, and the face in it, if there is one."""
    height = shape[1]
    name = str(generator.choice(PHOTOGRAPHS))
    whole = photographed(packages, name)
    wide, high = whole.size
    side = int(generator.integers(170, min(wide, high) + 1))
    left, top, right, bottom = map(float, FACES.get(name, (wide // 2, high // 2, wide // 2, high // 2)))
    x = int(generator.integers(max(0, int(right) - side), min(int(left), wide - side) + 1))
    y = int(generator.integers(max(0, int(bottom) - side), min(int(top), high - side) + 1))
    image = whole.crop((x, y, x + side, y + side)).resize((height, height))
    left, top, right, bottom = (height * edge / side for edge in (left - x, top - y, right - x, bottom - y))
    face: Box = (left, top, right, bottom)
    if generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        face = (height - right, top, height - left, bottom)
    light = generator.uniform(0.7, 1.3)
    image = image.point([min(255, int(value * light)) for value in range(256)] * 3)
    return image, [face] if name in FACES else []


def pixels(image: Image.Image) -> Tensor:
    """An image as float32 (3, h, w) from 0 to 1."""
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)


def padded(image: Tensor, width: int) -> Tensor:
    """A line (3, h, w) with grey to the right, (3, h, width)."""
    return torch.nn.functional.pad(image, (0, width - image.shape[2]), value=GREY)


# --- how much of it is read right ------------------------------------------------------------------------------------


def written(probabilities: Tensor, characters: Sequence[str]) -> list[str]:
    """What a recogniser's output (n, steps, classes) says: the likeliest at each step, no repeats, no blanks (0)."""
    found = []
    for row in probabilities.argmax(2).tolist():
        new = [one for one, before in zip(row, [0, *row[:-1]], strict=True) if one != before]
        found.append("".join(characters[one - 1] for one in new if one))
    return found


def edits(one: str, other: str) -> int:
    """Characters to be added, left out or changed."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def characters_right(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Percent of characters, spaces left out."""
    pairs = [(one.replace(" ", ""), other.replace(" ", "")) for one, other in zip(found, wanted, strict=True)]
    return 100 - 100 * sum(edits(*pair) for pair in pairs) / sum(len(other) for _, other in pairs)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    left, top, right, bottom = (
        f(pair) for f, pair in zip((max, max, min, min), zip(one, other, strict=True), strict=True)
    )
    common = max(0.0, right - left) * max(0.0, bottom - top)
    areas = sum((each[2] - each[0]) * (each[3] - each[1]) for each in (one, other))
    return common / (areas - common)


def boxes_of(plane: np.ndarray) -> list[Box]:
    """The boxes of a detector's map (h, w), read as its authors do: spots above 0.3 whose mean is above 0.5, widened by
    1.6 of area over circumference."""
    spots, _ = ndimage.label(plane > 0.3, np.ones((3, 3)))
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(spots), 1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if min(height, width) >= 3 and plane[spots == number].mean() > 0.5:
            wider = 1.6 * height * width / (2 * (height + width))
            found.append((columns.start - wider, rows.start - wider, columns.stop + wider, rows.stop + wider))
    return found


def lines_right(maps: Tensor, wanted: Sequence[Sequence[Box]]) -> float:
    """The harmonic mean of precision and recall in percent: a line is found by a box that it overlaps by half."""
    right = said = 0
    for plane, lines in zip(maps.flatten(0, -3).numpy(), wanted, strict=True):
        boxes = boxes_of(plane)
        said += len(boxes) + len(lines)
        right += sum(any(overlap(line, box) >= 0.5 for box in boxes) for line in lines)
    return 200 * right / said


def detections(output: Tensor, classes: Sequence[int]) -> list[tuple[float, Box]]:
    """Score and box of what a YOLOv8's output (4 + classes, cells) shows of some classes, no two of one thing."""
    scores = output[[4 + each for each in classes]].amax(0)
    found: list[tuple[float, Box]] = []
    for cell in scores.argsort(descending=True)[:200].tolist():
        x, y, width, height = output[:4, cell].tolist()
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        if all(overlap(box, other) < 0.45 for _, other in found):
            found.append((float(scores[cell]), box))
    return found


def average_precision(outputs: Tensor, wanted: Sequence[Sequence[Box]], classes: Sequence[int]) -> float:
    """The mean over all recalls of the best precision at that recall or more, in percent, at an overlap of a half."""
    ranked: list[tuple[float, bool]] = []
    for output, boxes in zip(outputs, wanted, strict=True):
        left = list(boxes)
        for score, box in detections(output, classes):
            hit = next((each for each in left if overlap(each, box) >= 0.5), None)
            left = [each for each in left if each is not hit]
            ranked.append((score, hit is not None))
    hits = np.array([hit for _, hit in sorted(ranked, key=lambda each: -each[0])])
    precisions = hits.cumsum() / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precisions[::-1])[::-1]
    return 100 * float(best[hits].sum()) / sum(map(len, wanted))
