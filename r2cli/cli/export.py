"""`r2 export`: a checkpoint as an ONNX file, proved."""

from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

from r2cli import console
from r2cli.cli import gates
from r2cli.options import (
    DEFAULT_SOURCE,
    DataDir,
    DataName,
    DryRun,
    Json,
    MaxBytes,
    Mean,
    MinAccuracy,
    ModelArg,
    ModelName,
    Overwrite,
    Size,
    Source,
    Std,
    Stem,
    Weights,
    Workers,
    _option,
)


def export(
    source: Source = None,
    data: DataName = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    weights: Weights = None,
    model_arg: ModelArg = None,
    stem: Stem = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    workers: Workers = 2,
    output: Annotated[
        Path | None, _option("--output", "-o", help="The file. (default: SOURCE with .onnx)", panel="Output")
    ] = None,
    overwrite: Overwrite = False,
    min_accuracy: MinAccuracy = None,
    max_bytes: MaxBytes = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> dict[str, Any]:
    """Write a checkpoint, float or quantized, as ONNX, and prove the file."""
    source = gates.source(source, weights, DEFAULT_SOURCE)
    output = output or gates.beside(source, "onnx")
    gates.require_output(output, ".onnx", source=source)
    gates.require_free([output], overwrite=overwrite)

    from r2cli.cli import deliver, subject

    started = perf_counter()
    network = subject.Network(model, weights, model_arg, stem)
    made, loaded = subject.load(source, network, subject.Images(data, data_dir, workers, size, mean, std))
    if dry_run:
        console.tell([f"would export {source} -> {output}"], as_json=json)
        return {"command": "export"}
    proof, report = deliver.to_onnx(made, output, loaded, what=str(source))
    report = {"command": "export", **report, "seconds": round(perf_counter() - started, 1)}
    kind = f"{report['bits_per_weight']:.2f} bits a weight" if made.coded else "float32"
    summary = f"{output}: top-1 {report['top1']:.2f} % in ONNX Runtime, {report['bytes']:,} bytes, {kind}"
    follow = console.next_step(f"r2 evaluate {output}")
    console.tell([*deliver.told(proof, report), summary, follow], as_json=json)
    deliver.require(proof, report, min_accuracy=min_accuracy, max_bytes=max_bytes)
    return report
