"""What a file is run on for its proof: images of its data set, or random inputs of the shapes that it declares."""

from dataclasses import dataclass
from pathlib import Path

import torch

from r2cli import data as datasets
from r2cli.config import values
from r2cli.config.inspection import VerifyConfig
from r2cli.data import Data
from r2cli.deploy import declared_inputs, runtime
from r2cli.deploy.engines import Arrays
from r2cli.errors import InputError
from r2cli.storage.input_spec import count, places, split

IMAGES = 64  # of a data set, at most
DRAWN = 8  # samples drawn at random, in one batch where the file leaves that open
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ProofInputs:
    """What a file is run on, batch by batch, and what that is in words."""

    batches: list[Arrays]
    told: str


def named(path: Path, data: str | None) -> runtime.Recorded | None:
    """What the file at `path` records of its data; None for another tool's file, and where the name is not enough.

    Raises InputError for `data` beside a file that does not say how its inputs are prepared.
    """
    if not runtime.is_ours(path):
        if data is not None:
            raise InputError(f"{path} does not say how its inputs are prepared: leave out --data, and they are drawn")
        return None
    recorded = runtime.recorded(path)
    kind, _, where = recorded.data.partition(":")
    is_known = kind in datasets.KINDS and (where or kind not in datasets.WHERE)
    return recorded if data is not None or is_known else None


def of_file(path: Path, data: Data | str | None, config: VerifyConfig) -> ProofInputs:
    """The inputs of the file at `path`: of `data`, or of the data set that a file of r2's names, or else drawn.

    Raises InputError as `named` does.
    """
    if isinstance(data, Data):
        return of_data(path, data)
    found = named(path, data)
    if found is None:
        return _drawn(path, config)
    if data is None:
        return of_data(path, datasets.load_named_in_file(found.data, spec=found.input, classes=found.class_names))
    return of_data(path, datasets.load(data, spec=found.input, classes=found.class_names))


def of_data(path: Path, source: Data, most: int = IMAGES) -> ProofInputs:
    """The first test samples of `source`, `most` at most, as the file at `path` takes them: by place, in batches of its
    own size.

    Raises InputError where the file wants other inputs.
    """
    samples = next(iter(source.test.batches(datasets.batch_that_fits(source.test, most), CPU)))[0]
    wanted = declared_inputs.declared(runtime.read(path), str(path))
    if [len(each.axes) for each in wanted] != [one.ndim for one in places(samples)]:
        shapes = ", ".join(str(tuple(one.shape)) for one in places(samples))
        raise InputError(f"{path} wants {', '.join(each.name for each in wanted)}, and {source.name} gives {shapes}")
    names, first = [each.name for each in wanted], wanted[0].axes[0]
    size = first if isinstance(first, int) else count(samples)
    whole = [part for part in split(samples, size) if count(part) == size]  # what fills no batch is left out
    if not whole:
        raise InputError(f"{path} takes {size} samples at once, and there are {count(samples)}: give more data")
    told = f"{count(samples)} test {'images' if source.input.mean else 'samples'} of {source.name}"
    return ProofInputs([runtime.fed(names, places(part)) for part in whole], told)


def _drawn(path: Path, config: VerifyConfig) -> ProofInputs:
    inputs = declared_inputs.declared(runtime.read(path), str(path))
    sizes = declared_inputs.shapes(inputs, values.input_shapes(config.shape))
    first = next((sizes[each.name][0] for each in inputs if sizes[each.name]), DRAWN)
    count = -(-DRAWN // first)
    batches = [declared_inputs.drawn(inputs, sizes, config.seed + place) for place in range(count)]
    return ProofInputs(list(batches), declared_inputs.told(inputs, sizes))
