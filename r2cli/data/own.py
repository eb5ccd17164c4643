"""The user's own data: PyTorch datasets, loaders, or any iterable of batches, which give tensors of any shape and kind.

    (inputs, target)    inputs: a tensor, a tuple of them by place, or a dict by name, each (n, ...)
                        target: anything, or None
    inputs              a tensor or a dict alone, without a target; a dict may hold the target as 'target'

A dataset gives the same for one sample, without the n.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from r2cli.data.request import Data
from r2cli.data.splits import ALL_ROWS, Batch, RowShare, Split, rows_of_batches
from r2cli.data.task import CLASSIFICATION, UNLABELLED
from r2cli.errors import InputError
from r2cli.storage.input_spec import KINDS, NAMES, Given, TensorSpec, TensorsSpec, count, each, places

TARGET = "target"  # the name of the target among named arrays
HELD_OUT = 0.2  # of a single split
FORMS = "a dataset, a loader or an iterable of batches, each (inputs, target), or a tuple (train, test) of two such"


def to_data(name: str, given: Any) -> Data:
    """The data set of what a factory returns: train and test, or one of which a fifth is held out for testing.

    Raises InputError for anything else, and for batches that are none.
    """
    halves = _halves(name, given)
    splits = [_split(half, own, name) for half, own in zip(("train", "test"), halves, strict=False)]
    if len(splits) == 1:
        splits = _held_out(splits[0], name)
    train, test = splits
    spec = train.spec
    require_same(test.spec, spec, name, "its test half", "its train half")
    labels = train.labels()
    class_names = tuple(map(str, getattr(halves[0], "classes", ())))
    classes = len(class_names) or (0 if labels is None else int(labels.max()) + 1)
    task = UNLABELLED if labels is None else CLASSIFICATION
    return Data(name, spec, (), train, test, measured=task.metric is not None, task=task, label_count=classes)


NOISE = 64  # samples


def noise(spec: TensorsSpec, name: str) -> Data:
    """Random samples of `spec`, to read and prove a network where there is no data of its own."""
    train, test = (
        TensorSplit(half, spec, spec.random(NOISE, torch.Generator().manual_seed(seed)), None)
        for seed, half in enumerate(("train", "test"))
    )
    return Data(name, spec, (), train, test, measured=False, task=UNLABELLED)


def of_shapes(texts: Sequence[str]) -> TensorsSpec:
    """The inputs that --input-shape says: NAME=1x80x100 without the batch, and :int64 or another kind behind it.

    Raises InputError for another form.
    """
    found = []
    for text in texts:
        match = re.fullmatch(r"(?:(\w+)=)?(\d+(?:x\d+)*)?(?::(\w+))?", text)
        if not match or not text or (match[3] or "float32") not in KINDS:
            raise InputError(f"--input-shape {text} is not NAME=1x80x100, or NAME=12:int64 for another kind")
        shape = tuple(int(length) for length in (match[2] or "").split("x") if length)
        if not all(0 < length <= 1 << 20 for length in shape):
            raise InputError(f"--input-shape {text} is impossible: give lengths above 0")
        found.append(TensorSpec(match[1] or "", shape, match[3] or "float32", 1 if match[3] else 0))
    if len({one.name for one in found}) < len(found):
        raise InputError("--input-shape names two inputs alike: give each its own name")
    return TensorsSpec(tuple(found))


def require_same(found: TensorsSpec, expected: TensorsSpec, name: str, one: str, other: str) -> None:
    """Raises InputError where batches are not alike in names, shapes and kinds."""
    if [_form(each) for each in found.tensors] != [_form(each) for each in expected.tensors]:
        raise InputError(f"{name}: {one} holds {found} and {other} {expected}: batches of one data set are alike")


def _form(tensor: TensorSpec) -> tuple[Any, ...]:
    return tensor.name, tensor.shape, tensor.kind


def _halves(name: str, given: Any) -> Sequence[Any]:
    if isinstance(given, Mapping) and set(given) <= {"train", "test"} and given:
        given = tuple(given[half] for half in ("train", "test") if half in given)
    if isinstance(given, tuple) and len(given) in (1, 2):
        return given
    if isinstance(given, Tensor | np.ndarray | Mapping | str | bytes) or not isinstance(given, Iterable | Dataset):
        raise InputError(f"{name} returned a {type(given).__name__}: it must return {FORMS}")
    return (given,)


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


def _spec_of(inputs: Mapping[str, Tensor]) -> TensorsSpec:
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


def _given(inputs: Mapping[str, Tensor], expected: TensorsSpec, name: str) -> Given:
    """The inputs by place. Raises InputError for a batch that is not like the first one."""
    if any(not one.ndim or len(one) != len(next(iter(inputs.values()))) for one in inputs.values()):
        shapes = ", ".join(f"{key} {tuple(one.shape)}" for key, one in inputs.items())
        raise InputError(f"{name} gives a batch with inputs of different lengths ({shapes}): each is (n, ...)")
    require_same(_spec_of(inputs), expected, name, "a batch", "the first one")
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
        """All labels where the dataset has them as `targets`, or those of its first samples; None for other targets."""
        known = getattr(self.dataset, "targets", None)
        if isinstance(known, list | tuple | np.ndarray | Tensor) and len(known) == len(self.dataset):
            known = torch.as_tensor(known) if not isinstance(known, list) or isinstance(known[0], int) else None
            if _are_labels(known):
                return known
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
            given = _given(inputs, self.spec, self.name)
            yield each(given, lambda one: one.to(device)), moved(target, device)


OwnSplit = TensorSplit | DatasetSplit


def _are_labels(target: Any) -> bool:
    return isinstance(target, Tensor) and target.ndim == 1 and target.dtype in (torch.int64, torch.int32, torch.uint8)


def _collated(samples: Sequence[Any]) -> Any:
    """Samples as a batch; targets that do not stack, such as boxes, as a list."""
    parts: list[Any] = [
        sample if isinstance(sample, tuple | list) and len(sample) == 2 else (sample,) for sample in samples
    ]
    inputs = default_collate([part[0] for part in parts])
    if len(parts[0]) == 1:
        return inputs
    targets = [part[1] for part in parts]
    if targets[0] is None:
        return inputs, None
    try:
        return inputs, default_collate(targets)
    except (RuntimeError, TypeError, ValueError):
        return inputs, targets


def _split(half: str, given: Any, name: str) -> OwnSplit:
    where = f"{name} ({half})"
    try:
        if isinstance(given, DataLoader) and not isinstance(given.dataset, IterableDataset):
            own = given.collate_fn
            collate = _collated if own is default_collate else own
            return _of_dataset(half, given.dataset, collate, given.num_workers, where)
        if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
            return _of_dataset(half, given, _collated, 0, where)
        return _of_batches(half, given, where)
    except InputError:
        raise
    except Exception as error:  # the user's code raises anything
        why = " ".join(str(error).split())[:300]
        raise InputError(f"{where} raised {type(error).__name__} as it was read ({why}): correct it") from error


def _of_dataset(half: str, dataset: Any, collate: Any, workers: int, where: str) -> DatasetSplit:
    if not len(dataset):
        raise InputError(f"{where} is empty: give some samples")
    inputs, _ = parted(collate([dataset[row] for row in range(min(len(dataset), 16))]), where)
    return DatasetSplit(half, _spec_of(inputs), dataset, collate, workers)


def _of_batches(half: str, batches: Any, where: str) -> TensorSplit:
    if isinstance(batches, Tensor | np.ndarray | Mapping | str) or not isinstance(batches, Iterable):
        raise InputError(f"{where} is a {type(batches).__name__}: it must be {FORMS.partition(', or')[0]}")
    given: list[Given] = []
    targets, spec = [], None
    for batch in batches:
        inputs, target = parted(batch, where)
        spec = spec or _spec_of(inputs)
        given.append(_given(inputs, spec, where))
        targets.append(target)
    if spec is None:
        raise InputError(f"{where} is empty: give some batches")
    own = tuple(torch.cat(parts) for parts in zip(*map(places, given), strict=True))
    names = spec.names if all(spec.names) else tuple(map(str, range(len(own))))
    return TensorSplit(
        half,
        _spec_of(dict(zip(names, own, strict=True))),
        own if len(own) > 1 else own[0],
        together(targets, where),
    )


def _held_out(split: OwnSplit, name: str) -> list[OwnSplit]:
    """A split in two: a fifth of it, always the same, is for testing."""
    if len(split) < 2:
        raise InputError(f"{name} has one sample: give two at least, one to test")
    # The seed is fixed: a sample of the test must never have been one of the training of an earlier command.
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    test = max(1, int(HELD_OUT * len(split)))
    return [split.of(order[test:].sort().values), split.of(order[:test].sort().values)]


def fit_of(split: Split) -> TensorsSpec | None:
    """The tensors that a split of the user's own gives; None for another."""
    return split.spec if isinstance(split, TensorSplit | DatasetSplit) else None
