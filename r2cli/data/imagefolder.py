"""Folders of images in ImageNet's layout: DIR/train/CLASS/* and DIR/val/CLASS/* (or DIR/test/CLASS/*)."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from r2cli.data.decoding import SUFFIXES, opened
from r2cli.data.request import Data, Request
from r2cli.data.splits import LARGE_IMAGE, FolderSplit, Split, kept
from r2cli.errors import InputError
from r2cli.storage.input_spec import InputSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
MEMORY_LIMIT = 2 * 2**30  # bytes; a set of small images that is larger than this is decoded anew in each epoch


def load(request: Request) -> Data:
    """Load a folder. Raises InputError where it lacks a part of the layout, or its two halves differ in classes.

    Where the network's classes are known and all folders are among them, labels are numbered as the network does, and
    classes may be missing.
    """
    root = Path(request.where)
    if not root.is_dir():
        raise InputError(f"{root} is not a directory: imagefolder:DIR wants DIR/train/CLASS/* and DIR/val/CLASS/*")
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or held_out is None:
        raise InputError(f"{root} has no train/ with a val/ or test/ beside it: imagefolder:DIR wants both")
    least = 1 if request.classes else 2
    halves = [scan(root / "train", least), scan(held_out, least)]
    found = [set(names) for names, _ in halves]
    classes = request.classes_of(set.union(*found))
    if not request.classes and found[0] != found[1]:
        raise InputError(
            f"{root}: class folder '{min(found[0] ^ found[1])}' is in only one of train/ and {held_out.name}/: add it "
            "to the other, remove it, or give the names of all classes with --classes FILE"
        )
    places = {name: place for place, name in enumerate(classes)}
    train, test = ([(file, places[names[label]]) for file, label in files] for names, files in halves)
    spec, split = prepared(request, [file for file, _ in (*train, *test)])
    return Data(f"imagefolder:{root}", spec, classes, split("train", train), split(held_out.name, test))


def prepared(
    request: Request, files: Sequence[str]
) -> tuple[InputSpec, Callable[[str, Sequence[tuple[str, int]]], Split]]:
    """How `files` are prepared, and what makes a split of some of them by its name: in memory, where all fit."""
    size = request.spec.size if request.spec else request.size or _usual_size(files)
    size = size[0] if isinstance(size, tuple) else size
    # ImageNet's usual proportion: the shorter side becomes 256 pixels, and the centre crop takes 224 of them.
    resize = size if size < LARGE_IMAGE else round(size * 256 / 224)
    spec = request.input(3, size, mean=MEAN, std=STD, resize=resize)
    fits = len(files) * math.prod(spec.shape) <= MEMORY_LIMIT

    def split(name: str, files: Sequence[tuple[str, int]]) -> Split:
        if spec.size < LARGE_IMAGE and fits:
            return kept(name, files, spec)
        return FolderSplit(name, files, spec, request.workers)

    return spec, split


def _usual_size(files: Sequence[str]) -> int:
    """Return the size in pixels for a folder: the shorter side of its first readable image if that is small, else 224.

    224 is ImageNet's size.
    """
    shorter = next((shorter for shorter in map(_shorter_side, files) if shorter), LARGE_IMAGE)
    return shorter if shorter < LARGE_IMAGE else 224


def _shorter_side(path: str) -> int | None:
    """Return the pixels of an image's shorter side, or None if it is not a readable image."""
    return opened(path, lambda file: min(file.size))  # Pillow reads only the header for this


def scan(split: Path, least: int = 2) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Return the class names in order, and (file, label) of each image of one split.

    Raises InputError for a folder that cannot be read, has fewer than `least` classes, or has a class without images.
    """
    try:
        with os.scandir(split) as entries:
            folders = sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        files = [(path, label) for label, folder in enumerate(folders) for path in pictures(folder)]
    except OSError as error:
        raise InputError(f"{error.filename or split} cannot be read: {error.strerror or error}") from error
    names = tuple(os.path.basename(folder) for folder in folders)
    if not files:
        raise InputError(f"{split} holds no images: it wants CLASS/*.jpg (or png, bmp, webp, tiff)")
    if len(folders) < least:
        raise InputError(f"{split} has one class folder, '{names[0]}': a classifier needs at least two")
    empty = next((folders[label] for label in sorted(set(range(len(folders))) - {label for _, label in files})), None)
    if empty is not None:
        raise InputError(f"{empty} holds no images: add some, or remove the folder")
    return names, files


def pictures(folder: str) -> Iterator[str]:
    """Yield the images below a folder, in the order of their names.

    os.scandir says what is a folder without a system call for each file: ImageNet has 1.3 million files.
    """
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.is_dir():
            yield from pictures(entry.path)
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path
