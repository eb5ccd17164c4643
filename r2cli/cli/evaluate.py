"""`r2 evaluate`: measure a checkpoint or an ONNX file."""

from typing import TYPE_CHECKING, Any

from r2cli import console
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config.groups import DEFAULT_SOURCE, FileGates, MeasuredImages, Told
from r2cli.config.inspection import EvaluateConfig, EvaluateSource
from r2cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from r2cli import data as datasets
    from r2cli.storage.checkpoint import InputSpec


@command
def evaluate(
    given: EvaluateSource, images: MeasuredImages, config: EvaluateConfig, wanted: FileGates, answer: Told
) -> Report:
    """Measure top-1, latency of one image on one thread, and size."""
    import torch

    from r2cli import data as datasets
    from r2cli.deploy import runtime
    from r2cli.train import loop

    source = gates.source(given.source, given.weights, DEFAULT_SOURCE)
    subject = _of_onnx(given) if source.suffix == ".onnx" else _of_network(given, config.device)
    predict, one_thread, where, spec, loaded, engine = subject
    if images.eval_images is not None:
        loaded = datasets.with_test_images(loaded, images.eval_images)
    if answer.dry_run:
        console.tell([f"would evaluate {source} on {loaded.name}"], as_json=answer.json)
        return {"command": "evaluate"}
    console.note(f"evaluating {source} on {len(loaded.test)} images")
    with console.bar("evaluate", len(loaded.test)) as progress:
        top1 = loop.top1(predict, loaded.test, where, advance=progress.advance)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    latency = runtime.latency_ms(lambda image: one_thread(image.to(where)).cpu(), spec.blank(1))
    torch.set_num_threads(threads)
    size = source.stat().st_size
    report = {
        "command": "evaluate",
        "source": source,
        "top1": top1,
        "images": len(loaded.test),
        "latency_ms": latency,
        "bytes": size,
        "engine": engine,
        "cpu": runtime.cpu(),
    }
    speed = f"{latency:.2f} ms an image ({engine}{', 1 thread' if where.type == 'cpu' else ''})"
    summary = f"{source}: top-1 {top1:.2f} % of {len(loaded.test)} images, {speed}, {size:,} bytes"
    console.tell([summary, *gates.unreadable(loaded.test.unreadable)], as_json=answer.json)
    gates.require(report, wanted, top1=top1, size=size)
    return report


# The predictor, the predictor on one thread, the device, the preprocessing, the data, and the name of the engine.
Subject = tuple["Callable[[Tensor], Tensor]", Any, "torch.device", "InputSpec", "datasets.Data", str]


def _of_onnx(given: EvaluateSource) -> Subject:
    """Return an ONNX file, run by ONNX Runtime. Raises InputError for a file that r2 did not write or other classes."""
    import torch

    from r2cli.api import inputs
    from r2cli.deploy import runtime

    source = gates.source(given.source, given.weights, DEFAULT_SOURCE)
    if given.model is not None:
        raise InputError(f"{source} needs no --model: an ONNX file holds its own network")
    spec = runtime.input_spec(source)
    loaded = inputs.load_data(given, given.data, default=runtime.data_name(source), spec=spec)
    inputs.require_classes(str(source), runtime.class_names(source), loaded)
    one_thread = runtime.runner(source, threads=1)
    return runtime.runner(source), one_thread, torch.device("cpu"), spec, loaded, "ONNX Runtime"


def _of_network(given: EvaluateSource, device: str) -> Subject:
    """Return a checkpoint, or a network with weights that r2 did not write, run by torch."""
    import torch

    from r2cli.api import inputs
    from r2cli.calibration import deployed
    from r2cli.train import loop

    made, loaded = inputs.load(given, tell=console.note)
    where = loop.device(device)
    predict = torch.inference_mode()(deployed.network(made).to(where))
    return predict, predict, where, made.input, loaded, f"torch on {where}"
