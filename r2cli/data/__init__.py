"""Data sets by name, and the one path from an image to the network's input.

    digits                          scikit-learn's 1,797 real 8x8 scans, embedded; a fixed split of 1,200 and 597;
                                    digits:64 is so many of each
    mnist, fashion_mnist,           torchvision's, downloaded once
    cifar10, cifar100
    imagefolder:DIR                 DIR/train/CLASS/* and DIR/val/CLASS/* (or DIR/test/CLASS/*), ImageNet's layout
    qnli:FILE.tsv, qnli:DIR         pairs of texts with labels, in GLUE's form; DIR has train.tsv and dev.tsv
    fake:CxHxW:CLASSES              noise with a trace of its class: for timing and trying, not for learning

Images are kept as uint8 where they fit in memory, decoded once; otherwise workers decode them as they are needed. What
preprocessing was used is an `InputSpec`, which the checkpoint records and every later command applies.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from r2cli.data import digits, fake, imagefolder, text
from r2cli.data import torchvision as downloaded
from r2cli.data.decoding import decode
from r2cli.data.request import Data, Request
from r2cli.data.splits import (
    ALL_ROWS,
    LARGE_IMAGE,
    Batch,
    FolderSplit,
    KeptSplit,
    MemorySplit,
    RowShare,
    Split,
    TextSplit,
    draw_shifts,
    normalise,
    shift_and_flip,
    subset,
)
from r2cli.data.text import packed
from r2cli.errors import InputError, unknown
from r2cli.storage.checkpoint import InputSpec

__all__ = [
    "KINDS",
    "LARGE_IMAGE",
    "Again",
    "Batch",
    "Data",
    "FolderSplit",
    "KeptSplit",
    "MemorySplit",
    "Split",
    "TextSplit",
    "calibration",
    "calibration_count",
    "decode",
    "load",
    "load_named_in_file",
    "named_in",
    "normalise",
    "packed",
    "recorded",
    "ALL_ROWS",
    "RowShare",
    "draw_shifts",
    "shift_and_flip",
    "with_fewer",
]

KINDS: Mapping[str, Callable[[Request], Data]] = {
    "digits": digits.load,
    "mnist": downloaded.load,
    "fashion_mnist": downloaded.load,
    "cifar10": downloaded.load,
    "cifar100": downloaded.load,
    "imagefolder": imagefolder.load,
    "qnli": text.load,
    "fake": fake.load,
}
WHERE = {
    "imagefolder": "imagefolder:DIR",
    "qnli": "qnli:FILE.tsv",
    "fake": "fake:CxHxW:CLASSES",
}  # the kinds that need more than their name

TEXTS = ("qnli",)
NOT_RECORDED = ("imagefolder", "qnli")  # where they are


def load(
    name: str,
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    spec: InputSpec | None = None,
    directory: Path | None = None,
    workers: int = 2,
    tokenizer: str | None = None,
) -> Data:
    """The data set `name`, at `size` pixels and with `mean` and `std` (of pixels from 0 to 1, one or one a channel), or
    with the preprocessing of a checkpoint's `spec`. `directory` is where downloads are.
    A text has `size` tokens, by a network's `tokenizer`.

    Raises InputError for an unknown name, a set that is not there, a folder without the layout, impossible
    preprocessing; reading the images, for more than 1 % that cannot be decoded.
    """
    return _load(name, Request("", "", size, mean, std, spec, directory, workers, tokenizer))


def load_named_in_file(name: str, *, spec: InputSpec, directory: Path | None = None, workers: int = 2) -> Data:
    """`load` for a set that a file names, with that file's preprocessing: it must be there, and nothing is fetched."""
    return _load(name, Request("", "", spec=spec, directory=directory, workers=workers, fetches=False))


def _load(name: str, request: Request) -> Data:
    kind, _, where = name.partition(":")
    size, spec = request.size, request.spec
    if kind not in KINDS or (where and kind not in {*WHERE, "digits"}):
        raise unknown("data set", name, [WHERE.get(known, known) for known in KINDS])
    if kind in WHERE and not where:
        raise InputError(f"{kind} says too little: give --data {WHERE[kind]}")
    if size is not None and not 4 <= size <= 1024:
        raise InputError(f"--size {size} is out of range: give 4 to 1024 pixels")
    reads_text = request.tokenizer is not None or (spec is not None and spec.is_text)
    if reads_text and kind not in TEXTS:
        raise InputError(f"{kind} holds images and the network reads text: give --data qnli:FILE.tsv")
    return KINDS[kind](replace(request, kind=kind, where=where))


T = TypeVar("T")


@dataclass(frozen=True)
class Again(Iterable[T]):
    """What `make` gives, from its beginning each time that it is gone through: nothing is kept in between."""

    make: Callable[[], Iterator[T]]

    def __iter__(self) -> Iterator[T]:
        return self.make()


def recorded(name: str) -> str:
    """`name` as a checkpoint holds it: without the path of a folder, so that the same work gives the same bytes."""
    kind = name.partition(":")[0]
    return kind if kind in NOT_RECORDED else name


def named_in(history: object, origin: str) -> str:
    """The data set that the file `origin` was made with, as the history in its metadata names it.

    Raises InputError for a name that says where data is: only the command line says that. A file that could would
    choose what else is read.
    """
    first = history[0] if isinstance(history, list | tuple) and history else {}
    options = first.get("options") if isinstance(first, Mapping) else None
    name = options.get("data", "digits") if isinstance(options, Mapping) else "digits"
    if not isinstance(name, str) or recorded(name) != name:
        raise InputError(f"{origin} names data that stands somewhere else ({name}): give --data")
    return name


def with_fewer(data: Data, count: int, seed: int) -> Data:
    """`data` with `count` of its training images, drawn by `seed`. Raises InputError where there are not so many."""
    there = len(data.train)
    if count > there:
        raise InputError(f"--images {count} is more than {data.name} has: give at most {there}")
    index = torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:count]
    return replace(data, train=subset(data.train, index.sort().values))


CALIBRATION = 512  # training images that calibrate, where no number is given


def calibration_count(asked: int | None, data: Data) -> int:
    """How many training images calibrate. Raises InputError for more than there are."""
    there = len(data.train)
    if asked is not None and asked > there:
        raise InputError(f"--calibration {asked} is more than {data.name} has: give at most {there}")
    return min(CALIBRATION, there) if asked is None else asked


def calibration(data: Data, count: int, device: torch.device, seed: int, batch: int = 64) -> Iterator[Batch]:
    """`count` training images in a fixed random order, without augmentation, as batches: what ranges are set on."""
    if not count:
        return
    seen = 0
    for images, labels in data.train.batches(batch, device, shuffle=torch.Generator().manual_seed(seed)):
        take = min(len(labels), count - seen)
        yield images[:take], labels[:take]
        seen += take
        if seen >= count:
            return
