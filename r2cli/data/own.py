"""The user's own data: PyTorch datasets, loaders, or any iterable of batches, which give tensors of any shape and kind.

    (inputs, target)    inputs: a tensor, a tuple of them by place, or a dict by name, each (n, ...)
                        target: anything, or None
    inputs              a tensor or a dict alone, without a target; a dict may hold the target as 'target'

A dataset gives the same for one sample, without the n.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from r2cli.data.own_splits import (
    DatasetSplit,
    MixedSplit,
    OneByOne,
    OwnSplit,
    TensorSplit,
    given,
    mixed,
    of_sizes,
    parted,
    require_same,
    shapes_of,
    spec_of,
    taken,
    together,
)
from r2cli.data.request import Data
from r2cli.data.task import CLASSIFICATION, UNLABELLED
from r2cli.errors import InputError
from r2cli.storage.input_spec import KINDS, TensorSpec, TensorsSpec, places
from r2cli.storage.input_spec import split as apart

HELD_OUT = 0.2  # of a single split
LOOKED_AT = 16  # samples of a dataset, to see whether they have one size
FORMS = "a dataset, a loader or an iterable of batches, each (inputs, target), or a tuple (train, test) of two such"


def to_data(name: str, made: Any) -> Data:
    """The data set of what a factory returns: train and test, or one of which a fifth is held out for testing.

    The test half has one size, which is the file's; inputs of the train half may have others. Raises InputError for
    anything else, and for batches that are none.
    """
    halves = _halves(name, made)
    splits = [_split(half, own, name) for half, own in zip(("train", "test"), halves, strict=False)]
    if len(splits) == 1:
        splits = _held_out(splits[0], name)
    train, test = splits
    if isinstance(test, MixedSplit) and len(test.sizes) > 1:
        one, other, *_ = test.sizes
        raise InputError(f"{name}: its test half holds {one} and {other}: the file takes one size, so test on one")
    spec = test.spec if isinstance(train, MixedSplit) else train.spec
    found = of_sizes(train.spec, shapes_of(spec)) if isinstance(train, MixedSplit) else spec
    require_same(test.spec, found, name, "its test half", "its train half")
    class_names = tuple(map(str, getattr(halves[0], "classes", ())))
    with _reading(name):  # of all samples only where their number of classes is not known
        labels = train.first_labels() if class_names and isinstance(train, DatasetSplit) else train.labels()
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


def _halves(name: str, given: Any) -> Sequence[Any]:
    if isinstance(given, Mapping) and set(given) <= {"train", "test"} and given:
        given = tuple(given[half] for half in ("train", "test") if half in given)
    if isinstance(given, list) and len(given) == 2 and all(isinstance(one, Dataset | DataLoader) for one in given):
        given = tuple(given)  # a list of anything else has batches
    if isinstance(given, tuple) and len(given) in (1, 2):
        return given
    if isinstance(given, Tensor | np.ndarray | Mapping | str | bytes) or not isinstance(given, Iterable | Dataset):
        raise InputError(f"{name} returned a {type(given).__name__}: it must return {FORMS}")
    return (given,)


# --- splits -----------------------------------------------------------------------------------------------------------


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
    with _reading(where):
        if isinstance(given, DataLoader) and not isinstance(given.dataset, IterableDataset):
            own = given.collate_fn
            collate = _collated if own is default_collate else own
            return _of_dataset(half, given.dataset, collate, given.num_workers, where)
        if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
            return _of_dataset(half, given, _collated, 0, where)
        return _of_batches(half, given, where)


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Raise InputError for whatever the user's code raises in the block."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(f"{where} raised {type(error).__name__} as it was read ({why}): correct it") from error


def _of_dataset(half: str, dataset: Any, collate: Any, workers: int, where: str) -> OwnSplit:
    if not len(dataset):
        raise InputError(f"{where} is empty: give some samples")
    samples = [dataset[row] for row in range(min(len(dataset), LOOKED_AT))]
    if len({shapes_of(spec_of(parted(collate([one]), where)[0])) for one in samples}) > 1:
        return mixed(half, OneByOne(dataset, collate, where), len(dataset), where)
    inputs, _ = parted(collate(samples), where)
    return DatasetSplit(half, spec_of(inputs), dataset, collate, workers)


def _of_batches(half: str, batches: Any, where: str) -> OwnSplit:
    if isinstance(batches, Tensor | np.ndarray | Mapping | str) or not isinstance(batches, Iterable):
        raise InputError(f"{where} is a {type(batches).__name__}: it must be {FORMS.partition(', or')[0]}")
    found = [parted(batch, where) for batch in batches]
    if not found:
        raise InputError(f"{where} is empty: give some batches")
    spec = spec_of(found[0][0])
    whole = [given(inputs, spec, where, sizes_differ=True) for inputs, _ in found]
    if len({shapes_of(spec_of(inputs)) for inputs, _ in found}) > 1:
        given_names = list(found[0][0])
        singles = [
            (dict(zip(given_names, places(one), strict=True)), taken(target, torch.tensor([row])))
            for inputs, (_, target) in zip(whole, found, strict=True)
            for row, one in enumerate(apart(inputs, 1))
        ]
        return mixed(half, singles, len(singles), where)
    own = tuple(torch.cat(parts) for parts in zip(*map(places, whole), strict=True))
    names = spec.names if all(spec.names) else tuple(map(str, range(len(own))))
    return TensorSplit(
        half,
        spec_of(dict(zip(names, own, strict=True))),
        own if len(own) > 1 else own[0],
        together([target for _, target in found], where),
    )


def _held_out(split: OwnSplit, name: str) -> list[OwnSplit]:
    """A split in two: a fifth of it, always the same, is for testing; of samples of several sizes, of those that have
    the first one's. A sample alone, without a target, is both halves."""
    rows = torch.arange(len(split))
    if isinstance(split, MixedSplit):
        rows = torch.tensor([row for row in rows.tolist() if split.shapes[row] == split.shapes[0]])
    if len(rows) < 2:
        if next(iter(split.batches(1, torch.device("cpu"))))[1] is not None:
            raise InputError(f"{name} has one sample: give two at least, one to test")
        return [split, split.of(rows)]
    # The seed is fixed: a sample of the test must never have been one of the training of an earlier command.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    test = rows[order[: max(1, int(HELD_OUT * len(rows)))].sort().values]
    left = torch.ones(len(split), dtype=torch.bool)
    left[test] = False
    return [split.of(left.nonzero()[:, 0]), split.of(test)]
