"""The two halves of a data set, as batches.

    MemorySplit    images that are in memory
    KeptSplit      image files that are decoded when they are first needed, and then kept
    FolderSplit    image files that worker processes decode each time
    TextSplit      texts as tokens

A split gives the same batches for the same generator, on every device and with any number of workers. If several
processes train one network, each gets its own images of the same batches.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from r2cli.config.machine import usable_cores
from r2cli.data.decoding import decode
from r2cli.errors import InputError, R2Error
from r2cli.storage.input_spec import InputSpec

LARGE_IMAGE = 96  # pixels; training images of this size or more are random crops, decoded each time by workers
UNREADABLE_LIMIT = 0.01  # share of a split's images that may fail to decode: large collections have a few damaged files

# Inputs: images float32 (n, channels, size, size), tokens int64 (n, 3, size), or the user's own tensors. The target is
# labels int64 (n,), or whatever the user's data has.
Batch = tuple[Any, Any]  # of `Given`


@dataclass(frozen=True)
class RowShare:
    """The part of every batch that one of `world` processes gets: the rows `rank`, `rank` + `world`, and so on."""

    rank: int = 0
    world: int = 1

    def positions(self, count: int) -> Tensor:
        """Return the rows of this process in a batch of `count` images: int64 (n,)."""
        return torch.arange(count)[self.rank :: self.world]


ALL_ROWS = RowShare()


class Split(Protocol):
    """One half of a data set. `batches` yields every image once, in an order that the generator `shuffle` draws.

    `size` is the size of a batch of all processes together. Each process yields its `share` of it.
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


def rows_of_batches(count: int, size: int, shuffle: torch.Generator | None, share: RowShare) -> Iterator[Tensor]:
    """Yield the rows int64 (n,) of each batch of `size` that this process gets, where it gets any: of `count` rows in
    their order, or in one that `shuffle` draws first."""
    order = torch.arange(count) if shuffle is None else torch.randperm(count, generator=shuffle)
    for wanted in torch.split(order, size):
        rows = wanted[share.positions(len(wanted))]
        if len(rows):
            yield rows


def normalise(images: Tensor, spec: InputSpec, device: torch.device) -> Tensor:
    """Turn uint8 images (n, c, h, w) into the network's float32 input on `device`.

    In channels-last memory, in which convolutions are fastest.
    """
    mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)
    pixels = images.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
    return pixels.div_(255).sub_(mean).div_(std)


