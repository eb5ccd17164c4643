"""What a caller asks of a data set (`Request`), and what the data set returns (`Data`)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from r2cli.data.splits import MemorySplit, Split
from r2cli.data.task import CLASSIFICATION, Task
from r2cli.errors import InputError
from r2cli.storage.input_spec import InputSpec, NetworkInput, TensorsSpec


@dataclass(frozen=True)
class Request:
    """A data set by its kind and its place, with preprocessing: that of a checkpoint's `spec`, or of the other fields.

    `where` is what stands after the colon of a name: a folder, a file, a shape or a count.
    """

    kind: str
    where: str = ""
    size: int | tuple[int, int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    spec: NetworkInput | None = None
    directory: Path | None = None
    workers: int = 2
    tokenizer: str | None = None  # of a network that reads text, compressed by `text.pack_tokenizer`
    fetches: bool = True  # whether a missing set may be downloaded
    classes: tuple[str, ...] = ()  # of the network, in the order of its logits, where they are known

    def classes_of(self, found: Iterable[str]) -> tuple[str, ...]:
        """The network's classes where all that were `found` are among them, and else those, in alphabetical order."""
        own = sorted(set(found))
        return self.classes if set(own) <= set(self.classes) else tuple(own)

    def input(
        self,
        channels: int,
        size: int | tuple[int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        resize: int | None = None,
    ) -> InputSpec:
        """Return the preprocessing that was asked for. The arguments are the defaults of the data set.

        Raises InputError for a mean or std that does not fit the channels.
        """
        if isinstance(self.spec, TensorsSpec):
            raise InputError(
                f"{self.kind} holds images and the network takes {self.spec}: give the --data that it is for"
            )
        if self.spec:
            return self.spec
        size = self.size or size
        height, width = size if isinstance(size, tuple) else (size, size)
        mean = self._per_channel("--mean", self.mean or mean, channels)
        std = self._per_channel("--std", self.std or std, channels)
        if min(std) <= 0:
            raise InputError(f"--std {min(std):g} is impossible: give numbers above 0")
        return InputSpec(
            channels, height, resize or height, tuple(mean), tuple(std), width=0 if width == height else width
        )

    def _per_channel(self, option: str, given: Sequence[float] | float, channels: int) -> list[float]:
        values = (given,) if isinstance(given, int | float) else given
        if len(values) not in (1, channels):
            raise InputError(f"{option} has {len(values)} numbers for {channels} channels: give 1 or {channels}")
        return list(values) * (channels if len(values) == 1 else 1)


@dataclass(frozen=True)
class Data:
    """A data set: its name, the preprocessing, the classes, and its two halves.

    `measured` says whether the task's metric on the test half is wanted and means something. `label_count` is how many
    classes the labels of data without names of classes tell apart.
    """

    name: str
    input: NetworkInput
    class_names: tuple[str, ...]
    train: Split
    test: Split
    measured: bool = True
    task: Task = CLASSIFICATION
    label_count: int = 0
    calibration: Split | None = None  # where it is not the training half

    def giving(self, outputs: tuple[str, ...]) -> "Data":
        """The same data for a network with outputs of those names."""
        return replace(self, task=replace(self.task, outputs=outputs))

    @property
    def shown(self) -> Split:
        """The half that calibrates."""
        return self.calibration or self.train

    @property
    def classes(self) -> int:
        return len(self.class_names) or self.label_count


def in_memory(
    name: str,
    class_names: Sequence[str],
    spec: InputSpec,
    *,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    augments: bool,
) -> Data:
    """Make a data set of images uint8 (n, 1 or 3, h, w) and labels (n,), scaled to the size and channels of `spec`."""
    halves = [
        MemorySplit(half, scaled(images, spec, name), labels, spec, augments=augments)
        for half, (images, labels) in (("train", train), ("test", test))
    ]
    return Data(name, spec, tuple(class_names), halves[0], halves[1])


def scaled(images: Tensor, spec: InputSpec, name: str) -> Tensor:
    """Scale images uint8 (n, 1 or 3, h, w) to (n, channels, height, width).

    Raises InputError where the images cannot have the channels of `spec`.
    """
    from torchvision.transforms.v2 import functional as F

    given = images.shape[1]
    if spec.channels not in (1, given) and given != 1:
        raise InputError(
            f"{name} has {given} channels, the network wants {spec.channels}: give the --data that it was trained on"
        )
    if spec.channels not in (1, 3):
        raise InputError(
            f"{name} cannot be given {spec.channels} channels: give the data that the network was made for"
        )
    if given != 1 and spec.channels == 1:
        images = F.rgb_to_grayscale(images)
    if images.shape[2:] != spec.sides:
        # In parts, so that what torchvision needs in between stays small.
        parts = [F.resize(part, list(spec.sides), antialias=True) for part in torch.split(images, 4096)]
        images = torch.cat(parts)
    return images.expand(-1, spec.channels, -1, -1).contiguous()
