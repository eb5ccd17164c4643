"""Data: the fixed split of the digits, folders of images good and bad, batches that depend on nothing but a seed."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from r2cli import data
from r2cli.config import values
from r2cli.data import Data, FolderSplit, KeptSplit, MemorySplit, Split, imagefolder
from r2cli.errors import InputError
from r2cli.storage.checkpoint import InputSpec

CPU = torch.device("cpu")
Batches = list[tuple[Tensor, Tensor]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def joined(split: Split, size: int = 256, shuffle: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """All images and labels of one pass."""
    parts = list(split.batches(size, CPU, shuffle))
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def same(one: Batches, other: Batches) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a.equal(c) and b.equal(d) for (a, b), (c, d) in pairs)


def refused(name: str, *, size: int | None = None) -> str:
    with pytest.raises(InputError) as caught:
        data.load(name, size=size, workers=0)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- digits --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Data:
    return data.load("digits", size=8)


def labels_of(split: Split) -> Tensor:
    assert isinstance(split, MemorySplit)
    return split.labels


def test_the_split_of_the_digits_is_this_one(digits: Data) -> None:
    train, test = labels_of(digits.train), labels_of(digits.test)
    assert (len(digits.train), len(digits.test)) == (1200, 597)
    assert train[:12].tolist() == [9, 4, 1, 2, 4, 5, 6, 2, 2, 0, 2, 8]
    assert test[:12].tolist() == [1, 5, 4, 5, 9, 1, 8, 2, 9, 0, 6, 6]
    every = bytes(torch.cat([train, test]).to(torch.uint8).tolist())
    assert hashlib.sha256(every).hexdigest() == "16fce66df0b817db3cbf3b4a72439d4c722dfb1185119d94b73fc24567a585bd"
    assert digits.class_names == tuple("0123456789")


def test_the_split_is_stratified(digits: Data) -> None:
    train, test = labels_of(digits.train).bincount(), labels_of(digits.test).bincount()
    assert len(train) == len(test) == 10
    # Within one image of the class's share, which is not a whole number.
    assert bool(((train - (train + test) * 1200 / 1797).abs() <= 1).all())


def test_no_image_is_in_both_halves(digits: Data) -> None:
    assert isinstance(digits.train, MemorySplit) and isinstance(digits.test, MemorySplit)
    train = {bytes(image.flatten().tolist()) for image in digits.train.images}
    test = {bytes(image.flatten().tolist()) for image in digits.test.images}
    assert (len(train), len(test)) == (1200, 597)
    assert not train & test


@pytest.mark.parametrize(("size", "expected"), [(8, 8), (16, 16), (None, 16), (23, 23)])
def test_digits_come_in_the_size_asked_for(size: int | None, expected: int) -> None:
    source = data.load("digits", size=size)
    images, labels = next(source.train.batches(7, CPU))
    assert source.input.shape == (1, expected, expected)
    assert images.shape == (7, 1, expected, expected) and images.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_the_digits_are_normalised(digits: Data) -> None:
    images, _ = joined(digits.train)
    # The constants have four digits, and pixels are rounded to 1/255.
    assert float(images.mean()) == pytest.approx(0, abs=2e-3)
    assert float(images.std(correction=0)) == pytest.approx(1, abs=2e-3)
    # The darkest and the brightest pixel, as they are written.
    assert float(images.min()) == pytest.approx((0 - 0.3053) / 0.3763, rel=1e-6)
    assert float(images.max()) == pytest.approx((1 - 0.3053) / 0.3763, rel=1e-6)


def test_a_checkpoint_s_preprocessing_is_applied() -> None:
    spec = InputSpec(3, 12, 12, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    source = data.load("digits", spec=spec)
    assert source.input == spec
    images, _ = joined(source.test)
    assert images.shape == (597, 3, 12, 12)
    # The same grey pixel in every channel, to float32's rounding of one multiplication and one addition.
    torch.testing.assert_close(images[:, 1] * 0.5 + 0.5, images[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(images[:, 2] * 0.25 + 1.0, images[:, 0], rtol=0, atol=1e-6)


def test_normalise_is_this_arithmetic() -> None:
    spec = InputSpec(2, 1, 1, mean=(0.5, 0.0), std=(0.5, 0.25))
    images = torch.tensor([0, 255, 51, 102], dtype=torch.uint8).view(2, 2, 1, 1)
    out = data.normalise(images, spec, CPU)
    assert out.dtype == torch.float32
    # (p / 255 - mean) / std in float32: a few roundings of numbers up to 4.
    torch.testing.assert_close(out.flatten().tolist(), [-1.0, 4.0, -0.6, 1.6], rtol=0, atol=1e-6)
    assert images.flatten().tolist() == [0, 255, 51, 102]


# --- batches -------------------------------------------------------------------------------------------------------


def test_without_a_generator_the_order_is_the_files(digits: Data) -> None:
    images, labels = joined(digits.test, size=100)
    assert labels.equal(labels_of(digits.test))
    assert [len(part) for _, part in digits.test.batches(100, CPU)] == [100] * 5 + [97]
    again, _ = joined(digits.test, size=597)
    assert images.equal(again)


def test_the_order_is_a_function_of_the_generator(digits: Data) -> None:
    passes = [list(digits.train.batches(64, CPU, seeded(seed), augment=True)) for seed in (3, 3, 4)]
    assert same(passes[0], passes[1])
    assert not same(passes[0], passes[2])
    images, labels = joined(digits.train, shuffle=seeded(3))
    assert not labels.equal(labels_of(digits.train))
    # Every image once, with its own label.
    plain, own = joined(digits.train)
    first = {bytes(image.numpy().tobytes()): int(label) for image, label in zip(plain, own, strict=True)}
    second = {bytes(image.numpy().tobytes()): int(label) for image, label in zip(images, labels, strict=True)}
    assert len(images) == len(second) == 1200
    assert first == second


def test_global_randomness_changes_no_batch(digits: Data) -> None:
    passes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        passes.append(list(digits.train.batches(64, CPU, seeded(3), augment=True)))
    assert same(*passes)


@pytest.mark.parametrize("count", [1, 64, 100])
def test_calibration_is_a_fixed_choice_of_training_images(digits: Data, count: int) -> None:
    one = list(data.calibration(digits, count, CPU, seed=5, batch=64))
    other = list(data.calibration(digits, count, CPU, seed=5, batch=64))
    assert sum(len(labels) for _, labels in one) == count
    assert same(one, other)
    assert not same(one, list(data.calibration(digits, count, CPU, seed=6, batch=64)))


# --- augmentation --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("size", "reach"), [(6, 1), (8, 1), (16, 2)])
def test_an_augmented_image_is_a_shifted_mirrored_original(size: int, reach: int) -> None:
    count = 2000
    images = torch.randint(1, 256, (count, 2, size, size), generator=seeded(0)).to(torch.uint8)
    out = data.shift_and_flip(images, data.draw_shifts(count, size, seeded(1)))
    assert out.shape == images.shape and out.dtype == torch.uint8
    assert out.equal(data.shift_and_flip(images, data.draw_shifts(count, size, seeded(1))))
    assert not out.equal(data.shift_and_flip(images, data.draw_shifts(count, size, seeded(2))))
    padded = torch.zeros(count, 2, size + 2 * reach, size + 2 * reach, dtype=torch.uint8)
    padded[:, :, reach : reach + size, reach : reach + size] = images
    explained = torch.zeros(count, dtype=torch.int64)
    shifts = [(down, right) for down in range(2 * reach + 1) for right in range(2 * reach + 1)]
    for down, right in shifts:
        crop = padded[:, :, down : down + size, right : right + size]
        for mirrored in (False, True):
            match = (out == (crop.flip(3) if mirrored else crop)).flatten(1).all(1)
            # 2,000 draws of at most 50 kinds: 40 each on average, and none has fewer than 10.
            assert int(match.sum()) >= 10
            explained += match
    assert explained.tolist() == [1] * count
    # The draw that neither shifts nor mirrors gives the image itself.
    assert bool((out == images).flatten(1).all(1).any())


def test_digits_are_not_augmented(digits: Data) -> None:
    plain = list(digits.train.batches(64, CPU, seeded(3)))
    assert same(plain, list(digits.train.batches(64, CPU, seeded(3), augment=True)))


# --- image folders -------------------------------------------------------------------------------------------------


def pixels(seed: int, width: int, height: int, channels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write(path: Path, mode: str = "RGB", size: tuple[int, int] = (12, 12), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels(seed, *size, 4)[..., :3])
    image.convert(mode).save(path)
    return path


def folder(root: Path, *, each: int = 3, size: tuple[int, int] = (12, 12), held_out: str = "val") -> Path:
    for number, (half, name) in enumerate((h, c) for h in ("train", held_out) for c in ("cat", "dog")):
        for index in range(each):
            write(root / half / name / f"{index:03}.png", size=size, seed=100 * number + index)
    return root


def broken(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not an image")
    return path


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_folder_s_classes_are_its_folders(tmp_path: Path, held_out: str) -> None:
    root = folder(tmp_path / "set", held_out=held_out)
    write(root / "train" / "cat" / "deeper" / "more.png", seed=77)
    (root / "train" / "cat" / "notes.txt").write_text("not an image, by its name")
    source = data.load(f"imagefolder:{root}", workers=0)
    assert source.class_names == ("cat", "dog")
    assert (len(source.train), len(source.test)) == (7, 6)
    assert isinstance(source.input, InputSpec) and source.input.shape == (3, 12, 12)  # small images keep their size
    assert source.test.name == held_out
    images, labels = joined(source.test)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    original = torch.from_numpy(pixels(300, 12, 12, 4)[..., :3].copy()).permute(2, 0, 1).unsqueeze(0)
    assert images[3:4].equal(data.normalise(original, source.input, CPU))


def test_small_images_are_kept_and_large_ones_read_again(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", each=1, size=(110, 100))
    small = data.load(f"imagefolder:{root}", size=data.LARGE_IMAGE - 1, workers=0)
    large = data.load(f"imagefolder:{root}", size=data.LARGE_IMAGE, workers=0)
    assert isinstance(small.train, MemorySplit) and isinstance(large.train, FolderSplit)
    assert small.input.shape == (3, 95, 95)
    assert isinstance(large.input, InputSpec) and (large.input.size, large.input.resize) == (
        96,
        110,
    )  # 96 * 256 / 224 rounded
    own = data.load(f"imagefolder:{root}", workers=0)
    assert isinstance(own.input, InputSpec) and (own.input.size, own.input.resize) == (224, 256)


def test_the_middle_is_what_is_cropped(tmp_path: Path) -> None:
    path = write(tmp_path / "wide.png", size=(14, 12))
    seen = data.decode(path, InputSpec(3, 8, 12, (0.0,) * 3, (1.0,) * 3))
    assert isinstance(seen, Tensor)
    whole = torch.from_numpy(pixels(0, 14, 12, 4)[..., :3].copy()).permute(2, 0, 1)
    assert seen.equal(whole[:, 2:10, 3:11])


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("LA", "png"), ("CMYK", "jpg")],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_kind_decode(mode: str, suffix: str, channels: int, tmp_path: Path) -> None:
    path = write(tmp_path / f"image.{suffix}", mode)
    with Image.open(path) as file:
        assert file.mode == mode, "the file is not of the kind that its name says"
    spec = InputSpec(channels, 12, 12, (0.0,) * channels, (1.0,) * channels)
    image = data.decode(path, spec)
    assert isinstance(image, Tensor), image
    assert image.shape == (channels, 12, 12) and image.dtype == torch.uint8
    assert int(image.max()) - int(image.min()) > 100  # it holds the noise that was written


def test_a_folder_of_mixed_kinds_loads(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    write(root / "train" / "cat" / "grey.png", "L")
    write(root / "train" / "cat" / "alpha.png", "RGBA")
    write(root / "train" / "dog" / "palette.png", "P")
    write(root / "train" / "dog" / "print.jpg", "CMYK")
    source = data.load(f"imagefolder:{root}", workers=0)
    images, _ = joined(source.train)
    assert images.shape == (10, 3, 12, 12)
    assert not source.train.unreadable


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparent_bytes_decodes_without_a_word(tmp_path: Path) -> None:
    path = write(tmp_path / "image.png", "P")
    with Image.open(path) as file:
        file.load()
        file.save(tmp_path / "clear.png", transparency=bytes(range(256)))
    with Image.open(tmp_path / "clear.png") as file:
        assert isinstance(file.info["transparency"], bytes)
    assert isinstance(data.decode(tmp_path / "clear.png", InputSpec(3, 12, 12, (0.0,) * 3, (1.0,) * 3)), Tensor)


@pytest.mark.parametrize("size", [None, 96])
def test_images_of_mixed_sizes_become_one(size: int | None, tmp_path: Path) -> None:
    root = folder(tmp_path / "set", size=(20, 16))
    for index, own in enumerate([(16, 16), (7, 40), (200, 3), (1, 1), (300, 500)]):
        write(root / "train" / "cat" / f"odd{index}.png", size=own)
    source = data.load(f"imagefolder:{root}", size=size, workers=0)
    images, _ = joined(source.train)
    assert images.shape == (11, 3, size or 16, size or 16) and not source.train.unreadable
    (augmented, _), *_ = source.train.batches(16, CPU, seeded(0), augment=True)
    assert augmented.shape == images.shape


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    deep = pixels(0, 12, 12, 1)[..., 0]
    Image.fromarray(deep.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    image = data.decode(tmp_path / "deep.png", InputSpec(1, 12, 12, (0.0,), (1.0,)))
    assert isinstance(image, Tensor)
    # 257 * p is 255ths of 65535 exactly; one step for whoever divides by 256.
    assert int((image[0].int() - torch.from_numpy(deep).int()).abs().max()) <= 1


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_what_is_not_an_image_is_returned_by_its_name(content: bytes | str, tmp_path: Path) -> None:
    path = write(tmp_path / "image.jpg", size=(64, 64))
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    assert data.decode(path, InputSpec(3, 64, 64, (0.0,) * 3, (1.0,) * 3)) == str(path)


def test_an_image_too_large_for_memory_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "image.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)  # more than twice this is an error
    assert data.decode(path, InputSpec(3, 64, 64, (0.0,) * 3, (1.0,) * 3)) == str(path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [12, 96])
def test_few_unreadable_images_are_left_out_and_named(size: int, tmp_path: Path) -> None:
    root = folder(tmp_path / "set", each=50, size=(size, size))
    bad = broken(root / "train" / "cat" / "007.png")
    source = data.load(f"imagefolder:{root}", workers=0)
    labels = torch.cat([labels for _, labels in source.train.batches(32, CPU)])
    assert labels.tolist() == [0] * 49 + [1] * 50
    assert source.train.unreadable == [str(bad)]
    assert not source.test.unreadable


@pytest.mark.slow
@pytest.mark.parametrize("size", [12, 96])
def test_many_unreadable_images_are_refused(size: int, tmp_path: Path) -> None:
    root = folder(tmp_path / "set", each=50, size=(size, size))
    bad = [broken(root / "train" / "dog" / f"00{index}.png") for index in (4, 6)]
    with pytest.raises(InputError, match="00[46].png") as caught:
        source = data.load(f"imagefolder:{root}", workers=0)
        list(source.train.batches(32, CPU))
    assert caught.value.exit_code == 2
    assert any(str(path) in str(caught.value) for path in bad)


def test_an_unreadable_first_image_is_left_out_as_others_are(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", each=50)
    bad = broken(root / "train" / "cat" / "000.png")
    train = data.load(f"imagefolder:{root}", size=12, workers=0).train
    joined(train)
    assert train.unreadable == [str(bad)]


# --- folders without the layout ------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "no such") in refused(f"imagefolder:{tmp_path / 'no such'}")
    path = write(tmp_path / "file.png")
    assert str(path) in refused(f"imagefolder:{path}")


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_half_is_refused(missing: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    (root / missing).rename(root / "elsewhere")
    assert str(root) in refused(f"imagefolder:{root}")


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    for half in ("train", "val"):
        (tmp_path / half).mkdir()
    assert str(tmp_path / "train") in refused(f"imagefolder:{tmp_path}")
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "train" / "dog").mkdir()
    assert str(tmp_path / "train") in refused(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("half", ["train", "val"])
def test_a_class_folder_without_images_is_named(half: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    empty = root / half / "bird"
    empty.mkdir()
    assert str(empty) in refused(f"imagefolder:{root}")


def test_one_class_is_refused(tmp_path: Path) -> None:
    for half in ("train", "val"):
        write(tmp_path / half / "cat" / "0.png")
    message = refused(f"imagefolder:{tmp_path}")
    assert str(tmp_path / "train") in message and "'cat'" in message


@pytest.mark.parametrize("half", ["train", "val"])
def test_a_class_of_one_half_is_named(half: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    write(root / half / "bird" / "0.png")
    message = refused(f"imagefolder:{root}")
    assert str(root) in message and "'bird'" in message


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "set")
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    message = refused(f"imagefolder:{root}")
    assert str(root / "train" / "dog") in message and "Permission denied" in message


@pytest.mark.parametrize(("name", "near"), [("digit", "'digits'"), ("imagefolders:x", "'imagefolder:DIR'"), ("", "")])
def test_an_unknown_data_set_suggests_the_nearest(name: str, near: str) -> None:
    message = refused(name)
    assert f"'{name}'" in message and near in message


def test_impossible_sizes_are_refused() -> None:
    for size in (-1, 0, 3, 1025):
        assert str(size) in refused("digits", size=size)
    assert "imagefolder:DIR" in refused("imagefolder")


# --- preprocessing that the user gives -------------------------------------------------------------------------------


def test_mean_std_and_size_replace_the_data_s_own(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    source = data.load(f"imagefolder:{root}", size=10, mean=[0.5], std=[0.5, 0.25, 0.125], workers=0)
    assert source.input == InputSpec(3, 10, 10, (0.5, 0.5, 0.5), (0.5, 0.25, 0.125))
    images, _ = joined(source.test)
    assert images.shape == (6, 3, 10, 10) and float(images[:, 0].min()) == pytest.approx(-1, abs=0.2)
    assert data.load("digits", mean=[0.0], std=[1.0]).input == InputSpec(1, 16, 16, (0.0,), (1.0,))
    assert data.load("digits", mean=0.5, std=2).input == InputSpec(1, 16, 16, (0.5,), (2.0,))


@pytest.mark.parametrize(
    ("option", "given"), [("--mean", {"mean": [0.1, 0.2]}), ("--std", {"std": [1, 1, 1, 1]}), ("--std", {"std": [0.0]})]
)
def test_impossible_preprocessing_is_refused(option: str, given: dict[str, list[float]]) -> None:
    with pytest.raises(InputError, match=option):
        data.load("fake:3x8x8:2", **given)


# --- fake images -----------------------------------------------------------------------------------------------------


def test_fake_images_have_the_shape_that_is_asked_for() -> None:
    source = data.load("fake:3x24x24:1500")
    assert source.input.shape == (3, 24, 24) and len(source.class_names) == 1500
    labels = torch.cat([labels for _, labels in source.train.batches(256, CPU)])
    assert labels.unique().numel() == 1500, "every class is there"
    images, labels = next(data.load("fake:1x8x8:2").train.batches(1024, CPU))
    bright = images.mean((1, 2, 3))
    assert float((bright[labels == 0].mean() - bright[labels == 1].mean()).abs()) > 0.05, "a trace of the class"
    again, _ = next(data.load("fake:1x8x8:2").train.batches(1024, CPU))
    assert images.equal(again)


@pytest.mark.parametrize(
    "shape", ["", "3x32x32", "3x32x2:10", "2x32x32:10", "3x2x2:10", "3x32x32:1", "a", "3x32x32:-1"]
)
def test_impossible_fakes_are_refused(shape: str) -> None:
    assert "fake" in refused(f"fake:{shape}")


# --- torchvision's sets, on small files in their own formats ---------------------------------------------------------


def idx(path: Path, values: np.ndarray) -> None:
    """MNIST's format: two zeros, 8 for bytes, the rank, the shape as big-endian int32, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes())


