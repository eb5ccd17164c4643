"""`--minimize bytes|cost --max-drop D`: the least of it that loses at most D of the metric.

What each layer loses is measured once, and gives the Pareto front of all choices of bits. Between its cheapest choice
and its dearest one it bisects `STEPS` of them: each trial rounds the whole network by the method that is asked for
(that of `auto` is the one that learns) and measures the metric on the test images, where the gate is.
"""

from dataclasses import dataclass, replace
from time import perf_counter

from r2cli import data, registry
from r2cli.config.methods import PtqConfig
from r2cli.data import Data
from r2cli.data.metrics import Measured
from r2cli.errors import InputError, R2Error
from r2cli.ptq import bit_budget, quantize
from r2cli.ptq.bit_budget import BitTarget, LayerLosses
from r2cli.ptq.knapsack import Front
from r2cli.ptq.quantize import PtqResult
from r2cli.storage.checkpoint import Checkpoint
from r2cli.train import evaluation, loop
from r2cli.train.reporter import SILENT, Reporter

STEPS = 33  # choices along the front: five trials, and one of the dearest


@dataclass(frozen=True)
class SizeTrial:
    """A choice of bits that was tried: what it spends, what the metric says of it, and what it loses of that."""

    spent: float
    value: float
    drop: float
    enough: bool
    seconds: float

    def __str__(self) -> str:
        return f"{self.spent:,.6g}: {self.drop:+.2f} lost, {'enough' if self.enough else 'too much'}"


@dataclass(frozen=True)
class _Search:
    """What every trial shares. `plain` is the config with the method that rounds."""

    made: Checkpoint
    source: Data
    plain: PtqConfig
    calibration: int
    max_drop: float
    before: Measured
    losses: LayerLosses
    target: BitTarget
    front: Front
    reporter: Reporter

    def attempt(self, place: int) -> tuple[SizeTrial, PtqResult]:
        """Try the choice of the front at `place`."""
        started, where = perf_counter(), loop.device(self.plain.device)
        own, rows = bit_budget.settings_at(self.losses, self.target, self.front, place)
        exact = replace(
            self.plain,
            minimize=None,
            cost=None,
            pareto=None,
            act_widths=None,
            target_act_bits=None,
            weight_bits=own.weight_bits,
            keep=own.keep,
            weight_range=own.weight_range,
        )
        result = quantize.quantize(
            self.made, self.source, exact, calibration=self.calibration, reporter=self.reporter, before=self.before
        )
        found = evaluation.of_task(result.network.to(where), self.source.giving(self.made.outputs), where)
        assert found is not None
        lost = drop(self.before, found)
        spent, seconds = float(self.front.costs[place]), perf_counter() - started
        trial = SizeTrial(spent, found.value, lost, lost <= self.max_drop, seconds)
        self.reporter.note(str(trial))
        told = {
            "mixed": [each.__dict__ for each in rows],
            "front": bit_budget.points(self.front, place),
            "again": ["--method", exact.method, *quantize.bits_again(own)],
        }
        return trial, replace(result, bits=rows, details={**result.details, **told})


def find(
    made: Checkpoint,
    source: Data | None,
    config: PtqConfig,
    *,
    calibration: int,
    max_drop: float | None,
    reporter: Reporter = SILENT,
) -> PtqResult:
    """Quantize as `quantize.quantize` does, to the least of what `config` minimizes that loses at most `max_drop`.

    Raises InputError where nothing says how much may be lost, or nothing measures it, and R2Error where even the
    dearest choice loses more.
    """
    if max_drop is None:
        raise InputError(f"--minimize {config.minimize} needs to know what may be lost: give --max-drop")
    where = loop.device(config.device)
    before = None if source is None else evaluation.of_float(made, source, where, reporter)
    if source is None or before is None:
        raise InputError(f"--minimize {config.minimize} needs data with labels or targets: give --data, or --metric")
    plain, target = _rounding(config), quantize.target_of(config)
    batches = data.Repeatable(lambda: data.calibration(source, calibration, where, config.seed))
    losses = bit_budget.measure(made, quantize.settings_of(plain), target, batches, where, config.seed, source.task)
    front = bit_budget.front(losses, target)
    search = _Search(made, source, plain, calibration, max_drop, before, losses, target, front, reporter)
    places = front.thinned(STEPS)
    trial, best = search.attempt(places[-1])
    if not trial.enough:
        raise R2Error(
            f"even the most bits lose {trial.drop:.2f}, more than --max-drop {max_drop:g}: give a better --method, or "
            "a greater --max-drop"
        )
    trials = [trial]
    low, high = -1, len(places) - 1  # the first loses too much, or is not there; the last is enough
    while high - low > 1:
        middle = (low + high) // 2
        trial, result = search.attempt(places[middle])
        trials.append(trial)
        low, high, best = (low, middle, result) if trial.enough else (middle, high, best)
    return replace(best, details={**best.details, "smallest": [each.__dict__ for each in trials]})


def drop(before: Measured, after: Measured) -> float:
    """What is lost of the metric, below 0 where something is won."""
    return before.value - after.value if before.metric.higher else after.value - before.value


def _rounding(config: PtqConfig) -> PtqConfig:
    """`config` with the method that rounds: for one that chooses, the first that learns, with its own ranges."""
    entry = registry.get(registry.PTQ_METHODS, config.method)
    method = config.method
    if entry.chooses:
        method = next(name for name in registry.names(registry.PTQ_METHODS) if registry.PTQ_METHODS[name].tried)
    return replace(config, method=method)