def draw_shifts(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw CIFAR's augmentation for n images: shift down, shift right, and whether to mirror. int64 (n, 3) on the CPU.

    A shift is up to an eighth of `size`, as 4 of CIFAR's 32 pixels (He et al., 2016, section 4.2).
    """
    pad = _border(size)
    shifts = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    mirror = torch.rand(n, 1, generator=generator) < 0.5
    return torch.cat([*shifts, mirror.long()], 1)


def shift_and_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Shift uint8 images (n, c, h, w) over a border of zeros and mirror them, as `draws` (n, 3) says.

    One gather does it for all images at once, on the device of the images.
    """
    n, _, height, width = images.shape
    pad = _border(height)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left, mirror = torch.split(draws, 1, 1)
    steps = torch.arange(width).expand(n, width)
    rows, cols = top + torch.arange(height), left + torch.where(mirror > 0, width - 1 - steps, steps)
    rows, cols = rows.to(images.device, non_blocking=True), cols.to(images.device, non_blocking=True)
    image = torch.arange(n, device=images.device)[:, None, None]
    return padded[image, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def _border(size: int) -> int:
    return max(1, size // 8)


@dataclass
class MemorySplit:
    """Decoded images uint8 (n, c, size, size) and labels int64 (n,). If training is on a GPU, the images move there."""

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
            # Drawn for the whole batch, so that the generators of all processes stay in step.
            generator = shuffle if augment and self.augments else None
            draws = None if generator is None else draw_shifts(len(wanted), self.spec.size, generator)
            rows = share.positions(len(wanted))
            rows = rows[self.require(wanted[rows])]
            index = wanted[rows]
            images = self.images[index.to(self.images.device)]
            if draws is not None:
                images = shift_and_flip(images, draws[rows])
            if _has_images(index, share, len(wanted), self.name):
                yield normalise(images, self.spec, device), self.labels[index].to(device, non_blocking=True)

    def require(self, index: Tensor) -> Tensor:
        """Make sure that the images at `index` (n,) are decoded. Returns which of them can be used: bool (n,)."""
        return torch.ones_like(index, dtype=torch.bool)


@dataclass
class KeptSplit(MemorySplit):
    """Image files. Each is decoded when it is first needed, and then kept in `images`."""

    files: Sequence[tuple[str, int]] = ()
    state: Tensor = field(default_factory=lambda: torch.empty(0))  # (n,) int8: 0 not tried, 1 decoded, -1 unreadable

    def require(self, index: Tensor) -> Tensor:
        todo = index[self.state[index] == 0].tolist()
        if todo:
            self._decode(todo)
        return self.state[index] == 1

    def _decode(self, todo: Sequence[int]) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the pool already uses all cores: threads within threads would be slower
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
    """Make a split of files that are kept in memory once they are decoded."""
    # torch.empty writes nothing, so the system gives a page of memory only when an image is stored in it.
    images = torch.empty(len(files), *spec.shape, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in files])
    return KeptSplit(name, images, labels, spec, files=files, state=torch.zeros(len(files), dtype=torch.int8))


def subset(split: Split, index: Tensor) -> Split:
    """Return a split of the images of `split` at `index` (n,) int64, in that order."""
    if isinstance(split, KeptSplit):
        return kept(split.name, [split.files[i] for i in index.tolist()], split.spec)
    if isinstance(split, MemorySplit):
        return replace(split, images=split.images[index], labels=split.labels[index])
    if isinstance(split, TextSplit):
        return replace(split, tokens=split.tokens[index], labels=split.labels[index])
    if not isinstance(split, FolderSplit):
        return split.of(index)  # type: ignore[attr-defined, no-any-return]  # the user's own: data/own.py
    return replace(split, files=[split.files[i] for i in index.tolist()])


@dataclass
class TextSplit:
    """Texts as tokens int32 (n, 3, length), and labels int64 (n,). Batches are int64, as embeddings need them."""

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
        for index in rows_of_batches(len(self), size, shuffle, share):
            yield self.tokens[index].to(device).long(), self.labels[index].to(device)


@dataclass
class FolderSplit:
    """Image files that worker processes decode each time. For sets that do not fit in memory."""

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
        batches = [index.tolist() for index in rows_of_batches(len(self), size, shuffle, share)]
        seed = None if shuffle is None or not augment else int(torch.randint(2**31, (), generator=shuffle))
        loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            _Decoder(self.files, self.spec, seed),
            batch_sampler=batches,
            generator=shuffle,
            num_workers=min(self.workers, usable_cores()),  # torch warns of more
            collate_fn=_stack,
            pin_memory=device.type == "cuda",
        )
        for images, labels, unreadable in loader:
            self.unreadable += unreadable
            require_readable(self.unreadable, len(self), self.name)
            if _has_images(labels, share, share.world, self.name):
                yield normalise(images, self.spec, device), labels.to(device, non_blocking=True)


class _Decoder(torch.utils.data.Dataset[tuple[Tensor | str, int]]):
    """Item i is the decoded image and its label, or the file's path and its label if it cannot be decoded.

    With a `seed` the image is augmented.
    """

    def __init__(self, files: Sequence[tuple[str, int]], spec: InputSpec, seed: int | None) -> None:
        self.files, self.spec, self.seed = files, spec, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        path, label = self.files[index]
        if self.seed is None:
            return decode(path, self.spec), label
        # A generator from the epoch's seed and the index, so that the number of workers changes nothing. The factor
        # keeps the seeds of two epochs apart in sets of up to a million images.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        if self.spec.size >= LARGE_IMAGE:
            return decode(path, self.spec, generator), label
        image = decode(path, self.spec)
        if isinstance(image, Tensor):
            image = shift_and_flip(image[None], draw_shifts(1, self.spec.size, generator))[0]
        return image, label


def _has_images(found: Tensor, share: RowShare, size: int, split: str) -> bool:
    """Say whether any image of this process's share of a batch of `size` images was decoded.

    Raises R2Error where the other processes have images: they would wait for this one's gradients forever.
    """
    if not len(found) and 1 < share.world <= size:
        raise R2Error(f"no image of a batch's share of {split} can be decoded: remove the files that cannot be decoded")
    return len(found) > 0


def _stack(samples: list[tuple[Tensor | str, int]]) -> tuple[Tensor, Tensor, list[str]]:
    """Stack samples into images uint8 (n, c, s, s) and labels int64 (n,), and list the files that are not decodable."""
    pairs = [(image, label) for image, label in samples if isinstance(image, Tensor)]
    images = torch.stack([image for image, _ in pairs]) if pairs else torch.empty(0)
    return images, torch.tensor([label for _, label in pairs]), [path for path, _ in samples if isinstance(path, str)]


def require_readable(unreadable: Sequence[str], total: int, split: str) -> None:
    """Raise InputError if more than `UNREADABLE_LIMIT` of a split's images cannot be decoded."""
    distinct = sorted(set(unreadable))
    if len(distinct) > UNREADABLE_LIMIT * total:
        raise InputError(
            f"{len(distinct)} of {total} images of {split} cannot be decoded, more than {UNREADABLE_LIMIT:.0%}: "
            f"remove or replace them, beginning with {os.fspath(distinct[0])}"
        )
