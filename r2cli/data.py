"""Data sets by name, and the one path from an image to the network's input.

    digits              scikit-learn's 1,797 real 8x8 scans, embedded; a fixed stratified split of 1,200 and 597
    imagefolder:DIR     DIR/train/CLASS/* and DIR/val/CLASS/* (or DIR/test/CLASS/*), ImageNet's layout

Images are kept as uint8 where they fit in memory, decoded once; otherwise workers decode them as they are needed. What
preprocessing was used is an `InputSpec`, which the checkpoint records and every later command applies.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from r2cli.checkpoint import InputSpec
from r2cli.errors import InputError, unknown

DIGITS_TEST = 597
DIGITS_SIZE = 16  # pixels; at the scans' own 8x8 a MobileNet has nothing left after its strides
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
MEMORY_LIMIT = 2 * 2**30  # bytes of uint8 images that are kept decoded
UNREADABLE_LIMIT = 0.01  # share of a split's images that may fail to decode
LARGE_IMAGE = 96  # pixels; from here on images are decoded by workers, and a training image is a random crop

Batch = tuple[Tensor, Tensor]  # images float32 (n, channels, size, size), labels int64 (n,)


class Split(Protocol):
    """One half of a data set. `batches` yields every image once, in the order of `shuffle`'s generator if given."""

    name: str
    unreadable: list[str]  # files that could not be decoded, and were left out

    def __len__(self) -> int: ...

    def batches(
        self, size: int, device: torch.device, shuffle: torch.Generator | None = None, augment: bool = False
    ) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Data:
    name: str
    input: InputSpec
    class_names: tuple[str, ...]
    train: Split
    test: Split


def load(name: str, *, size: int | None = None, spec: InputSpec | None = None, workers: int = 2) -> Data:
    """The data set `name`, at `size` pixels or with the preprocessing of a checkpoint's `spec`.

    Raises InputError for an unknown name, a folder without the layout, or more unreadable images than 1 %.
    """
    kind, _, where = name.partition(":")
    if size is not None and not 4 <= size <= 1024:
        raise InputError(f"--size {size} is out of range: give 4 to 1024 pixels")
    if kind == "digits" and not where:
        return _digits(size, spec)
    if kind == "imagefolder" and not where:
        raise InputError("imagefolder needs its directory: give --data imagefolder:DIR")
    if kind == "imagefolder":
        return _imagefolder(Path(where), size, spec, workers)
    raise unknown("data set", name, ["digits", "imagefolder:DIR"])


def normalise(images: Tensor, spec: InputSpec, device: torch.device) -> Tensor:
    """uint8 (n, c, h, w) to the network's float32 input on `device`; channels last, as convolutions like it."""
    mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)
    pixels = images.to(device).to(torch.float32, memory_format=torch.channels_last)
    return pixels.div_(255).sub_(mean).div_(std)


# --- in memory -----------------------------------------------------------------------------------------------------


@dataclass
class MemorySplit:
    """Decoded images: uint8 (n, c, size, size), and labels int64 (n,)."""

    name: str
    images: Tensor
    labels: Tensor
    spec: InputSpec
    flip: bool = True  # whether a mirrored image is still of its class
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, size: int, device: torch.device, shuffle: torch.Generator | None = None, augment: bool = False
    ) -> Iterator[Batch]:
        order = torch.arange(len(self)) if shuffle is None else torch.randperm(len(self), generator=shuffle)
        for index in torch.split(order, size):
            images = self.images[index]
            if augment and self.flip:
                assert shuffle is not None
                images = shift_and_flip(images, shuffle)
            yield normalise(images, self.spec, device), self.labels[index].to(device)


