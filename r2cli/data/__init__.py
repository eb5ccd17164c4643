"""Data sets by name, and the one path from an image to the network's input.

    digits                          scikit-learn's 1,797 real 8x8 scans, split into 1,200 to train and 597 to test;
                                    digits:64 takes 64 of each
    mnist, fashion_mnist,           torchvision's, downloaded once
    cifar10, cifar100
    imagefolder:DIR                 DIR/train/CLASS/* and DIR/val/CLASS/* (or DIR/test/CLASS/*), ImageNet's layout
    qnli:FILE.tsv, qnli:DIR         pairs of texts with labels, in GLUE's form; DIR has train.tsv and dev.tsv
    fake:CxHxW:CLASSES              noise that depends a little on the class: to time and try things, not to learn
    images:DIR                      pictures without labels, in any folders below DIR
    npz:FILE, npz:DIR               arrays by the names of the inputs, and `target` if it is there
    FILE.py:FACTORY                 the user's own datasets, loaders or batches of tensors (own.py)

Images that fit in memory are decoded once and kept as uint8. Others are decoded by workers each time. The preprocessing
is an `InputSpec`: the checkpoint records it, and every later command applies it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from r2cli.data import arrays, digits, fake, imagefolder, images, losses, own, own_splits, text, torchvision
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
from r2cli.data.text import pack_tokenizer
from r2cli.errors import InputError, unknown
from r2cli.storage import own_code
from r2cli.storage.input_spec import NetworkInput, TensorsSpec, each
from r2cli.storage.input_spec import count as samples

__all__ = [
    "KINDS",
    "LARGE_IMAGE",
    "Repeatable",
    "batch_that_fits",
    "with_test_images",
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
    "pack_tokenizer",
    "recorded",
    "ALL_ROWS",
    "RowShare",
    "draw_shifts",
    "shift_and_flip",
    "with_fewer",
]

NOISE = "noise"  # what stands for the data of a network whose data is not there
OWN = "the data"  # the name of data that is given to the API
KINDS: Mapping[str, Callable[[Request], Data]] = {
    "digits": digits.load,
    "mnist": torchvision.load,
    "fashion_mnist": torchvision.load,
    "cifar10": torchvision.load,
    "cifar100": torchvision.load,
    "imagefolder": imagefolder.load,
    "qnli": text.load,
    "fake": fake.load,
    "images": images.load,
    "npz": arrays.load,
}
# The kinds that need more than their name, and how to write them.
WHERE = {
    "imagefolder": "imagefolder:DIR",
    "qnli": "qnli:FILE.tsv",
    "fake": "fake:CxHxW:CLASSES",
    "images": "images:DIR",
    "npz": "npz:FILE",
}

TEXTS = ("qnli",)
NOT_RECORDED = ("imagefolder", "qnli", "images", "npz")  # a checkpoint does not record the paths of these kinds


def load(name: str, **asked: Any) -> Data:
    """Load the data set `name` with the preprocessing of a checkpoint's `spec`, or with that of the other arguments.

    They are fields of a `Request`: size, mean, std, spec, directory, workers, tokenizer, classes. `size` is in pixels,
    one number or height and width; of a text, in tokens, which the network's `tokenizer` makes. `mean` and `std` are of
    pixels from 0 to 1, one number or one for each channel. `directory` is the folder for downloads. `classes` are the
    network's, in the order of its logits: labels of folders and texts are numbered so.

    A name FILE.py:FACTORY or package.module:FACTORY is the user's own code, as `load_own` takes it.

    Raises InputError for an unknown name, a missing set, a folder with another layout, and impossible preprocessing.
    Its batches raise InputError when more than 1 % of the images cannot be decoded.
    """
    if own_code.is_code(name):
        return load_own(name, {})
    return _load(name, Request("", "", **asked))


def load_own(name: str, keywords: Mapping[str, Any]) -> Data:
    """Load what the user's factory `name` returns, called with `keywords`. Raises InputError for what is no data."""
    given = own_code.called(own_code.factory(name), name, keywords, "--data-arg")
    return own.to_data(own_code.label(name), given)


def load_named_in_file(
    name: str,
    *,
    spec: NetworkInput,
    directory: Path | None = None,
    workers: int = 2,
    classes: tuple[str, ...] = (),
) -> Data:
    """Load a data set that a file names, with the preprocessing in that file. Nothing is downloaded.

    Raises InputError as `load` does, and for a set that is not on this machine.
    """
    own = Request("", "", spec=spec, directory=directory, workers=workers, fetches=False, classes=classes)
    if name in WHERE:
        raise InputError(f"its data was {name}, and the file does not say where that is: give --data {WHERE[name]}")
    return _load(name, own)


