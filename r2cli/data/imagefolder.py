"""Folders of images in ImageNet's layout: DIR/train/CLASS/* and DIR/val/CLASS/* (or DIR/test/CLASS/*)."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from r2cli.data.decoding import SUFFIXES
from r2cli.data.request import Data, Request
from r2cli.data.splits import LARGE_IMAGE, FolderSplit, Split, kept
from r2cli.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
MEMORY_LIMIT = 2 * 2**30  # bytes of uint8 images that are kept decoded


def load(request: Request) -> Data:
    root = Path(request.where)
    if not root.is_dir():
        raise InputError(f"{root} is not a directory: imagefolder:DIR wants DIR/train/CLASS/* and DIR/val/CLASS/*")
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or held_out is None:
        raise InputError(f"{root} has no train/ with a val/ or test/ beside it: imagefolder:DIR wants both")
    classes, train = scan(root / "train")
    test_classes, test = scan(held_out)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))[0]
        raise InputError(f"{root}: class folder '{odd}' is in only one of train/ and {held_out.name}/")
    size = request.spec.size if request.spec else request.size or _own_size([file for file, _ in train])
    resize = size if size < LARGE_IMAGE else round(size * 256 / 224)
    spec = request.input(3, size, mean=MEAN, std=STD, resize=resize)
    fits = (len(train) + len(test)) * spec.channels * spec.size**2 <= MEMORY_LIMIT

    def split(name: str, files: Sequence[tuple[str, int]]) -> Split:
        if spec.size < LARGE_IMAGE and fits:
            return kept(name, files, spec)
        return FolderSplit(name, files, spec, request.workers)

    return Data(f"imagefolder:{root}", spec, classes, split("train", train), split(held_out.name, test))


def _own_size(files: Sequence[str]) -> int:
    """Pixels for a folder: the first readable image's own shorter side where it is small, else ImageNet's 224."""
    shorter = next((shorter for shorter in map(_shorter_side, files) if shorter), LARGE_IMAGE)
    return shorter if shorter < LARGE_IMAGE else 224


def _shorter_side(path: str) -> int | None:
    """Pixels of an image's shorter side; None where it is not a readable image."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return min(file.size)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None


def scan(split: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Class names in order and (file, label) of one split."""
    try:
        with os.scandir(split) as entries:
            folders = sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        files = [(path, label) for label, folder in enumerate(folders) for path in _images(folder)]
    except OSError as error:
        raise InputError(f"{error.filename or split} cannot be read: {error.strerror or error}") from error
    names = tuple(os.path.basename(folder) for folder in folders)
    if not files:
        raise InputError(f"{split} holds no images: it wants CLASS/*.jpg (or png, bmp, webp, tiff)")
    if len(folders) < 2:
        raise InputError(f"{split} has one class folder, '{names[0]}': a classifier needs at least two")
    bare = next((folders[label] for label in sorted(set(range(len(folders))) - {label for _, label in files})), None)
    if bare is not None:
        raise InputError(f"{bare} holds no images: add some, or remove the folder")
    return names, files


def _images(folder: str) -> Iterator[str]:
    """The images below a folder, in order of their names: one listing a folder, no look at each file's status."""
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.is_dir():
            yield from _images(entry.path)
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path