def shift_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """CIFAR's augmentation: shift by up to an eighth over a zero border, mirror half of them. uint8 (n, c, s, s)."""
    n, _, size, _ = images.shape
    pad = max(1, size // 8)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    mirror = torch.rand(n, 1, generator=generator) < 0.5
    steps = torch.arange(size).expand(n, size)
    rows, cols = top + steps, left + torch.where(mirror, size - 1 - steps, steps)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def _digits(size: int | None, spec: InputSpec | None) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)  # (1797, 64) of 0 .. 16
    wanted = spec.size if spec else size or DIGITS_SIZE
    spec = spec or InputSpec(1, wanted, wanted, mean=(0.3053,), std=(0.3763,))  # of the 8x8 training scans
    if spec.channels not in (1, 3):
        raise InputError(f"digits have 1 channel, the checkpoint wants {spec.channels}: give its own --data")
    scans = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    if spec.size != 8:
        scans = torch.nn.functional.interpolate(scans, (spec.size, spec.size), mode="bilinear")
    images = scans.round().to(torch.uint8).expand(-1, spec.channels, -1, -1).contiguous()
    target = torch.from_numpy(labels).long()
    train, test = train_test_split(
        torch.arange(len(target)).numpy(), test_size=DIGITS_TEST, stratify=labels, random_state=0
    )
    halves = [
        MemorySplit(name, images[index], target[index], spec, flip=False)
        for name, index in (("train", torch.from_numpy(train)), ("test", torch.from_numpy(test)))
    ]
    return Data("digits", spec, tuple(str(digit) for digit in range(10)), halves[0], halves[1])


# --- image folders -------------------------------------------------------------------------------------------------


@dataclass
class FolderSplit:
    """Image files, decoded by workers as they are needed: for what does not fit in memory."""

    name: str
    files: Sequence[tuple[Path, int]]
    spec: InputSpec
    workers: int
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    def batches(
        self, size: int, device: torch.device, shuffle: torch.Generator | None = None, augment: bool = False
    ) -> Iterator[Batch]:
        seed = 0 if shuffle is None else int(torch.randint(2**31, (), generator=shuffle))
        loader: torch.utils.data.DataLoader[tuple[Tensor | str, int]] = torch.utils.data.DataLoader(
            _Decoder(self.files, self.spec, seed if augment else None),
            batch_size=size,
            shuffle=shuffle is not None,
            generator=shuffle,
            num_workers=self.workers,
            collate_fn=list,
        )
        for samples in loader:
            self.unreadable += [image for image, _ in samples if isinstance(image, str)]
            _require_readable(self.unreadable, len(self), self.name)
            images = [image for image, _ in samples if isinstance(image, Tensor)]
            labels = [label for image, label in samples if isinstance(image, Tensor)]
            if images:
                yield normalise(torch.stack(images), self.spec, device), torch.tensor(labels, device=device)


class _Decoder(torch.utils.data.Dataset[tuple[Tensor | str, int]]):
    """Item i: the decoded image (the file's path where it cannot be decoded) and its label."""

    def __init__(self, files: Sequence[tuple[Path, int]], spec: InputSpec, seed: int | None) -> None:
        self.files, self.spec, self.seed = files, spec, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        path, label = self.files[index]
        crop = None
        if self.seed is not None:  # an image's crop depends on the epoch's seed and its index, not on the worker
            crop = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return decode(path, self.spec, crop), label


def decode(path: Path, spec: InputSpec, crop: torch.Generator | None = None) -> Tensor | str:
    """One file as uint8 (channels, size, size), or its path where it is not a readable image.

    Centre crop after a resize; with `crop`, Inception's random resized crop and mirror (Szegedy et al. 2015).
    """
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms.v2 import functional as F

    try:
        with Image.open(path) as file:
            # Pillow clips 16 bits to 255 where it should scale them.
            shallow = file.point(lambda value: value / 257).convert("L") if file.mode.startswith("I;16") else file
            image = F.pil_to_tensor(shallow.convert("L" if spec.channels == 1 else "RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return str(path)
    out = [spec.size, spec.size]
    if crop is None:
        scaled = image if min(image.shape[1:]) == spec.resize else F.resize(image, [spec.resize], antialias=True)
        return F.center_crop(scaled, out)  # type: ignore[no-any-return]
    _, height, width = image.shape
    area, log_ratio, top, left, mirror = torch.rand(5, generator=crop).tolist()
    side = ((0.08 + 0.92 * area) * height * width) ** 0.5
    stretch = (3 / 4) ** (0.5 - log_ratio)  # square root of a ratio from 3/4 to 4/3, uniform in its logarithm
    h, w = min(height, max(1, round(side / stretch))), min(width, max(1, round(side * stretch)))
    box = (int(top * (height - h + 1)), int(left * (width - w + 1)), h, w)
    image = F.resized_crop(image, *box, out, antialias=True)
    return F.horizontal_flip(image) if mirror < 0.5 else image  # type: ignore[no-any-return]


def _imagefolder(root: Path, size: int | None, spec: InputSpec | None, workers: int) -> Data:
    if not root.is_dir():
        raise InputError(f"{root} is not a directory: imagefolder:DIR wants DIR/train/CLASS/* and DIR/val/CLASS/*")
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or held_out is None:
        raise InputError(f"{root} has no train/ with a val/ or test/ beside it: imagefolder:DIR wants both")
    classes, train = _scan(root / "train")
    test_classes, test = _scan(held_out)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))[0]
        raise InputError(f"{root}: class folder '{odd}' is in only one of train/ and {held_out.name}/")
    spec = spec or _folder_spec([file for file, _ in train], size)

    def split(name: str, files: Sequence[tuple[Path, int]]) -> Split:
        if spec.size >= LARGE_IMAGE or (len(train) + len(test)) * spec.channels * spec.size**2 > MEMORY_LIMIT:
            return FolderSplit(name, files, spec, workers)
        return _decode_all(name, files, spec)

    return Data(f"imagefolder:{root}", spec, classes, split("train", train), split(held_out.name, test))


