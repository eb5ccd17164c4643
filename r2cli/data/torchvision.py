"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100. torchvision downloads them once, and checks their checksums."""

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2cli.data.request import Data, Request, in_memory
from r2cli.errors import InputError


@dataclass(frozen=True)
class Source:
    """A class of torchvision, and the mean and standard deviation of each channel of its training pixels, 0 to 1."""

    dataset: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augments: bool  # False for MNIST: a mirrored digit is no digit


SOURCES: Mapping[str, Source] = {
    "mnist": Source("MNIST", (0.1307,), (0.3081,), augments=False),
    "fashion_mnist": Source("FashionMNIST", (0.2860,), (0.3530,), augments=True),
    "cifar10": Source("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), augments=True),
    "cifar100": Source("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), augments=True),
}


def load(request: Request) -> Data:
    """Load a data set, or download it. Raises InputError if it is missing and cannot be downloaded."""
    source, folder = SOURCES[request.kind], request.directory or cache()
    (train, names), (test, _) = (_half(request, source, folder, train=half) for half in (True, False))
    spec = request.input(train[0].shape[1], train[0].shape[2], mean=source.mean, std=source.std)
    return in_memory(request.kind, names, spec, train=train, test=test, augments=source.augments)


def cache() -> Path:
    """Return the folder for downloads when there is no --data-dir. Raises InputError for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r2cli"
    except RuntimeError as error:
        raise InputError("there is no home folder to download to: give --data-dir") from error


def _half(request: Request, source: Source, folder: Path, *, train: bool) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """Return the images uint8 (n, c, h, w) and labels int64 (n,) of one half, and the names of the classes."""
    import torchvision.datasets

    try:
        with redirect_stdout(sys.stderr):  # torchvision prints while it downloads; standard output is for results
            dataset: Any = getattr(torchvision.datasets, source.dataset)(
                str(folder), train=train, download=request.fetches
            )
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets).long()
    # torchvision raises these when there is no network, the disk is full, or a file is cut short.
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        kind = request.kind
        if not request.fetches:
            raise InputError(f"{kind} is not in {folder}: give --data {kind} to download it") from error
        raise InputError(
            f"{kind} is neither in {folder} nor could it be downloaded ({' '.join(str(error).split())}): give "
            f"--data-dir a folder that holds torchvision's {source.dataset}, or --data imagefolder:DIR"
        ) from error
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return (images, labels), list(dataset.classes)
