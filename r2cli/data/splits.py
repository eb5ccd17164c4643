"""Halves of data sets: images held in memory, decoded from files when first needed, or decoded by workers each time.

Every split gives the same batches for the same generator, whatever the device and however many workers; of several
processes each gets its own images of the same batches.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from r2cli.data.decoding import decode
from r2cli.errors import InputError, R2Error
from r2cli.storage.checkpoint import InputSpec

LARGE_IMAGE = 96  # pixels; from here on a training image is a random crop, and decoded each time by workers
UNREADABLE_LIMIT = 0.01  # share of a split's images that may fail to decode

Batch = tuple[
    Tensor, Tensor
]  # images float32 (n, channels, size, size) or tokens int64 (n, 3, size), labels int64 (n,)


@dataclass(frozen=True)
class RowShare:
    """What one of several processes gets of every batch: its images at `rank`, `rank` + `world`, ..."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> Tensor:
        """Positions of its own in a batch of `count` images."""
        return torch.arange(count)[self.rank :: self.world]


ALL_ROWS = RowShare()


class Split(Protocol):
    """One half of a data set. `batches` yields every image once, in the order of `shuffle`'s generator if given.

    `size` is that of a batch of all processes together; each yields its `share` of it.
    """

    name: str
    unreadable: list[str]  # files that could not be decoded so far, and were left out

    def __len__(self) -> int: ...

    def batches(
        self,
        size: int,
        device: torch.device,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        share: RowShare = ALL_ROWS,
    ) -> Iterator[Batch]: ...


def normalise(images: Tensor, spec: InputSpec, device: torch.device) -> Tensor:
    """uint8 (n, c, h, w) to the network's float32 input on `device`; channels last, as convolutions like it."""
    mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)
    pixels = images.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
    return pixels.div_(255).sub_(mean).div_(std)


def draw_shifts(n: int, size: int, generator: torch.Generator) -> Tensor:
    """CIFAR's augmentation for n images: shifts of up to an eighth, and whether to mirror. (n, 3) int64, on the CPU."""
    pad = _border(size)
    shifts = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    mirror = torch.rand(n, 1, generator=generator) < 0.5
    return torch.cat([*shifts, mirror.long()], 1)