def _folder_spec(files: Sequence[Path], size: int | None) -> InputSpec:
    """Preprocessing for a folder: the first image's own size where it is small, else ImageNet's 224 out of 256."""
    own = size
    if own is None:
        shorter = next((shorter for shorter in map(_shorter_side, files) if shorter), LARGE_IMAGE)
        own = shorter if shorter < LARGE_IMAGE else 224
    return InputSpec(3, own, own if own < LARGE_IMAGE else round(own * 256 / 224), IMAGENET_MEAN, IMAGENET_STD)


def _shorter_side(path: Path) -> int | None:
    """Pixels of an image's shorter side; None where it is not a readable image."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return min(file.size)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None


def _scan(split: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names in order and (file, label) of one split."""
    folders = sorted(entry for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [
        (path, label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise InputError(f"{split} holds no images: it wants CLASS/*.jpg (or png, bmp, webp, tiff)")
    if len(folders) < 2:
        raise InputError(f"{split} has one class folder, '{folders[0].name}': a classifier needs at least two")
    held = {label for _, label in files}
    bare = next((folder for label, folder in enumerate(folders) if label not in held), None)
    if bare is not None:
        raise InputError(f"{bare} holds no images: add some, or remove the folder")
    return tuple(folder.name for folder in folders), files


def _decode_all(name: str, files: Sequence[tuple[Path, int]], spec: InputSpec) -> MemorySplit:
    threads = torch.get_num_threads()

    def one(item: tuple[Path, int]) -> Tensor | str:
        return decode(item[0], spec)

    torch.set_num_threads(1)  # the threads of the pool are the parallelism
    try:
        with ThreadPoolExecutor(threads) as pool:
            decoded = list(pool.map(one, files))
    finally:
        torch.set_num_threads(threads)
    unreadable = [image for image in decoded if isinstance(image, str)]
    _require_readable(unreadable, len(files), name)
    pairs = [(image, label) for image, (_, label) in zip(decoded, files, strict=True) if isinstance(image, Tensor)]
    labels = torch.tensor([label for _, label in pairs])
    return MemorySplit(name, torch.stack([image for image, _ in pairs]), labels, spec, unreadable=unreadable)


def _require_readable(unreadable: Sequence[str], total: int, split: str) -> None:
    distinct = sorted(set(unreadable))
    if len(distinct) > UNREADABLE_LIMIT * total:
        raise InputError(
            f"{len(distinct)} of {total} images of {split} cannot be decoded, more than {UNREADABLE_LIMIT:.0%}: "
            f"remove or replace them, first {distinct[0]}"
        )


def calibration(data: Data, count: int, device: torch.device, seed: int, batch: int = 64) -> Iterator[Batch]:
    """`count` training images in a fixed random order, without augmentation, as batches: what ranges are set on."""
    seen = 0
    for images, labels in data.train.batches(batch, device, shuffle=torch.Generator().manual_seed(seed)):
        take = min(len(labels), count - seen)
        yield images[:take], labels[:take]
        seen += take
        if seen >= count:
            return
