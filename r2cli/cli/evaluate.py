"""`r2 evaluate`: measure a checkpoint or an ONNX file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2cli import console
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config import targets
from r2cli.config.groups import Evaluation, FileGates, MeasuredImages, Told
from r2cli.config.inspection import EvaluateConfig, EvaluateSource
from r2cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from r2cli import data as datasets
    from r2cli.deploy.runtime import Recorded
    from r2cli.storage.input_spec import Given

FILES = (".onnx", ".tflite")  # which hold their own network


@command
def evaluate(
    given: EvaluateSource, images: MeasuredImages, config: EvaluateConfig, wanted: FileGates, answer: Told
) -> Report:
    """Measure how good a network is, its time for one sample on one thread, and its size."""
    import torch

    from r2cli.api import inputs
    from r2cli.cli import baseline
    from r2cli.data.metrics import report_of
    from r2cli.deploy import runtime
    from r2cli.storage.input_spec import each
    from r2cli.train import evaluation

    source = gates.source(given)
    if source.suffix in FILES:
        subject = _of_file(given, config.runtime)
    elif config.runtime is not None:
        raise InputError(f"--runtime {config.runtime} is for .onnx files, and {source} is a network of torch's")
    else:
        subject = _of_network(given, config.device)
    where, loaded = subject.device, subject.loaded
    loaded = inputs.measured_by(Evaluation(images.eval_images), wanted, loaded)
    metric, before = loaded.task.metric, baseline.read(wanted, given, loaded)
    if answer.dry_run:
        console.tell([f"would evaluate {source} on {loaded.name}"], as_json=answer.json)
        return {"command": "evaluate"}
    console.note(f"evaluating {source} on {len(loaded.test)} images")
    found = None
    with console.bar("evaluate", len(loaded.test)) as progress:
        if metric is not None:
            told = {"advance": progress.advance}
            found = evaluation.measure(subject.predict, loaded.test, where, metric, subject.outputs, **told)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = each(subject.blank, lambda tensor: tensor.to(where))
    latency = runtime.latency_ms(lambda *inputs: each(subject.one_thread(*inputs), torch.Tensor.cpu), one)
    torch.set_num_threads(threads)
    report = {
        "command": "evaluate",
        "source": source,
        "top1": None if found is None else found.top1,
        "metric": found and report_of(found.metric, found.value, others=dict(found.others)),
        "measured_on": baseline.measured_on(given, loaded),
        "images": len(loaded.test),
        "latency_ms": latency,
        "bytes": subject.size,
        "engine": subject.engine,
        "cpu": runtime.cpu(),
    }
    speed = f"{latency:.2f} ms an image ({subject.engine}{', 1 thread' if where.type == 'cpu' else ''})"
    measured = "accuracy not measured" if found is None else f"{found} of {len(loaded.test)} images"
    summary = f"{source}: {measured}, {speed}, {subject.size:,} bytes"
    console.tell([summary, *gates.unreadable(loaded.test.unreadable)], as_json=answer.json)
    gates.judge(report, wanted, size=subject.size, baseline=before)
    gates.require(report)
    return report


@dataclass(frozen=True)
class Subject:
    """What is measured: a function from inputs to outputs, the same on one thread, and its size in bytes.

    `outputs` are the names of what it gives, and `blank` is one sample of zeros.
    """

    predict: "Callable[..., Given]"
    one_thread: "Callable[..., Given]"
    device: "torch.device"
    loaded: "datasets.Data"
    engine: str
    size: int
    outputs: "Sequence[str]"
    blank: "Given"


def _of_file(given: EvaluateSource, name: str | None) -> Subject:
    """Return an ONNX file, run by the runtime `name`, or a .tflite file, run by LiteRT.

    Raises InputError for a file that takes no images or has other classes, and for a runtime that is unknown or not
    installed.
    """
    import torch

    from r2cli.api import data_notes, inputs

    source = gates.source(given)
    if given.model is not None:
        raise InputError(f"{source} needs no --model: such a file holds its own network")
    every, one, shown, made = _opened(source, name)
    if made is None:
        network, loaded = inputs.load(given, tell=console.note)
        outputs, blank = network.outputs, network.input.blank(1)
    else:
        loaded = inputs.load_data(given, given.data, default=made.data, spec=made.input, known=made.class_names)
        loaded = inputs.fitting(str(source), made.input, made.class_names, loaded)
        for line in data_notes.told_of_data(str(source), made.input, loaded):
            console.note(line)
        outputs, blank = made.outputs, made.input.blank(1)
    return Subject(every, one, torch.device("cpu"), loaded, shown, source.stat().st_size, outputs, blank)


def _opened(source: Path, name: str | None) -> "tuple[Callable[..., Any], Callable[..., Any], str, Recorded | None]":
    """A file in its runtime, with all threads and with one; the runtime's name, and what a file of r2's records."""
    if source.suffix == ".tflite":
        if name not in (None, "tflite"):
            raise InputError(f"--runtime {name} is for .onnx files: {source} runs in LiteRT")
        targets.require_installed("tflite")
        from r2cli.deploy import tflite_run

        recorded = tflite_run.recorded(source)
        return tflite_run.runner(source), tflite_run.runner(source, 1), "LiteRT", recorded
    from r2cli.deploy import engines, runtime

    made = runtime.recorded(source) if runtime.is_ours(source) else None
    engine = engines.named(name or "onnxruntime")
    every, one = (engines.runner(engine, source, threads) for threads in (0, 1))
    return every, one, engine.shown, made


def _of_network(given: EvaluateSource, device: str) -> Subject:
    """Return a checkpoint, or a network with weights that r2 did not write, run by torch."""
    import torch

    from r2cli import models
    from r2cli.api import inputs
    from r2cli.calibration import deployed
    from r2cli.train import loop

    made, loaded = inputs.load(given, tell=console.note)
    where = loop.device(device)
    network = deployed.network(made).to(where)
    if said := models.told_of_batches(network):
        console.note(said)
    predict = torch.inference_mode()(network)
    if given.pretrained:
        size = sum(tensor.nbytes for tensor in made.floats.values())
    else:
        size = gates.source(given).stat().st_size
    return Subject(predict, predict, where, loaded, f"torch on {where}", size, made.outputs, made.input.blank(1))