@pytest.mark.parametrize(("name", "folder_name"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_and_its_like(name: str, folder_name: str, tmp_path: Path) -> None:
    raw = tmp_path / folder_name / "raw"
    for half, count in (("train", 30), ("t10k", 20)):
        idx(raw / f"{half}-images-idx3-ubyte", pixels(1, 28, 28, count).transpose(2, 0, 1).copy())
        idx(raw / f"{half}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    source = data.load(name, directory=tmp_path)
    assert (len(source.train), len(source.test), len(source.class_names)) == (30, 20, 10)
    assert isinstance(source.input, InputSpec) and source.input.shape == (1, 28, 28)
    images, labels = joined(source.train)
    assert labels[:12].tolist() == [*range(10), 0, 1]
    expected = torch.from_numpy(pixels(1, 28, 28, 30)[..., 3].copy()).view(1, 1, 28, 28)
    assert images[3:4].equal(data.normalise(expected, source.input, CPU))
    three = data.load(name, directory=tmp_path, spec=InputSpec(3, 32, 32, (0.5,) * 3, (0.5,) * 3))
    assert joined(three.test)[0].shape == (20, 3, 32, 32)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle
    from hashlib import md5

    import torchvision

    kind = getattr(torchvision.datasets, name.upper())
    root = tmp_path / kind.base_folder
    root.mkdir()
    key = "labels" if name == "cifar10" else "fine_labels"
    names = [f"class {number}" for number in range(classes)]

    def put(filename: str, content: object) -> list[str]:
        (root / filename).write_bytes(pickle.dumps(content))
        return [filename, md5((root / filename).read_bytes()).hexdigest()]

    shown = pixels(2, 3072, classes, 1)[..., 0]
    for half in ("train_list", "test_list"):
        held = [put(file, {"data": shown, key: list(range(classes))}) for file, _ in getattr(kind, half)]
        monkeypatch.setattr(kind, half, held)
    meta = put(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta[1]})
    source = data.load(name, directory=tmp_path)
    assert source.class_names == tuple(names)
    assert isinstance(source.input, InputSpec) and source.input.shape == (3, 32, 32)
    images, labels = joined(source.test)
    assert labels.tolist() == list(range(classes))
    assert images[5:6].equal(data.normalise(torch.from_numpy(shown[5]).view(1, 3, 32, 32), source.input, CPU))
    assert isinstance(source.train, MemorySplit) and source.train.augments
    grey = data.load(name, directory=tmp_path, spec=InputSpec(1, 32, 32, (0.5,), (0.5,)))
    assert joined(grey.test)[0].shape == (classes, 1, 32, 32)


def test_a_set_that_cannot_be_downloaded_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def offline(*given: object, **more: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(InputError) as caught:
        data.load("cifar10", directory=tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "no route to host" in message and "--data-dir" in message


# --- workers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
def test_workers_change_no_batch(augment: bool, tmp_path: Path) -> None:
    root = folder(tmp_path / "set", each=5, size=(100, 96))
    passes: dict[tuple[int, int], Batches] = {}
    for workers in (0, 2):
        source = data.load(f"imagefolder:{root}", size=96, workers=workers)
        assert isinstance(source.train, FolderSplit) and source.train.workers == workers
        for seed in (1, 2):
            passes[workers, seed] = list(source.train.batches(4, CPU, seeded(seed), augment))
    assert [len(labels) for _, labels in passes[0, 1]] == [4, 4, 2]
    assert passes[0, 1][0][0].shape == (4, 3, 96, 96)
    assert same(passes[0, 1], passes[2, 1])
    assert same(passes[0, 2], passes[2, 2])
    assert not same(passes[0, 1], passes[0, 2])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_small_images_beyond_the_memory_limit_are_augmented_as_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagefolder, "MEMORY_LIMIT", 0)
    for half, name, index in ((h, c, i) for h in ("train", "val") for c in ("cat", "dog") for i in range(8)):
        write(tmp_path / "set" / half / name / f"{index}.png", "1", seed=index)
    passes = []
    for workers in (0, 1):
        source = data.load(f"imagefolder:{tmp_path / 'set'}", workers=workers)
        assert isinstance(source.train, FolderSplit) and source.input.size == 12
        passes.append(list(source.train.batches(4, CPU, seeded(3), augment=True)))
    assert same(*passes)
    images, _ = (torch.cat(part) for part in zip(*passes[0], strict=True))
    # Black and white images, shifted and mirrored, stay so; a crop that is scaled blends.
    assert images[:, 0].unique().numel() == 2
    plain, _ = joined(source.train)
    assert not images.sort(0).values.equal(plain.sort(0).values)


def test_a_kept_image_is_decoded_when_first_needed_and_never_again(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", each=20)
    source = data.load(f"imagefolder:{root}", workers=0)
    assert isinstance(source.train, KeptSplit) and int(source.train.state.count_nonzero()) == 0
    assert sum(len(labels) for _, labels in data.calibration(source, 8, CPU, seed=0, batch=8)) == 8
    assert int(source.train.state.count_nonzero()) == 8, "calibration on 8 images reads 8 files"
    first = joined(source.train)
    shutil.rmtree(root)
    assert all(a.equal(b) for a, b in zip(first, joined(source.train), strict=True))


def test_files_are_listed_without_a_look_at_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    for count in (2, 40):
        root = folder(tmp_path / str(count), each=count)
        calls: list[object] = []
        real = os.stat

        def counted(*given: object, real: Any = real, calls: list[object] = calls, **more: object) -> object:
            calls.append(given)
            return real(*given, **more)

        with monkeypatch.context() as patch:
            for name in ("stat", "lstat"):
                patch.setattr(os, name, counted)
            source = data.load(f"imagefolder:{root}", workers=0)
        assert len(source.train) == 2 * count
        looks.append(len(calls))
    assert looks[0] == looks[1]


def test_a_random_crop_is_a_function_of_its_generator(tmp_path: Path) -> None:
    path = write(tmp_path / "image.png", size=(100, 80))
    spec = InputSpec(3, 32, 37, (0.0,) * 3, (1.0,) * 3)

    def crops(seed: int) -> Iterator[Tensor]:
        generator = seeded(seed)
        for _ in range(5):
            image = data.decode(path, spec, generator)
            assert isinstance(image, Tensor) and image.shape == (3, 32, 32) and image.dtype == torch.uint8
            yield image

    one, other = list(crops(0)), list(crops(0))
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    assert not any(a.equal(b) for a, b in zip(one, crops(1), strict=True))
    assert len({bytes(image.flatten().tolist()) for image in one}) == 5


def test_pictures_of_two_sides_are_scaled_to_both(tmp_path: Path) -> None:
    source = data.load("fake:3x12x40:2")
    assert source.input.shape == (3, 12, 40) and next(iter(source.train.batches(2, CPU)))[0].shape == (2, 3, 12, 40)
    assert source.input.described()["width"] == 40 and "width" not in data.load("fake:3x12x12:2").input.described()
    grown = data.load("digits:10", size=(12, 40))
    images = next(iter(grown.train.batches(4, CPU, torch.Generator().manual_seed(0), augment=True)))[0]
    assert images.shape == (4, 1, 12, 40)
    pixels = torch.arange(2 * 12 * 40, dtype=torch.uint8).reshape(2, 1, 12, 40)
    still = data.shift_and_flip(pixels, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert still[0].equal(pixels[0]) and still[1].equal(pixels[1].flip(2)), "a border of one pixel, and a mirror"
    path = tmp_path / "wide.png"
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (20, 1))).save(path)
    spec = InputSpec(1, 10, 10, (0.0,), (1.0,), width=32)
    image = data.decode(path, spec)
    assert isinstance(image, Tensor) and image.shape == (1, 10, 32) and image[0, :, -1].min() > 55, "nothing is cut off"
    for wrong in ("12x", "x12", "1x2x3", "12.5"):
        with pytest.raises(InputError, match="is not a number of pixels, or two as 48x320"):
            values.size(wrong)
