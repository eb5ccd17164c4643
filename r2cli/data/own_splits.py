"""Batches and splits of the user's own data, in memory or of a dataset, of one size or of several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from r2cli.data.splits import ALL_ROWS, Batch, RowShare, rows_of_batches
from r2cli.errors import InputError
from r2cli.storage.input_spec import NAMES, Given, Shape, TensorSpec, TensorsSpec, count, each, joined

TARGET = "target"  # the name of the target among named arrays


def require_same(found: TensorsSpec, expected: TensorsSpec, name: str, one: str, other: str) -> None:
    """Raises InputError where batches are not alike in names, shapes and kinds."""
    if [_form(each) for each in found.tensors] != [_form(each) for each in expected.tensors]:
        raise InputError(f"{name}: {one} holds {found} and {other} {expected}: batches of one data set are alike")


def _form(tensor: TensorSpec) -> tuple[Any, ...]:
    return tensor.name, tensor.shape, tensor.kind


def of_sizes(found: TensorsSpec, wanted: Sequence[Shape]) -> TensorsSpec:
    """`found` with the sizes `wanted` of a network that takes any: of pictures, sequences and tokens. A vector of
    numbers keeps its length, and what has other axes is as it was."""
    pairs = list(zip(found.tensors, wanted, strict=False))
    free = [len(one.shape) > 1 or one.kind != "float32" or one.shape == shape for one, shape in pairs]
    if len(found.tensors) != len(wanted) or not all(free) or any(len(a.shape) != len(b) for a, b in pairs):
        return found
    return TensorsSpec(tuple(replace(one, shape=shape) for one, shape in pairs))  # type: ignore[arg-type]


def shapes_of(spec: TensorsSpec) -> tuple[tuple[int, ...], ...]:
    return tuple(one.shape for one in spec.tensors)


# --- batches -------------------------------------------------------------------------------------------------------


def parted(batch: Any, name: str) -> tuple[dict[str, Tensor], Any]:
    """The inputs of a batch by name, or by numbers of places, and its target. Raises InputError for another form."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, target = batch
    elif isinstance(batch, tuple | list) and len(batch) == 1:
        inputs, target = batch[0], None
    elif isinstance(batch, Mapping):
        inputs, target = {key: value for key, value in batch.items() if key != TARGET}, batch.get(TARGET)
    elif isinstance(batch, Tensor | np.ndarray):
        inputs, target = batch, None
    else:
        of = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise InputError(f"{name} gives a {type(batch).__name__}{of} for a batch: a batch is (inputs, target)")
    if isinstance(inputs, Mapping):
        found = {str(key): value for key, value in inputs.items()}
    else:
        found = dict(enumerate(inputs if isinstance(inputs, tuple | list) else [inputs]))  # type: ignore[arg-type]
    if not found:
        raise InputError(f"{name} gives a batch without inputs: a batch is (inputs, target)")
    tensors = {str(key): _tensor(value, name) for key, value in found.items()}
    target, first = _as_tensors(target), next(iter(tensors.values()))
    if isinstance(target, Tensor) and first.ndim and target.shape[:1] != first.shape[:1]:
        raise InputError(f"{name} gives {len(first)} samples and a target of {tuple(target.shape)}: give one a sample")
    return tensors, target


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, np.ndarray | np.number):
        value = torch.as_tensor(value)
    if not isinstance(value, Tensor):
        raise InputError(f"{name} gives {_told(value)} for an input: inputs are tensors, or a tuple or a dict of them")
    tensor: Tensor = value.detach().float() if value.is_floating_point() else value.detach()
    if tensor.dtype not in NAMES:
        raise InputError(f"{name} gives {_told(value)} for an input: inputs are float32, integers or booleans")
    return tensor


