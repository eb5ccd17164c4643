"""Halves of data sets: images held in memory, decoded from files when first needed, or decoded by workers each time.

Every split gives the same batches for the same generator, whatever the device and however many workers.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from r2cli.checkpoint import InputSpec
from r2cli.data.decoding import decode
from r2cli.errors import InputError

LARGE_IMAGE = 96  # pixels; from here on a training image is a random crop, and decoded each time by workers
UNREADABLE_LIMIT = 0.01  # share of a split's images that may fail to decode

Batch = tuple[Tensor, Tensor]  # images float32 (n, channels, size, size), labels int64 (n,)


class Split(Protocol):
    """One half of a data set. `batches` yields every image once, in the order of `shuffle`'s generator if given."""

    name: str
    unreadable: list[str]  # files that could not be decoded so far, and were left out

    def __len__(self) -> int: ...

    def batches(
        self, size: int, device: torch.device, shuffle: torch.Generator | None = None, augment: bool = False
    ) -> Iterator[Batch]: ...


def normalise(images: Tensor, spec: InputSpec, device: torch.device) -> Tensor:
    """uint8 (n, c, h, w) to the network's float32 input on `device`; channels last, as convolutions like it."""
    mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)
    pixels = images.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
    return pixels.div_(255).sub_(mean).div_(std)


def shift_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """CIFAR's augmentation: shift by up to an eighth over a zero border, mirror half of them. uint8 (n, c, s, s).

    The draws are the CPU generator's and the pixels move on the images' own device: a GPU sees the same images.
    """
    n, _, size, _ = images.shape
    pad = max(1, size // 8)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    mirror = torch.rand(n, 1, generator=generator) < 0.5
    steps = torch.arange(size).expand(n, size)
    rows, cols = top + steps, left + torch.where(mirror, size - 1 - steps, steps)
    rows, cols = rows.to(images.device, non_blocking=True), cols.to(images.device, non_blocking=True)
    each = torch.arange(n, device=images.device)[:, None, None]
    return padded[each, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


@dataclass
class MemorySplit:
    """Decoded images: uint8 (n, c, size, size), and labels int64 (n,). On a GPU they are kept there."""

    name: str
    images: Tensor
    labels: Tensor
    spec: InputSpec
    augments: bool = True  # whether a shifted and mirrored image is still of its class
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, size: int, device: torch.device, shuffle: torch.Generator | None = None, augment: bool = False
    ) -> Iterator[Batch]:
        order = torch.arange(len(self)) if shuffle is None else torch.randperm(len(self), generator=shuffle)
        if device.type != "cpu" and self.images.device != device:
            self.require(order)
            self.images = self.images.to(device)
        for wanted in torch.split(order, size):
            index = self.require(wanted)
            images = self.images[index.to(self.images.device)]
            if augment and self.augments:
                assert shuffle is not None
                images = shift_and_flip(images, shuffle)
            if len(index):
                yield normalise(images, self.spec, device), self.labels[index].to(device, non_blocking=True)

    def require(self, index: Tensor) -> Tensor:
        """Those of the images at `index` that there are, decoded by now."""
        return index


@dataclass
class KeptSplit(MemorySplit):
    """Image files, each decoded when it is first needed and kept: `images` is filled as they come."""

    files: Sequence[tuple[str, int]] = ()
    state: Tensor = field(default_factory=lambda: torch.empty(0))  # (n,) int8: 0 not tried, 1 decoded, -1 unreadable

    def require(self, index: Tensor) -> Tensor:
        todo = index[self.state[index] == 0].tolist()
        if todo:
            self._decode(todo)
        return index[self.state[index] == 1]

    def _decode(self, todo: Sequence[int]) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the threads of the pool are the parallelism
        try:
            with ThreadPoolExecutor(min(threads, len(todo))) as pool:
                decoded = list(pool.map(lambda i: decode(self.files[i][0], self.spec), todo))
        finally:
            torch.set_num_threads(threads)
        for i, image in zip(todo, decoded, strict=True):
            if isinstance(image, Tensor):
                self.images[i], self.state[i] = image, 1
            else:
                self.unreadable.append(image)
                self.state[i] = -1
        require_readable(self.unreadable, len(self), self.name)


def kept(name: str, files: Sequence[tuple[str, int]], spec: InputSpec) -> KeptSplit:
    """A split of files to keep in memory once they are decoded."""
    images = torch.empty(len(files), *spec.shape, dtype=torch.uint8)  # no page is touched before its image is there
    labels = torch.tensor([label for _, label in files])
    return KeptSplit(name, images, labels, spec, files=files, state=torch.zeros(len(files), dtype=torch.int8))


@dataclass
class FolderSplit:
    """Image files, decoded by workers as they are needed: for what does not fit in memory."""

    name: str
    files: Sequence[tuple[str, int]]
    spec: InputSpec
    workers: int
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    def batches(
        self, size: int, device: torch.device, shuffle: torch.Generator | None = None, augment: bool = False
    ) -> Iterator[Batch]:
        crops = augment and self.spec.size >= LARGE_IMAGE
        seed = 0 if shuffle is None else int(torch.randint(2**31, (), generator=shuffle))
        loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            _Decoder(self.files, self.spec, seed if crops else None),
            batch_size=size,
            shuffle=shuffle is not None,
            generator=shuffle,
            num_workers=self.workers,
            collate_fn=_stack,
            pin_memory=device.type == "cuda",
        )
        shifts = torch.Generator().manual_seed(seed)  # of its own: the loader's workers draw from the other one
        for images, labels, unreadable in loader:
            self.unreadable += unreadable
            require_readable(self.unreadable, len(self), self.name)
            if len(images):
                images = images.to(device, non_blocking=True)
                images = shift_and_flip(images, shifts) if augment and not crops else images
                yield normalise(images, self.spec, device), labels.to(device, non_blocking=True)


class _Decoder(torch.utils.data.Dataset[tuple[Tensor | str, int]]):
    """Item i: the decoded image (the file's path where it cannot be decoded) and its label."""

    def __init__(self, files: Sequence[tuple[str, int]], spec: InputSpec, seed: int | None) -> None:
        self.files, self.spec, self.seed = files, spec, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        path, label = self.files[index]
        crop = None
        if self.seed is not None:  # an image's crop depends on the epoch's seed and its index, not on the worker
            crop = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return decode(path, self.spec, crop), label


def _stack(samples: list[tuple[Tensor | str, int]]) -> tuple[Tensor, Tensor, list[str]]:
    """Images uint8 (n, c, s, s), labels int64 (n,), and the files that could not be decoded."""
    pairs = [(image, label) for image, label in samples if isinstance(image, Tensor)]
    images = torch.stack([image for image, _ in pairs]) if pairs else torch.empty(0)
    return images, torch.tensor([label for _, label in pairs]), [path for path, _ in samples if isinstance(path, str)]


def require_readable(unreadable: Sequence[str], total: int, split: str) -> None:
    """Raises InputError where more of a split's images cannot be decoded than may be left out."""
    distinct = sorted(set(unreadable))
    if len(distinct) > UNREADABLE_LIMIT * total:
        raise InputError(
            f"{len(distinct)} of {total} images of {split} cannot be decoded, more than {UNREADABLE_LIMIT:.0%}: "
            f"remove or replace them, first {os.fspath(distinct[0])}"
        )
