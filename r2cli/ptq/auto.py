"""`--method auto`: try the other methods on calibration images, and keep the best by the network's outputs.

First come the trials that cost only a pass over some images: every grid with min-max and least-squares ranges, rounded
to the nearest level, without and with the bias correction of DFQ, and with all of DFQ. If the outputs of the best are
still below `ENOUGH` dB, BRECQ, and every other method that the registry marks as `tried`, learns the rounding on each
grid, for the network as it is and for the equalized one. Equalization is tried, not assumed: it does not help every
network. The trial whose class probabilities are nearest to the float network's is kept.

But what is learned on images fits these images, so the least of many trials is partly luck. The first learned trial is
what `--method brecq` gives by itself. Another takes its place only if it is nearer by `SURE` standard errors of the
difference over the images.

`equalization` decides for a method alone, before anything is learned: nearest rounding at `FINE` bits, where noise is
small and follows the ranges, must bring the outputs nearer in the equalized network. `distances` judges choices of
bits.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from r2cli import registry
from r2cli.calibration import deployed
from r2cli.ptq import layer_sweep
from r2cli.ptq.post_training import CHANNEL, CORRECT, DFQ, EQUALIZE, UNFOLDED, PtqSettings, QuantizedLayer, quantize
from r2cli.quantized.decibels import noises, sqnr
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import Given, each, joined, places, split

ENOUGH = 30.0  # dB of the outputs; an error of a thousandth of the signal's power hardly changes a class
FEW = 4  # bits; with more, least-squares ranges gain nothing
FINE = 6  # bits with which equalization is judged, or more: with few, one network's noise is as bad as the other's
SURE = 2.0  # standard errors
SOME = 128  # images for the trials that learn nothing
JUDGED = 64  # images for `equalization` and `distances`
BATCH = 64
GRIDS = (CHANNEL, UNFOLDED)
RANGES = ("minmax", "mse")
NEAREST = registry.PTQ_NEAREST
PARTS: tuple[tuple[str, ...], ...] = ((), (CORRECT,), DFQ)


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and what they do to the outputs on calibration images.

    `sqnr` is in dB. `divergence` of the class probabilities from the float network's is in nats; where outputs do not
    decide among classes (`decides`) it is the share of noise. `lead` is by how many standard errors it is nearer than
    the first learned trial. `seconds` is the time. One trial is `kept`.
    """

    method: str
    granularity: str
    weight_range: str
    parts: tuple[str, ...]
    sqnr: float
    divergence: float
    seconds: float
    lead: float = 0.0
    kept: bool = False
    decides: bool = True

    @property
    def away(self) -> str:
        """How far the outputs are from the float network's, in words."""
        return f"{self.divergence:.2g} {'nats' if self.decides else 'of the signal'}"

    def __str__(self) -> str:
        parts = f", {' and '.join(self.parts)}" if self.parts else ""
        return f"{self.method} on {self.granularity} grids, {self.weight_range}{parts}"