def _load(name: str, request: Request) -> Data:
    if own_code.is_code(name):
        raise InputError(f"{name} is your own code and runs only when you name it: give --data FILE.py:FACTORY")
    kind, _, where = name.partition(":")
    size, spec = request.size, request.spec
    if kind == NOISE:
        raise InputError("the file was made without data: give --data")
    if kind == OWN:
        raise InputError("the network was made with data of your own, which no file holds: give it again")
    if kind not in KINDS or (where and kind not in {*WHERE, "digits"}):
        raise unknown("data set", name, [WHERE.get(known, known) for known in KINDS])
    if kind in WHERE and not where:
        needed = {"DIR": "a folder", "CxHxW:CLASSES": "a shape"}.get(WHERE[kind].partition(":")[2], "a file")
        raise InputError(f"{kind} needs {needed}: give --data {WHERE[kind]}")
    for side in size if isinstance(size, tuple) else () if size is None else (size,):
        if not 4 <= side <= 1024:
            raise InputError(f"--size {side} is out of range: give 4 to 1024 pixels")
    reads_text = request.tokenizer is not None or (spec is not None and spec.is_text)
    if reads_text and kind not in (*TEXTS, "npz"):
        raise InputError(f"{kind} holds images and the network reads text: give --data qnli:FILE.tsv")
    return KINDS[kind](replace(request, kind=kind, where=where))


def learning(data: Data, loss: str | None) -> Data:
    """`data` with the loss of that name; with None its own."""
    return data if loss is None else replace(data, task=replace(data.task, loss=losses.named(loss)))


def recorded_loss(data: Data) -> dict[str, str]:
    """What options say of the loss: nothing of the usual one."""
    name = data.task.loss.name
    return {} if name == losses.CROSS_ENTROPY.name else {"loss": recorded(name)}


T = TypeVar("T")


@dataclass(frozen=True)
class Repeatable(Iterable[T]):
    """An iterable that starts again each time: it calls `make` for a new iterator, and keeps no items."""

    make: Callable[[], Iterator[T]]

    def __iter__(self) -> Iterator[T]:
        return self.make()


def recorded(name: str) -> str:
    """Return `name` as a checkpoint records it.

    It is without the path of a folder, so that the same work in another folder gives the same bytes.
    """
    if own_code.is_code(name):
        return own_code.label(name)
    kind = name.partition(":")[0]
    return kind if kind in NOT_RECORDED else name


def named_in(history: object, origin: str) -> str:
    """Return the name of the data set that the file `origin` was made with, by the history in its metadata.

    Raises InputError for a name with a path in it. Only the command line may say where data is: otherwise a file could
    choose what else is read.
    """
    first = history[0] if isinstance(history, list | tuple) and history else {}
    options = first.get("options") if isinstance(first, Mapping) else None
    name = options.get("data", "digits") if isinstance(options, Mapping) else "digits"
    if not isinstance(name, str) or recorded(name) != name:
        raise InputError(f"{origin} names data that stands somewhere else ({name}): give --data")
    return name


def with_fewer(data: Data, count: int, seed: int) -> Data:
    """Return `data` with `count` of its training images, drawn by `seed`. Raises InputError where it has fewer."""
    available = len(data.train)
    if count > available:
        raise InputError(f"--images {count} is more than {data.name} has: give at most {available}")
    index = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    # Sorted, so that files are read in the order of their folders.
    return replace(data, train=subset(data.train, index.sort().values))


def with_test_images(data: Data, count: int) -> Data:
    """Return `data` with `count` of its test images, drawn at random and always the same; all, where it has fewer."""
    index = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:count]
    return replace(data, test=subset(data.test, index.sort().values))


PIXELS = 2**19  # of a batch: what a mobile network makes of it takes some 150 MB


def batch_that_fits(split: Split, most: int) -> int:
    """How many inputs at once, at most `most`, where nothing is learned: 10 images of 224 pixels, 128 of 64."""
    spec: NetworkInput | None = getattr(split, "spec", None)  # texts are short and have none
    if spec is None:
        return most
    shapes = [one.shape for one in spec.tensors] if isinstance(spec, TensorsSpec) else [spec.shape]
    return max(1, min(most, PIXELS // max(1, *(math.prod(shape[1:]) for shape in shapes))))


CALIBRATION = 512  # training images that calibrate, where no number is given


def calibration_count(asked: int | None, data: Data) -> int:
    """How many training images calibrate. Raises InputError for more than there are."""
    there = len(data.shown)
    if asked is not None and asked > there:
        raise InputError(f"--calibration {asked} is more than {data.name} has: give at most {there}")
    return min(CALIBRATION, there) if asked is None else asked


def calibration(data: Data, count: int, device: torch.device, seed: int, batch: int = 64) -> Iterator[Batch]:
    """Yield batches of `count` training images, in a random order that `seed` fixes, without augmentation."""
    if not count:
        return
    given, batch = 0, batch_that_fits(data.shown, batch)
    for given_, target in data.shown.batches(batch, device, shuffle=torch.Generator().manual_seed(seed)):
        left = count - given
        given += samples(given_)
        if given <= count:
            yield given_, target
        else:
            yield each(given_, lambda one: one[:left]), own_splits.taken(target, torch.arange(left))  # noqa: B023
        if given >= count:
            return
