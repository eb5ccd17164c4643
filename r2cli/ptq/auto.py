"""`--method auto`: try the other methods on calibration images, and keep the best by the network's outputs.

First come the trials that cost only a pass over some images: every grid with min-max and least-squares ranges, rounded
to the nearest level, without and with the bias correction of DFQ, and with all of DFQ. If the outputs of the best are
still below `ENOUGH` dB, BRECQ, and every other method that the registry marks as `tried`, learns the rounding on each
grid, for the network as it is and for the equalized one. The trial whose class probabilities are nearest to the float
network's is kept. Equalization is tried, not assumed: it does not help every network.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from r2cli import registry
from r2cli.calibration import deployed
from r2cli.ptq import layer_sweep
from r2cli.ptq.post_training import CHANNEL, CORRECT, DFQ, EQUALIZE, UNFOLDED, PtqSettings, QuantizedLayer, quantize
from r2cli.quantized.decibels import sqnr
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import Given, each, joined, places, split

ENOUGH = 30.0  # dB of the outputs; an error of a thousandth of the signal's power hardly changes a class
FEW = 4  # bits; with more, least-squares ranges gain nothing
SOME = 128  # images for the trials that learn nothing
BATCH = 64
GRIDS = (CHANNEL, UNFOLDED)
RANGES = ("minmax", "mse")
NEAREST = registry.PTQ_NEAREST
PARTS: tuple[tuple[str, ...], ...] = ((), (CORRECT,), DFQ)


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and what they do to the outputs on calibration images.

    `sqnr` is in dB. `divergence` of the class probabilities from the float network's is in nats; of other outputs it is
    the share of noise. `seconds` is the time.
    """

    method: str
    granularity: str
    weight_range: str
    parts: tuple[str, ...]
    sqnr: float
    divergence: float
    seconds: float

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
    told: Callable[[Trial], None] = lambda trial: None,
) -> tuple[Checkpoint, list[QuantizedLayer], PtqSettings, list[Trial]]:
    """Try `settings` with each of `grids`, of the range `rules` and of the methods. Returns the best, and all trials.

    `images` are read more than once. Outputs that do not decide among classes are compared by their noise. `told` is
    called with each trial when it ends. Raises InputError as `quantize` does.
    """
    few = split(layer_sweep.first(images, SOME), BATCH)
    expected = _outputs(checkpoint, images, device)
    trials: list[Trial] = []
    best: tuple[Checkpoint, list[QuantizedLayer], PtqSettings] | None = None

    def attempt(own: PtqSettings, shown: Iterable[Given]) -> None:
        nonlocal best
        started = perf_counter()
        made, rows = quantize(checkpoint, own, shown, device)
        outputs = _outputs(made, images, device)
        if decides:
            lost = divergence(outputs[0], expected[0])
        else:
            lost = sum(map(noise, outputs, expected)) / len(outputs)
        if best is None or lost < min(trial.divergence for trial in trials):
            best = made, rows, own
        assert own.parts is not None
        form = own.method, own.granularity, own.weight_range, own.parts
        trials.append(Trial(*form, min(map(sqnr, outputs, expected)), lost, round(perf_counter() - started, 1)))
        told(trials[-1])

    # With many levels, the range with the least squared error is nearly that of min-max.
    usual = RANGES if settings.weight_bits <= FEW else RANGES[:1]
    for own in _plain(settings, grids, rules or usual):
        attempt(own, few)
    if max(trial.sqnr for trial in trials) < ENOUGH:
        for own in learned_trials(settings, grids, rules, trials):
            attempt(own, images)
    assert best is not None
    made, rows, own = best
    if not registry.get(registry.PTQ_METHODS, own.method).looks:  # its ranges are those of only some images so far
        made, rows = quantize(checkpoint, own, images, device)
    return made, rows, own, trials


def _plain(settings: PtqSettings, grids: Sequence[str], rules: Sequence[str]) -> Iterator[PtqSettings]:
    """Yield the settings of the trials that round to the nearest level."""
    for granularity in grids:
        for rule in rules:
            for parts in PARTS:
                yield replace(settings, method=NEAREST, granularity=granularity, weight_range=rule, parts=parts)


def learned_trials(
    settings: PtqSettings, grids: Sequence[str], rules: Sequence[str], trials: Sequence[Trial]
) -> list[PtqSettings]:
    """Return the settings of the trials that learn: every method on every grid, without and with equalization.

    Both are tried whatever helped rounding to the nearest level, because that may hurt learned rounding.
    """
    found = []
    methods = [name for name in registry.names(registry.PTQ_METHODS) if registry.PTQ_METHODS[name].tried]
    for name, granularity in itertools.product(methods, grids):
        for rule in rules or [registry.usual_weight_range(name, settings.weight_bits)]:
            own = replace(settings, method=name, granularity=granularity, weight_range=rule, parts=())
            found += [own, replace(own, parts=(EQUALIZE,))] if _equalizes(granularity, trials) else [own]
    return found


def _equalizes(granularity: str, trials: Sequence[Trial]) -> bool:
    """Say whether the network can be equalized: then all of DFQ gave other outputs than bias correction alone."""
    own = [trial for trial in trials if trial.granularity == granularity]
    return len({trial.sqnr for trial in own if CORRECT in trial.parts}) > len({trial.weight_range for trial in own})


def divergence(outputs: Tensor, expected: Tensor) -> float:
    """Return the Kullback-Leibler divergence of the class probabilities in nats, averaged over rows of (n, classes).

    The SQNR of the logits would not do: noise that moves all classes alike costs nothing, and 0.1 dB can be a point of
    top-1.
    """
    found, wanted = outputs.double().log_softmax(1), expected.double().log_softmax(1)
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


def noise(outputs: Tensor, expected: Tensor) -> float:
    """Return the noise of outputs that are no logits, as a share of their signal."""
    difference = (outputs - expected).double().square().sum()
    return float(difference / expected.double().square().sum().clamp_min(1e-30))


@torch.inference_mode()
def _outputs(checkpoint: Checkpoint, images: Iterable[Given], device: torch.device) -> tuple[Tensor, ...]:
    """Return the outputs of the network for all images, each (n, ...)."""
    model = deployed.network(checkpoint).to(device).eval()
    run = (model(*(one.to(device) for one in places(batch))) for batch in images)
    return places(joined([each(outputs, Tensor.cpu) for outputs in run]))
