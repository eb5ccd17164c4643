"""`r2 evaluate`: measure a checkpoint or an ONNX file."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from r2cli import console
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config.groups import FileGates, MeasuredImages, Told
from r2cli.config.inspection import EvaluateConfig, EvaluateSource
from r2cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from r2cli import data as datasets


@command
def evaluate(
    given: EvaluateSource, images: MeasuredImages, config: EvaluateConfig, wanted: FileGates, answer: Told
) -> Report:
    """Measure top-1, latency of one image on one thread, and size."""
    import torch

    from r2cli import data as datasets
    from r2cli.deploy import runtime
    from r2cli.train import evaluation

    source = gates.source(given)
    subject = _of_onnx(given) if source.suffix == ".onnx" else _of_network(given, config.device)
    where, loaded = subject.device, subject.loaded
    if images.eval_images is not None:
        loaded = datasets.with_test_images(loaded, images.eval_images)
    if answer.dry_run:
        console.tell([f"would evaluate {source} on {loaded.name}"], as_json=answer.json)
        return {"command": "evaluate"}
    console.note(f"evaluating {source} on {len(loaded.test)} images")
    with console.bar("evaluate", len(loaded.test)) as progress:
        top1 = evaluation.top1(subject.predict, loaded.test, where, advance=progress.advance)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    latency = runtime.latency_ms(lambda image: subject.one_thread(image.to(where)).cpu(), subject.loaded.input.blank(1))
    torch.set_num_threads(threads)
    report = {
        "command": "evaluate",
        "source": source,
        "top1": top1,
        "images": len(loaded.test),
        "latency_ms": latency,
        "bytes": subject.size,
        "engine": subject.engine,
        "cpu": runtime.cpu(),
    }
    speed = f"{latency:.2f} ms an image ({subject.engine}{', 1 thread' if where.type == 'cpu' else ''})"
    summary = f"{source}: top-1 {top1:.2f} % of {len(loaded.test)} images, {speed}, {subject.size:,} bytes"
    console.tell([summary, *gates.unreadable(loaded.test.unreadable)], as_json=answer.json)
    gates.require(report, wanted, top1=top1, size=subject.size)
    return report


@dataclass(frozen=True)
class Subject:
    """What is measured: a function from images to logits, the same on one thread, and its size in bytes."""

    predict: "Callable[[Tensor], Tensor]"
    one_thread: "Callable[[Tensor], Tensor]"
    device: "torch.device"
    loaded: "datasets.Data"
    engine: str
    size: int


def _of_onnx(given: EvaluateSource) -> Subject:
    """Return an ONNX file, run by ONNX Runtime. Raises InputError for a file that r2 did not write or other classes."""
    import torch

    from r2cli.api import inputs
    from r2cli.deploy import runtime

    source = gates.source(given)
    if given.model is not None:
        raise InputError(f"{source} needs no --model: an ONNX file holds its own network")
    made = runtime.recorded(source)
    loaded = inputs.load_data(given, given.data, default=made.data, spec=made.input)
    inputs.require_classes(str(source), made.class_names, loaded)
    one_thread = runtime.runner(source, threads=1)
    size = source.stat().st_size
    return Subject(runtime.runner(source), one_thread, torch.device("cpu"), loaded, "ONNX Runtime", size)


def _of_network(given: EvaluateSource, device: str) -> Subject:
    """Return a checkpoint, or a network with weights that r2 did not write, run by torch."""
    import torch

    from r2cli.api import inputs
    from r2cli.calibration import deployed
    from r2cli.train import loop

    made, loaded = inputs.load(given, tell=console.note)
    where = loop.device(device)
    predict = torch.inference_mode()(deployed.network(made).to(where))
    if given.pretrained:
        size = sum(tensor.nbytes for tensor in made.floats.values())
    else:
        size = gates.source(given).stat().st_size
    return Subject(predict, predict, where, loaded, f"torch on {where}", size)