def _told(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _as_tensors(target: Any) -> Any:
    return torch.as_tensor(target) if isinstance(target, np.ndarray) and target.dtype != object else target


def spec_of(inputs: Mapping[str, Tensor]) -> TensorsSpec:
    by_place = all(name.isdigit() for name in inputs)
    return TensorsSpec(
        tuple(
            TensorSpec(
                "" if by_place else name,
                tuple(one.shape[1:]),
                NAMES[one.dtype],
                0 if one.is_floating_point() or not one.numel() else max(0, int(one.max())),
            )
            for name, one in inputs.items()
        )
    )


def given(inputs: Mapping[str, Tensor], expected: TensorsSpec, name: str, *, sizes_differ: bool = False) -> Given:
    """The inputs by place. Raises InputError for a batch that is not like the first one, but in its sizes where these
    may differ."""
    if any(not one.ndim or len(one) != len(next(iter(inputs.values()))) for one in inputs.values()):
        shapes = ", ".join(f"{key} {tuple(one.shape)}" for key, one in inputs.items())
        raise InputError(f"{name} gives a batch with inputs of different lengths ({shapes}): each is (n, ...)")
    found = spec_of(inputs)
    found = of_sizes(found, shapes_of(expected)) if sizes_differ else found
    require_same(found, expected, name, "a batch", "the first one")
    own = tuple(inputs.values())
    return own if len(own) > 1 else own[0]


# --- splits --------------------------------------------------------------------------------------------------------


def taken(target: Any, rows: Tensor) -> Any:
    """The `rows` of a target: of a tensor, of each tensor of a dict or tuple, the entries of a list."""
    if isinstance(target, Tensor):
        return target[rows]
    if isinstance(target, Mapping):
        return {key: taken(value, rows) for key, value in target.items()}
    if isinstance(target, tuple):
        return tuple(taken(value, rows) for value in target)
    return [target[row] for row in rows.tolist()] if isinstance(target, list) else target


def together(targets: Sequence[Any], name: str) -> Any:
    """The targets of batches as one."""
    one = targets[0]
    if isinstance(one, Tensor):
        try:
            return torch.cat([each if each.ndim else each[None] for each in targets])
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"{name} gives targets of different shapes ({error}): give a list, one a sample"
            ) from error
    if isinstance(one, Mapping):
        return {key: together([each[key] for each in targets], name) for key in one}
    if isinstance(one, tuple):
        return tuple(together(parts, name) for parts in zip(*targets, strict=True))
    return [entry for each in targets for entry in each] if isinstance(one, list) else one


def moved(target: Any, device: torch.device) -> Any:
    """A target on `device`, wherever it holds tensors."""
    if isinstance(target, Tensor):
        return target.to(device, non_blocking=True)
    if isinstance(target, Mapping):
        return {key: moved(value, device) for key, value in target.items()}
    return type(target)(moved(value, device) for value in target) if type(target) in (list, tuple) else target


@dataclass
class TensorSplit:
    """Samples in memory: inputs by place, each (n, ...), and their targets."""

    name: str
    spec: TensorsSpec
    inputs: Given
    target: Any
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return count(self.inputs)

    def labels(self) -> Tensor | None:
        """Labels of classes int64 (n,), if the targets are such."""
        return self.target if _are_labels(self.target) else None

    def of(self, rows: Tensor) -> "TensorSplit":
        return TensorSplit(self.name, self.spec, each(self.inputs, lambda one: one[rows]), taken(self.target, rows))

    def batches(
        self,
        size: int,
        device: torch.device,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        share: RowShare = ALL_ROWS,
    ) -> Iterator[Batch]:
        for rows in rows_of_batches(len(self), size, shuffle, share):
            own = self.of(rows)
            yield each(own.inputs, lambda one: one.to(device)), moved(own.target, device)


@dataclass
class DatasetSplit:
    """A dataset of the user's, of which each sample is asked for when it is needed."""

    name: str
    spec: TensorsSpec
    dataset: Any
    collate: Callable[[Any], Any]
    workers: int = 0
    rows: Tensor | None = None  # of the dataset; None: all
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    def labels(self) -> Tensor | None:
        """All labels of classes, integers (n,); None for other targets.

        They are the dataset's `targets`, if its first samples have these. Else the whole dataset is read.
        """
        first, known = self.first_labels(), _targets(self.dataset)
        if first is None:
            return None
        if known is not None:
            known = known if self.rows is None else known[self.rows]
            if known[: len(first)].equal(first.to(known.dtype)):
                return known
        found = list[Tensor]()
        for _, target in self.batches(64, torch.device("cpu")):
            if not _are_labels(target):
                return None
            found.append(target)
        return torch.cat(found)

    def first_labels(self) -> Tensor | None:
        """The labels of the first samples; None for other targets."""
        target = next(iter(self.batches(64, torch.device("cpu"))))[1]
        return target if _are_labels(target) else None

    def of(self, rows: Tensor) -> "DatasetSplit":
        own = rows if self.rows is None else self.rows[rows]
        return DatasetSplit(self.name, self.spec, self.dataset, self.collate, self.workers, own)

    def batches(
        self,
        size: int,
        device: torch.device,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        share: RowShare = ALL_ROWS,
    ) -> Iterator[Batch]:
        wanted = rows_of_batches(len(self), size, shuffle, share)
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=[(rows if self.rows is None else self.rows[rows]).tolist() for rows in wanted],
            generator=shuffle,
            num_workers=self.workers,
            collate_fn=self.collate,
        )
        for batch in loader:
            inputs, target = parted(batch, self.name)
            found = given(inputs, self.spec, self.name)
            yield each(found, lambda one: one.to(device)), moved(target, device)


