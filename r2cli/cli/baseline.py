"""`--baseline MANIFEST`: the metric of a model that was made before, which a new one must not fall behind."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2cli.config.groups import AccuracyGate, Preparation
from r2cli.errors import InputError
from r2cli.storage import schema
from r2cli.storage.formats import MeasuredOn, MeasuredReport
from r2cli.storage.manifest import Manifest
from r2cli.storage.schema import Malformed

if TYPE_CHECKING:
    from r2cli import data as datasets


@dataclass(frozen=True)
class Baseline:
    file: Path
    value: float


def measured_on(given: Preparation, loaded: "datasets.Data") -> dict[str, Any]:
    """What a command's JSON says of the samples that its metric is measured on, and of the metric's keywords."""
    from r2cli import data as datasets

    return {
        "data": datasets.recorded(loaded.name),
        "samples": len(loaded.test),
        "metric_arg": list(given.metric_arg),
    }


def read(wanted: AccuracyGate, given: Preparation, loaded: "datasets.Data") -> Baseline | None:
    """The value that --baseline names; None without one.

    Raises InputError for a file that is no manifest with a metric, and for another metric or other samples than those
    of `loaded`, on which nothing can be compared.
    """
    path, metric = wanted.baseline, loaded.task.metric
    if path is None:
        if wanted.max_regression is not None:
            raise InputError("--max-regression needs --baseline: the manifest of the model to compare with")
        return None
    from r2cli import data as datasets

    asked = f"--baseline {path}"
    record = Manifest.load(path)
    try:
        found = schema.read(MeasuredReport, record.report, "report")
    except Malformed as error:
        raise InputError(f"{path} is damaged ({error}): make its model again") from error
    if metric is None or not loaded.measured:
        raise InputError(f"{asked} needs a metric to compare: leave out --no-eval, or give --data or --metric")
    if found.metric is None or found.measured_on is None:
        raise InputError(f"{asked} holds no metric of a data set: make its model again, without --no-eval")
    then, now = ((datasets.recorded(each.name), each.higher) for each in (found.metric, metric))
    if then != now:
        less = "" if then[1] == now[1] else ", or the same --metric-lower"
        raise InputError(
            f"{asked} has {found.metric.label}, and what is measured is {metric.label}: give its --metric{less}"
        )
    here = schema.read(MeasuredOn, measured_on(given, loaded))
    if found.measured_on != here:
        raise InputError(
            f"{asked} was measured on {_told(found.measured_on)}, and this is {_told(here)}: compare on the same data"
        )
    return Baseline(path, found.metric.value)


def _told(own: MeasuredOn) -> str:
    keywords = f" with {', '.join(own.metric_arg)}" if own.metric_arg else ""
    return f"{own.samples} samples of {own.data}{keywords}"