def choose(
    checkpoint: Checkpoint,
    settings: PtqSettings,
    images: Iterable[Given],
    device: torch.device,
    *,
    grids: Sequence[str] = GRIDS,
    rules: Sequence[str] = (),
    decides: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Checkpoint, list[QuantizedLayer], PtqSettings, list[Trial]]:
    """Try `settings` with each of `grids`, of the range `rules` and of the methods. Returns the best, and all trials.

    `images` are read more than once. Outputs that do not decide among classes are compared by their noise. `tell`
    is told of each trial when it ends, and where what is learned does not see all images. Raises InputError as
    `quantize` does.
    """
    few = split(layer_sweep.first(images, SOME), BATCH)
    expected = _outputs(checkpoint, images, device)
    tried: list[_Tried] = []

    def attempt(own: PtqSettings, shown: Iterable[Given], first: _Tried | None = None) -> _Tried:
        started = perf_counter()
        once = tell if first is None and shown is images else (lambda line: None)
        made, rows = quantize(checkpoint, own, shown, device, tell=once)
        outputs = _outputs(made, images, device)
        lost = _lost(outputs, expected, decides=decides)
        assert own.parts is not None
        form, taken = (own.method, own.granularity, own.weight_range, own.parts), round(perf_counter() - started, 1)
        ahead = 0.0 if first is None else lead(lost, first.lost)
        trial = Trial(*form, min(map(sqnr, outputs, expected)), float(lost.mean()), taken, ahead, decides=decides)
        tell(f"{trial}: outputs at {trial.sqnr:.1f} dB, {trial.away}, {trial.seconds:.1f} s")
        tried.append(_Tried(trial, lost, made, rows, own))
        return tried[-1]

    # With many levels, the range with the least squared error is nearly that of min-max.
    usual = RANGES if settings.weight_bits <= FEW else RANGES[:1]
    for own in _plain(settings, grids, rules or usual):
        attempt(own, few)
        _forget(tried, tried[0])
    best = min(tried, key=_distance)
    if max(one.trial.sqnr for one in tried) < ENOUGH:
        parts = equalization(checkpoint, replace(settings, granularity=grids[0]), images, device).parts
        usually, *others = learned_trials(settings, grids, rules, [one.trial for one in tried], parts)
        first = attempt(usually, images)
        for own in others:
            attempt(own, images, first)
            _forget(tried, first)
        best = min(tried, key=_distance)
        best = best if best is first or lead(best.lost, first.lost) > SURE else first
    made, rows, own = best.made, best.rows, best.own
    assert made is not None
    if not registry.get(registry.PTQ_METHODS, own.method).looks:  # its ranges are those of only some images so far
        made, rows = quantize(checkpoint, own, images, device)
    return made, rows, own, [replace(one.trial, kept=one is best) for one in tried]


@dataclass
class _Tried:
    """A trial with its result, and what it `lost` on each image, (n,). Only results that may be kept are held."""

    trial: Trial
    lost: Tensor
    made: Checkpoint | None
    rows: list[QuantizedLayer]
    own: PtqSettings


def kept(trials: Sequence[Trial]) -> Trial:
    """Return the trial that was kept."""
    return next(trial for trial in trials if trial.kept)


def _distance(one: _Tried) -> float:
    return one.trial.divergence


def _forget(tried: Sequence[_Tried], first: _Tried) -> None:
    """Drop the results that are neither the best so far nor `first`: each is a network."""
    best = min(tried, key=_distance)
    for one in tried:
        if one is not best and one is not first:
            one.made, one.rows = None, []


def lead(lost: Tensor, against: Tensor) -> float:
    """Return by how many standard errors of their difference `lost` is less than `against` on average, each (n,)."""
    less = against - lost
    error = less.std(correction=0) / len(less) ** 0.5
    return float(less.mean() / error.clamp_min(1e-30))


@dataclass(frozen=True)
class Equalization:
    """Whether a network is equalized, and the outputs in dB of rounding it to nearest as it is and equalized."""

    plain: float
    equalized: float

    @property
    def parts(self) -> tuple[str, ...]:
        return (EQUALIZE,) if self.equalized > self.plain else ()

    def __str__(self) -> str:
        done = "equalized" if self.parts else "not equalized"
        return f"{done}: rounded to nearest, the outputs are at {self.equalized:.1f} dB if it is, else {self.plain:.1f}"


def equalization(
    checkpoint: Checkpoint, settings: PtqSettings, images: Iterable[Given], device: torch.device
) -> Equalization:
    """Judge whether a method does better on the equalized network. Raises InputError as `quantize` does."""
    few = split(layer_sweep.first(images, JUDGED), BATCH)
    expected = _outputs(checkpoint, few, device)
    own = replace(settings, method=NEAREST, weight_bits=max(settings.weight_bits, FINE))
    found = []
    for parts in ((), (EQUALIZE,)):
        made, _ = quantize(checkpoint, replace(own, parts=parts), few, device)
        found.append(min(map(sqnr, _outputs(made, few, device), expected)))
    return Equalization(*found)


