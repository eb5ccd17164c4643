"""`r2 evaluate`: measure a checkpoint or an ONNX file."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from r2cli import console
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config.groups import Evaluation, FileGates, MeasuredImages, Told
from r2cli.config.inspection import EvaluateConfig, EvaluateSource
from r2cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from r2cli import data as datasets
    from r2cli.storage.input_spec import Given


@command
def evaluate(
    given: EvaluateSource, images: MeasuredImages, config: EvaluateConfig, wanted: FileGates, answer: Told
) -> Report:
    """Measure how good a network is, its time for one sample on one thread, and its size."""
    import torch

    from r2cli.api import inputs
    from r2cli.data.metrics import report_of
    from r2cli.deploy import runtime
    from r2cli.storage.input_spec import each
    from r2cli.train import evaluation

    source = gates.source(given)
    subject = _of_onnx(given) if source.suffix == ".onnx" else _of_network(given, config.device)
    where, loaded = subject.device, subject.loaded
    loaded = inputs.measured_by(Evaluation(images.eval_images), wanted, loaded)
    metric = loaded.task.metric
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
    gates.require(report, wanted, size=subject.size)
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


def _of_onnx(given: EvaluateSource) -> Subject:
    """Return an ONNX file, run by ONNX Runtime. Raises InputError for one that takes no images or has other classes."""
    import torch

    from r2cli.api import inputs
    from r2cli.deploy import runtime

    source = gates.source(given)
    if given.model is not None:
        raise InputError(f"{source} needs no --model: an ONNX file holds its own network")
    if runtime.is_ours(source):
        made = runtime.recorded(source)
        loaded = inputs.load_data(given, given.data, default=made.data, spec=made.input)
        loaded = inputs.fitting(str(source), made.input, made.class_names, loaded)
        outputs, blank = made.outputs, made.input.blank(1)
    else:
        network, loaded = inputs.load(given, tell=console.note)
        outputs, blank = network.outputs, network.input.blank(1)
    one_thread = runtime.runner(source, threads=1)
    size = source.stat().st_size
    more = "ONNX Runtime", size, outputs, blank
    return Subject(runtime.runner(source), one_thread, torch.device("cpu"), loaded, *more)


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
    return Subject(predict, predict, where, loaded, f"torch on {where}", size, made.outputs, made.input.blank(1))
