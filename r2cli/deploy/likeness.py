"""How near the outputs of two runs are: signal to noise, and how often the greatest of the classes is the same."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from r2cli.deploy.engines import Array, Arrays
from r2cli.errors import InputError
from r2cli.quantized.decibels import of_result


@dataclass(frozen=True)
class Likeness:
    """An output beside the reference: dB (at most 200, NaN where it is not finite), and percent of equal argmax.

    `agreement` is None for an output without classes. Of the `decisions`, `differ` are others: those do not count that
    the reference itself makes by less than the noise that is allowed.
    """

    output: str
    sqnr_db: float
    agreement: float | None = None
    decisions: int = 0
    differ: int = 0


def compared(found: Arrays, reference: Arrays, *, noise_db: float) -> list[Likeness]:
    """Every output of `reference` beside that of `found`, by name, or by place where the names are others.

    Raises InputError where an output is lacking or has another shape.
    """
    return [_one(name, own, reference[name], noise_db) for name, own in _paired(found, reference).items()]


def _paired(found: Arrays, reference: Arrays) -> Mapping[str, Array]:
    if not reference.keys() <= found.keys():
        if len(found) != len(reference):
            lacking = next(name for name in reference if name not in found)
            raise InputError(f"the files have other outputs: only one of them gives '{lacking}'")
        found = dict(zip(reference, found.values(), strict=True))
    for name, own in reference.items():
        if found[name].shape != own.shape:
            raise InputError(
                f"the files give '{name}' as {found[name].shape} and {own.shape}: they are not of one network"
            )
    return {name: found[name] for name in reference}


def _one(name: str, found: Array, reference: Array, noise_db: float) -> Likeness:
    own, other = (each.astype(np.float64) for each in (found, reference))
    signal, noise = float(np.square(other).sum()), float(np.square(own - other).sum())
    finite = bool(np.isfinite(own).all()) and bool(np.isfinite(other).all())
    ratio = of_result(signal, noise)
    if not finite:
        return Likeness(name, float("nan"))
    classes = _classes(own) if reference.dtype.kind == "f" else None
    if classes is None:
        return Likeness(name, ratio)
    # (samples, classes)
    own, other = (np.moveaxis(each, classes, -1).reshape(-1, each.shape[classes]) for each in (own, other))
    picked, expected = own.argmax(1), other.argmax(1)
    rows = np.arange(len(own))
    lead = other[rows, expected] - other[rows, picked]
    size = np.square(other).mean(1)
    if reference.ndim > 2:
        # Rows of one sample's map are judged by the whole of it, as the dB are: where boxes and scores are rows of one
        # output, a row of scores that are all nothing beside the boxes decides nothing.
        whole = size.reshape(len(reference), -1).mean(1)
        size = np.maximum(size, np.repeat(whole, len(size) // len(whole)))
    within = lead <= 10 ** (-noise_db / 20) * np.sqrt(size)
    equal = picked == expected
    return Likeness(name, ratio, 100 * float(equal.mean()), len(equal), int((~(equal | within)).sum()))


def _classes(output: Array) -> int | None:
    """The axis of classes: the second of (n, classes) and (n, classes, height, width), the last of a sequence's."""
    axis = {2: 1, 3: 2, 4: 1}.get(output.ndim)
    return axis if axis is not None and output.size and output.shape[axis] > 1 else None


def least(found: list[Likeness]) -> float:
    """The dB of the worst output; NaN where one is not finite."""
    return float(np.min([each.sqnr_db for each in found]))


def agrees(found: list[Likeness], *, db: float, share: float) -> bool:
    """Whether every output has `db` or more, and `share` of its decisions or all but one are equal."""
    return least(found) >= db and all(each.differ <= max(1, (1 - share) * each.decisions) for each in found)


def told(found: list[Likeness]) -> str:
    """The worst output in words: '62 dB, argmax 100.0 %'."""
    shown = f"{least(found):.0f} dB"
    shares = [each.agreement for each in found if each.agreement is not None]
    return f"{shown}, argmax {min(shares):.1f} %" if shares else shown