def shift_and_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Shift uint8 (n, c, s, s) over a zero border and mirror it as drawn, (n, 3), on the images' own device."""
    n, _, size, _ = images.shape
    pad = _border(size)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left, mirror = torch.split(draws, 1, 1)
    steps = torch.arange(size).expand(n, size)
    rows, cols = top + steps, left + torch.where(mirror > 0, size - 1 - steps, steps)
    rows, cols = rows.to(images.device, non_blocking=True), cols.to(images.device, non_blocking=True)
    each = torch.arange(n, device=images.device)[:, None, None]
    return padded[each, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def _border(size: int) -> int:
    return max(1, size // 8)


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
        self,
        size: int,
        device: torch.device,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        share: RowShare = ALL_ROWS,
    ) -> Iterator[Batch]:
        order = torch.arange(len(self)) if shuffle is None else torch.randperm(len(self), generator=shuffle)
        if device.type != "cpu" and self.images.device != device:
            self.require(order)
            self.images = self.images.to(device)
        for wanted in torch.split(order, size):
            # Drawn for the whole batch, so that every process draws the same.
            shifts = shuffle if augment and self.augments else None
            draws = None if shifts is None else draw_shifts(len(wanted), self.spec.size, shifts)
            own = share.of(len(wanted))
            own = own[self.require(wanted[own])]
            index = wanted[own]
            images = self.images[index.to(self.images.device)]
            if draws is not None:
                images = shift_and_flip(images, draws[own])
            if _any(index, share, len(wanted), self.name):
                yield normalise(images, self.spec, device), self.labels[index].to(device, non_blocking=True)

    def require(self, index: Tensor) -> Tensor:
        """Which of the images at `index` there are, (n,) bool; they are decoded by now."""
        return torch.ones_like(index, dtype=torch.bool)


@dataclass
class KeptSplit(MemorySplit):
    """Image files, each decoded when it is first needed and kept: `images` is filled as they come."""

    files: Sequence[tuple[str, int]] = ()
    state: Tensor = field(default_factory=lambda: torch.empty(0))  # (n,) int8: 0 not tried, 1 decoded, -1 unreadable

    def require(self, index: Tensor) -> Tensor:
        todo = index[self.state[index] == 0].tolist()
        if todo:
            self._decode(todo)
        return self.state[index] == 1

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


def subset(split: Split, index: Tensor) -> Split:
    """The images of `split` at `index` (n,) int64, in that order, as a split of their own."""
    if isinstance(split, KeptSplit):
        return kept(split.name, [split.files[i] for i in index.tolist()], split.spec)
    if isinstance(split, MemorySplit):
        return replace(split, images=split.images[index], labels=split.labels[index])
    if isinstance(split, TextSplit):
        return replace(split, tokens=split.tokens[index], labels=split.labels[index])
    assert isinstance(split, FolderSplit)
    return replace(split, files=[split.files[i] for i in index.tolist()])


@dataclass
class TextSplit:
    """Texts as tokens: int32 (n, 3, length), and labels int64 (n,). Batches are int64."""

    name: str
    tokens: Tensor
    labels: Tensor
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        size: int,
        device: torch.device,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        share: RowShare = ALL_ROWS,
    ) -> Iterator[Batch]:
        order = torch.arange(len(self)) if shuffle is None else torch.randperm(len(self), generator=shuffle)
        for wanted in torch.split(order, size):
            own = wanted[share.of(len(wanted))]
            if len(own):
                yield self.tokens[own].to(device).long(), self.labels[own].to(device)


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
        self,
        size: int,
        device: torch.device,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        share: RowShare = ALL_ROWS,
    ) -> Iterator[Batch]:
        order = torch.arange(len(self)) if shuffle is None else torch.randperm(len(self), generator=shuffle)
        seed = None if shuffle is None or not augment else int(torch.randint(2**31, (), generator=shuffle))
        batches = [wanted[share.of(len(wanted))].tolist() for wanted in torch.split(order, size)]
        loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            _Decoder(self.files, self.spec, seed),
            batch_sampler=[own for own in batches if own],
            generator=shuffle,
            num_workers=self.workers,
            collate_fn=_stack,
            pin_memory=device.type == "cuda",
        )
        for images, labels, unreadable in loader:
            self.unreadable += unreadable
            require_readable(self.unreadable, len(self), self.name)
            if _any(labels, share, share.world, self.name):
                yield normalise(images, self.spec, device), labels.to(device, non_blocking=True)


class _Decoder(torch.utils.data.Dataset[tuple[Tensor | str, int]]):
    """Item i: the decoded image (the file's path where it cannot be decoded) and its label; augmented for a `seed`."""

    def __init__(self, files: Sequence[tuple[str, int]], spec: InputSpec, seed: int | None) -> None:
        self.files, self.spec, self.seed = files, spec, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        path, label = self.files[index]
        if self.seed is None:
            return decode(path, self.spec), label
        # An image's augmentation depends on the epoch's seed and its index, not on the worker.
        own = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        if self.spec.size >= LARGE_IMAGE:
            return decode(path, self.spec, own), label
        image = decode(path, self.spec)
        if isinstance(image, Tensor):
            image = shift_and_flip(image[None], draw_shifts(1, self.spec.size, own))[0]
        return image, label


def _any(found: Tensor, share: RowShare, size: int, split: str) -> bool:
    """Whether anything of a batch of `size` was found. Raises R2Error where other processes would wait for this one."""
    if not len(found) and 1 < share.world <= size:
        raise R2Error(f"no image of a batch's share of {split} can be decoded: remove the files that cannot be decoded")
    return len(found) > 0


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
