"""What a method of quantization-aware training consists of: two kinds of quantizers, and hooks of the training loop."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from r2cli import registry
from r2cli.data import Batch
from r2cli.data.losses import Learned
from r2cli.errors import InputError
from r2cli.qat.quantizer_placement import Prepared
from r2cli.qat.quantizers import ActivationQuantizer, WeightQuantizer

Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class EpochStart:
    """What a method's hooks are told: the epoch, the run's calibration images, and the method's options."""

    number: int  # from 1
    epochs: int  # of the whole run
    seed: int
    batches: Batches
    options: Any  # of the class that the method's entry in the registry has as `options`
    learned: Learned | None = None  # what the network learns; None for a method that does not ask


Hook = Callable[[Prepared, EpochStart], None]


def nothing(prepared: Prepared, epoch: EpochStart) -> None:
    pass


@dataclass(frozen=True)
class QatMethod:
    """The quantizers of a method, how their own parameters are trained, and hooks.

    `ready` is called with the method's options before training, and before a state is restored: what it adds to the
    quantizers is part of that. `before_epoch` is called before every epoch. `add_gradients` is called after every
    backward pass, and may change the parameters' `.grad`. `collapsed` names the quantizers whose parameters are as
    small as they may become.
    """

    weight: type[WeightQuantizer]
    activation: type[ActivationQuantizer]
    adam: bool = False  # Adam trains the quantizers' parameters, not the optimizer of the weights
    decays: bool = False  # the quantizers' parameters have the weight decay of the weights
    ready: Callable[[Prepared, Any], None] = lambda prepared, options: None
    before_epoch: Hook = nothing
    add_gradients: Hook = nothing
    collapsed: Callable[[Prepared], Sequence[str]] = lambda prepared: ()


def method(name: str) -> QatMethod:
    """Return the method of that name. Raises InputError for an unknown name, and for an entry that is no QatMethod."""
    found = registry.load(registry.QAT_METHODS, name)
    if not isinstance(found, QatMethod):
        raise InputError(
            f"the method '{name}' is a {type(found).__name__} and no QatMethod: correct the package that it comes from"
        )
    return found
