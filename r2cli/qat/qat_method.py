"""What a method of training with quantizers is: two kinds of quantizers, and what it does besides."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from r2cli import registry
from r2cli.data import Batch
from r2cli.errors import InputError
from r2cli.qat.quantizer_placement import Prepared
from r2cli.qat.quantizers import ActivationQuantizer, WeightQuantizer

Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class EpochStart:
    """What a method's hooks are told: the epoch from 1 on, of how many, the run's images, and the method's options."""

    number: int
    epochs: int
    seed: int
    batches: Batches
    options: Any  # as the `options` of the method's entry


Hook = Callable[[Prepared, EpochStart], None]


def _nothing(prepared: Prepared, epoch: EpochStart) -> None:
    pass


@dataclass(frozen=True)
class QatMethod:
    """What quantizes weights, and what activations; how their own numbers are trained; and hooks.

    `before_epoch` comes before every epoch, `add_gradients` after every backward pass, to add to `.grad`.
    """

    weight: type[WeightQuantizer]
    activation: type[ActivationQuantizer]
    adam: bool = False  # the quantizers' numbers are stepped by Adam, not with the weights
    decays: bool = False  # they decay as weights do
    before_epoch: Hook = _nothing
    add_gradients: Hook = _nothing


def method(name: str) -> QatMethod:
    """The method of that name. Raises InputError for a name that nobody has."""
    found = registry.load(registry.QAT_METHODS, name)
    if not isinstance(found, QatMethod):
        raise InputError(f"the method '{name}' is a {type(found).__name__} and no QatMethod: mend the package it is of")
    return found
