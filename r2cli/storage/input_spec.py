"""What a network is given: one image or one text that r2 prepares, or tensors as the user's data has them.

A batch is one tensor (n, ...), or a tuple of several in the order in which the network takes them (`Given`).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from r2cli.errors import InputError

Given = Tensor | tuple[Tensor, ...]  # each (n, ...)
Shape = tuple[int, ...] | tuple[tuple[int, ...], ...]  # of one input without the batch, or of each of several

INPUT = "input"  # what a network's only input is called
KINDS = {
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
NAMES = {kind: name for name, kind in KINDS.items()}


def places(given: Given) -> tuple[Tensor, ...]:
    """The inputs of a batch by place: what a network is called with."""
    return given if isinstance(given, tuple) else (given,)


def count(given: Given) -> int:
    """How many samples are in a batch."""
    return len(places(given)[0])


def each(given: Given, change: Callable[[Tensor], Tensor]) -> Given:
    """A batch with every tensor changed."""
    return tuple(map(change, given)) if isinstance(given, tuple) else change(given)


def joined(batches: Sequence[Given]) -> Given:
    """Batches as one. Raises InputError for batches of different sizes."""
    sizes = dict.fromkeys(tuple(tuple(one.shape[1:]) for one in places(batch)) for batch in batches)
    if len(sizes) > 1:
        one, other, *_ = (", ".join("x".join(map(str, shape)) for shape in each) for each in sizes)
        raise InputError(
            f"this method wants all calibration inputs at once, and they are {one} and {other}: calibrate on one size, "
            "or give --method none"
        )
    if isinstance(batches[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*map(places, batches), strict=True))
    return torch.cat(batches)  # type: ignore[arg-type]


def split(given: Given, size: int) -> list[Given]:
    """A batch in batches of at most `size` samples."""
    if not isinstance(given, tuple):
        return list(torch.split(given, size))
    return list(zip(*(torch.split(one, size) for one in given), strict=True))


@dataclass(frozen=True)
class TensorSpec:
    """One input of a network: its shape without the batch, its kind, and the largest integer that its data holds.

    The name is empty where the data gives its inputs by place, until it meets a network.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "float32"
    most: int = 0

    def zeros(self, count: int) -> Tensor:
        return torch.zeros(count, *self.shape, dtype=KINDS[self.kind])

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """Normal numbers, or integers from 0 to `most`."""
        if self.kind == "float32":
            return torch.randn(count, *self.shape, generator=generator)
        return torch.randint(self.most + 1, (count, *self.shape), generator=generator).to(KINDS[self.kind])

    def __str__(self) -> str:
        return f"{self.name or INPUT} {self.kind} {'x'.join(map(str, ('n', *self.shape)))}"


@dataclass(frozen=True)
class TensorsSpec:
    """Inputs that the data gives as the network takes them: tensors of any shape and kind, in their order."""

    tensors: tuple[TensorSpec, ...]
    # What an image has, so that every spec can be asked for it.
    is_text: ClassVar[bool] = False
    mean: ClassVar[tuple[float, ...]] = ()
    std: ClassVar[tuple[float, ...]] = ()
    tokenizer: ClassVar[str] = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.tensors)

    @property
    def channels(self) -> int:
        """For networks by name: the channels of the first input, where that is a picture or a vector."""
        return (*self.tensors[0].shape, 1)[0]

    @property
    def size(self) -> int:
        """For networks by name: the last length of the first input."""
        return (1, *self.tensors[0].shape)[-1]

    @property
    def shape(self) -> Shape:
        return self.tensors[0].shape if len(self.tensors) == 1 else tuple(one.shape for one in self.tensors)

    def blank(self, count: int) -> Given:
        """`count` samples of zeros."""
        return self._batch([one.zeros(count) for one in self.tensors])

    def random(self, count: int, generator: torch.Generator) -> Given:
        return self._batch([one.random(count, generator) for one in self.tensors])

    def described(self) -> dict[str, Any]:
        """The spec as it is written to JSON."""
        return {"tensors": [asdict(one) for one in self.tensors]}

    def __str__(self) -> str:
        return ", ".join(map(str, self.tensors))

    def _batch(self, made: Sequence[Tensor]) -> Given:
        return tuple(made) if len(made) > 1 else made[0]


@dataclass(frozen=True)
class InputSpec:
    """How an image becomes the network's input: resize, crop, then (pixel / 255 - mean) / std for each channel.

    A text becomes `size` tokens. `tokenizer` is a tokenizer.json as `data.text.pack_tokenizer` compresses it. The three
    channels are the ids of the tokens, the attention mask, and the token types (first or second text).
    """

    channels: int
    size: int  # pixels, height and width after the crop
    resize: int  # pixels, shorter side before the crop
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenizer: str = ""
    width: int = 0  # pixels, where it is not `size`: such images are scaled to both sides, and not cropped

    @property
    def names(self) -> tuple[str, ...]:
        return (INPUT,)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.size, self.width or self.size

    @property
    def is_text(self) -> bool:
        return bool(self.tokenizer)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, self.size) if self.is_text else (self.channels, *self.sides)

    def blank(self, count: int) -> Tensor:
        """Return `count` empty inputs: float32 images of zeros, or int64 tokens of id 0 with a mask of ones."""
        if not self.is_text:
            return torch.zeros(count, *self.shape)
        tokens = torch.zeros(count, *self.shape, dtype=torch.int64)
        tokens[:, 1] = 1
        return tokens

    def described(self) -> dict[str, Any]:
        """Return the spec as it is written to JSON."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("tokenizer", "width")}

    def __str__(self) -> str:
        return f"images of {'x'.join(map(str, self.shape))}" if not self.is_text else f"texts of {self.size} tokens"


NetworkInput = InputSpec | TensorsSpec


def forms(spec: NetworkInput) -> list[tuple[Shape, str]]:
    """The shape, without the batch, and the kind of each input."""
    if isinstance(spec, TensorsSpec):
        return [(one.shape, one.kind) for one in spec.tensors]
    return [(spec.shape, "int64" if spec.is_text else "float32")]
