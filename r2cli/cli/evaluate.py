"""`r2 evaluate`: accuracy, latency and size of a checkpoint or an ONNX file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from r2cli import console
from r2cli.cli import gates
from r2cli.errors import InputError
from r2cli.options import (
    DEFAULT_SOURCE,
    DataDir,
    DataName,
    Device,
    DryRun,
    Json,
    MaxBytes,
    Mean,
    MinAccuracy,
    ModelArg,
    ModelName,
    Size,
    Std,
    Stem,
    Weights,
    Workers,
)


def evaluate(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="A checkpoint, float or quantized, or an .onnx file of r2's. (default: model.safetensors)",
            show_default=False,
        ),
    ] = None,
    data: DataName = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    weights: Weights = None,
    model_arg: ModelArg = None,
    stem: Stem = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = "auto",
    workers: Workers = 2,
    min_accuracy: MinAccuracy = None,
    max_bytes: MaxBytes = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> dict[str, Any]:
    """Measure top-1, latency of one image on one thread, and size."""
    import torch

    from r2cli.calibration import deployed
    from r2cli.cli import subject
    from r2cli.deploy import verify
    from r2cli.train import loop

    source = gates.source(source, weights, DEFAULT_SOURCE)
    images = subject.Images(data, data_dir, workers, size, mean, std)
    is_onnx = source.suffix == ".onnx"
    if is_onnx:
        if model is not None:
            raise InputError(f"{source} needs no --model: an ONNX file holds its own network")
        spec = verify.input_spec(source)
        loaded = images.load(verify.data_name(source), spec)
        subject.require_classes(str(source), verify.class_names(source), loaded)
        one_thread = verify.runner(source, threads=1)
        predict, where = verify.runner(source), torch.device("cpu")
        engine = "ONNX Runtime"
    else:
        made, loaded = subject.load(source, subject.Network(model, weights, model_arg, stem), images)
        where = loop.device(device)
        predict = one_thread = torch.inference_mode()(deployed.network(made).to(where))
        spec, engine = made.input, f"torch on {where}"
    if dry_run:
        console.tell([f"would evaluate {source} on {loaded.name}"], as_json=json)
        return {"command": "evaluate"}
    console.note(f"evaluating {source} on {len(loaded.test)} images")
    with console.bar("evaluate", len(loaded.test)) as progress:
        top1 = loop.top1(predict, loaded.test, where, advance=progress.advance)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    latency = verify.latency_ms(lambda image: one_thread(image.to(where)).cpu(), spec.blank(1))
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
        "cpu": verify.cpu(),
    }
    speed = f"{latency:.2f} ms an image ({engine}{', 1 thread' if where.type == 'cpu' else ''})"
    summary = f"{source}: top-1 {top1:.2f} % of {len(loaded.test)} images, {speed}, {size:,} bytes"
    console.tell([summary, *gates.unreadable(loaded.test.unreadable)], as_json=json)
    gates.require(report, min_accuracy=min_accuracy, top1=top1, max_bytes=max_bytes, size=size)
    return report