@dataclass
class MixedSplit:
    """Samples of several sizes, for a network that takes any: a batch holds those of one size, and one sample where
    all differ.

    `samples` gives of each row the inputs by name, each (1, ...), and the target. `shapes` are those of all of them.
    """

    name: str
    spec: TensorsSpec  # of the first row
    samples: Any
    shapes: Sequence[tuple[tuple[int, ...], ...]]
    known: Tensor | None  # labels of all samples, where they are such
    rows: Tensor
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> list[TensorsSpec]:
        """What a batch may be, each once."""
        return [of_sizes(self.spec, one) for one in dict.fromkeys(self.shapes[row] for row in self.rows.tolist())]

    def labels(self) -> Tensor | None:
        """Labels of classes int64 (n,), if the targets are such."""
        return None if self.known is None else self.known[self.rows]

    def of(self, rows: Tensor) -> "MixedSplit":
        own = self.rows[rows]
        return replace(self, spec=of_sizes(self.spec, self.shapes[int(own[0])]), rows=own, unreadable=[])

    def batches(
        self,
        size: int,
        device: torch.device,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        share: RowShare = ALL_ROWS,
    ) -> Iterator[Batch]:
        for wanted in rows_of_batches(len(self), size, shuffle, share):
            alike: dict[Any, list[int]] = {}
            for row in self.rows[wanted].tolist():
                alike.setdefault(self.shapes[row], []).append(row)
            for rows in alike.values():
                inputs, targets = zip(*(self.samples[row] for row in rows), strict=True)
                whole = joined([given(one, self.spec, self.name, sizes_differ=True) for one in inputs])
                yield each(whole, lambda one: one.to(device)), moved(together(targets, self.name), device)


class OneByOne:
    """The samples of a dataset, each as a batch of one."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], name: str) -> None:
        self.dataset, self.collate, self.name = dataset, collate, name

    def __getitem__(self, row: int) -> tuple[dict[str, Tensor], Any]:
        return parted(self.collate([self.dataset[row]]), self.name)


def mixed(half: str, samples: Any, count: int, where: str) -> MixedSplit:
    """A split of `count` samples of several sizes. Each is read once, for its size.

    Raises InputError where they differ in more.
    """
    found, labels = list[TensorsSpec](), list[Tensor]()
    for row in range(count):
        inputs, target = samples[row]
        found.append(spec_of(inputs))
        given(inputs, found[0], where, sizes_differ=True)
        labels += [target] if _are_labels(target) else []
    most = [max(one.most for one in ones) for ones in zip(*(spec.tensors for spec in found), strict=True)]
    spec = TensorsSpec(tuple(replace(one, most=own) for one, own in zip(found[0].tensors, most, strict=True)))
    known = torch.cat(labels) if len(labels) == count else None
    return MixedSplit(half, spec, samples, [shapes_of(one) for one in found], known, torch.arange(count))


OwnSplit = TensorSplit | DatasetSplit | MixedSplit


def _targets(dataset: Any) -> Tensor | None:
    """The labels that a dataset has as `targets`, or that a part of one has in the whole; None if it has none."""
    if isinstance(dataset, Subset):
        whole = _targets(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices))]
    known = getattr(dataset, "targets", None)
    if not isinstance(known, list | tuple | np.ndarray | Tensor) or len(known) != len(dataset):
        return None
    known = torch.as_tensor(known) if not isinstance(known, list) or isinstance(known[0], int) else None
    return known if _are_labels(known) else None


def _are_labels(target: Any) -> bool:
    return isinstance(target, Tensor) and target.ndim == 1 and target.dtype in (torch.int64, torch.int32, torch.uint8)
