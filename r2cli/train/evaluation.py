"""How good a network is on the test half of its data: by the task's metric, of torch or of an ONNX session alike."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from r2cli import data
from r2cli.calibration import deployed
from r2cli.data import metrics
from r2cli.data.metrics import TOP1, Measured, Metric
from r2cli.data.splits import ALL_ROWS
from r2cli.storage.checkpoint import LOGITS, Checkpoint
from r2cli.storage.input_spec import Given, count, each, places
from r2cli.train import distributed
from r2cli.train.reporter import SILENT, Reporter

EVALUATION_BATCH = 256


def evaluate(model: nn.Module, split: data.Split, device: torch.device) -> float:
    """Return the top-1 accuracy of `model` on `split`, in percent."""
    return measure(model.eval(), split, device, TOP1).value


def of_task(
    model: nn.Module,
    source: data.Data,
    device: torch.device,
    *,
    advance: Callable[[int], None] = lambda images: None,
) -> Measured | None:
    """What the task's metric says of `model`; None where it is not measured."""
    if not source.measured or source.task.metric is None:
        return None
    return measure(model.eval(), source.test, device, source.task.metric, source.task.outputs, advance=advance)


def of_float(
    checkpoint: Checkpoint, source: data.Data, device: torch.device, reporter: Reporter = SILENT
) -> Measured | None:
    """What the task's metric says of a checkpoint's network, with a progress bar; None where it is not measured."""
    if not source.measured or source.task.metric is None:
        return None
    with reporter.bar("evaluate float", len(source.test)) as progress:
        model, named = deployed.network(checkpoint).to(device), source.giving(checkpoint.outputs)
        return of_task(model, named, device, advance=progress.advance)


@torch.inference_mode()
def measure(
    predict: Callable[..., Given],
    split: data.Split,
    device: torch.device,
    metric: Metric,
    names: Sequence[str] = LOGITS,
    *,
    advance: Callable[[int], None] = lambda images: None,
) -> Measured:
    """What `metric` says, on `split`, of a function from inputs by place to outputs, which are called `names`.

    Raises InputError where the metric does not take them.
    """
    meter = metric.start()
    # A mean adds up over processes; any other metric sees all samples in each of them.
    share = distributed.share() if isinstance(meter, metrics.Share) else ALL_ROWS
    size = data.batch_that_fits(split, EVALUATION_BATCH)
    for inputs, target in split.batches(size, device, share=share):
        outputs = each(predict(*places(inputs)), lambda one: one.to(device))
        metrics.updated(metric, meter, metrics.by_name(outputs, names), target)
        advance(count(inputs))
    if isinstance(meter, metrics.Share):
        own: list[Any] = [torch.tensor(one, device=device, dtype=torch.float64) for one in (meter.total, meter.count)]
        total, seen = distributed.add_up(*own)
        meter.total, meter.count = float(total), int(seen)
    return metrics.value_of(metric, meter)