def distances(
    checkpoint: Checkpoint,
    choices: Mapping[str, PtqSettings],
    images: Iterable[Given],
    device: torch.device,
    *,
    decides: bool,
) -> dict[str, float]:
    """Return how far the outputs are from the float network's with each of `choices`, rounded to nearest.

    It is a `Trial`'s divergence. `images` and `decides` are as in `choose`. Raises InputError as `quantize` does.
    """
    few = split(layer_sweep.first(images, JUDGED), BATCH)
    expected, found = _outputs(checkpoint, few, device), dict[str, float]()
    for name, own in choices.items():
        alike = next((each for each in found if choices[each] == own), None)
        if alike is not None:
            found[name] = found[alike]
            continue
        made, _ = quantize(checkpoint, replace(own, method=NEAREST), few, device)
        found[name] = float(_lost(_outputs(made, few, device), expected, decides=decides).mean())
    return found


def _plain(settings: PtqSettings, grids: Sequence[str], rules: Sequence[str]) -> Iterator[PtqSettings]:
    """Yield the settings of the trials that round to the nearest level."""
    for granularity in grids:
        for rule in rules:
            for parts in PARTS:
                yield replace(settings, method=NEAREST, granularity=granularity, weight_range=rule, parts=parts)


def learned_trials(
    settings: PtqSettings,
    grids: Sequence[str],
    rules: Sequence[str],
    trials: Sequence[Trial],
    parts: tuple[str, ...] = (),
) -> list[PtqSettings]:
    """Return the settings of the trials that learn: every method on every grid, without and with equalization.

    Both are tried whatever helped rounding to the nearest level, because that may hurt learned rounding. `parts` of DFQ
    come first.
    """
    found = []
    methods = [name for name in registry.names(registry.PTQ_METHODS) if registry.PTQ_METHODS[name].tried]
    for name, granularity in itertools.product(methods, grids):
        both = sorted({(), (EQUALIZE,)} if _equalizes(granularity, trials) else {()}, key=lambda one: one != parts)
        for rule in rules or [registry.usual_weight_range(name, settings.weight_bits)]:
            own = replace(settings, method=name, granularity=granularity, weight_range=rule)
            found += [replace(own, parts=one) for one in both]
    return found


def _equalizes(granularity: str, trials: Sequence[Trial]) -> bool:
    """Say whether the network can be equalized: then all of DFQ gave other outputs than bias correction alone."""
    own = [trial for trial in trials if trial.granularity == granularity]
    return len({trial.sqnr for trial in own if CORRECT in trial.parts}) > len({trial.weight_range for trial in own})


def _lost(outputs: Sequence[Tensor], expected: Sequence[Tensor], *, decides: bool) -> Tensor:
    """What each image lost, (n,)."""
    return divergences(outputs[0], expected[0]) if decides else noises(outputs, expected)


def divergences(outputs: Tensor, expected: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of the class probabilities in nats, (n,), for rows of (n, classes).

    The SQNR of the logits would not do: noise that moves all classes alike costs nothing, and 0.1 dB can be a point of
    top-1.
    """
    found, wanted = outputs.double().log_softmax(1), expected.double().log_softmax(1)
    return (wanted.exp() * (wanted - found)).sum(1).reshape(len(found), -1).mean(1)


@torch.inference_mode()
def _outputs(checkpoint: Checkpoint, images: Iterable[Given], device: torch.device) -> tuple[Tensor, ...]:
    """Return the outputs of the network for all images, each (n, ...)."""
    model = deployed.network(checkpoint).to(device).eval()
    run = (model(*(one.to(device) for one in places(batch))) for batch in images)
    return places(joined([each(outputs, Tensor.cpu) for outputs in run]))
