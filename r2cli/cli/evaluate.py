"""`r2 evaluate`: accuracy, latency and size of a checkpoint or an ONNX file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from r2cli import console
from r2cli.cli import gates
from r2cli.options import DataName, Device, DryRun, Json, MaxBytes, MinAccuracy, Workers


def evaluate(
    source: Annotated[Path, typer.Argument(help="A checkpoint, float or quantized, or an .onnx file of r2's.")] = Path(
        "model.safetensors"
    ),
    data: DataName = None,
    device: Device = "auto",
    workers: Workers = 2,
    min_accuracy: MinAccuracy = None,
    max_bytes: MaxBytes = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> dict[str, Any]:
    """Measure top-1, latency of one image on one thread, and size."""
    import torch

    from r2cli import attach, checkpoint, train, verify
    from r2cli import data as datasets
    from r2cli.cli import deliver

    is_onnx = source.suffix == ".onnx"
    if is_onnx:
        spec = verify.input_spec(source)
        loaded = datasets.load(data or verify.data_name(source), spec=spec, workers=workers)
        deliver.require_classes(str(source), verify.class_names(source), loaded)
        one_thread = verify.runner(source, threads=1)
        predict, where = verify.runner(source), torch.device("cpu")
        engine = "ONNX Runtime"
    else:
        made = checkpoint.load(source)
        loaded, where = deliver.source_of(made, data, workers), train.device(device)
        predict = one_thread = torch.inference_mode()(attach.network(made).to(where))
        spec, engine = made.input, f"torch on {where}"
    if dry_run:
        console.emit({"command": "evaluate"}, as_json=json, lines=[f"would evaluate {source} on {loaded.name}"])
        return {}
    console.note(f"evaluating {source} on {len(loaded.test)} images")
    with console.bar("evaluate", len(loaded.test)) as progress:
        top1 = train.top1(predict, loaded.test, where, advance=progress.advance)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    latency = verify.latency_ms(lambda image: one_thread(image.to(where)).cpu(), spec.shape)
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
    console.emit(report, as_json=json, lines=[summary, *gates.unreadable(loaded.test.unreadable)])
    gates.require(min_accuracy=min_accuracy, top1=top1, max_bytes=max_bytes, size=size)
    return report
