"""`r2 ptq`: quantize a trained network without training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from r2cli import console, values
from r2cli.cli import gates
from r2cli.errors import InputError
from r2cli.options import (
    DEFAULT_SOURCE,
    ActBits,
    ActRange,
    DataDir,
    DataName,
    Device,
    DryRun,
    Embeddings,
    Json,
    MaxBytes,
    MaxDrop,
    Mean,
    MinAccuracy,
    ModelArg,
    ModelName,
    Overwrite,
    Seed,
    Size,
    Source,
    Std,
    Stem,
    Weights,
    Workers,
    _option,
)

if TYPE_CHECKING:
    import torch

    from r2cli import data as datasets
    from r2cli.ptq import auto
    from r2cli.ptq import post_training as worker
    from r2cli.storage import checkpoint


def _parts(text: str) -> tuple[str, ...]:
    """`--parts` as names. Raises InputError for what does not exist."""
    names = () if text == "none" else tuple(text.split(","))
    for name in names:
        values.one_of("--parts", "equalize", "absorb", "correct")(name)
    return names


def ptq(
    source: Source = None,
    weight_bits: Annotated[
        int | None,
        _option(
            "--weight-bits",
            help="8 to 1; 1 is two levels without a zero. (default: 8)",
            check=values.bits("--weight-bits"),
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        _option(
            "--target-bits",
            help="Mixed precision: bits a weight on average, as 3.2.",
            check=values.bits("--target-bits"),
        ),
    ] = None,
    target_bytes: Annotated[
        int | None, _option("--target-bytes", help="Mixed precision: bytes of all codes and scales.", min=1)
    ] = None,
    sensitivity: Annotated[
        str,
        _option(
            "--sensitivity",
            help="What mixed precision goes by: hessian, or sqnr, which needs no data.",
            check=values.one_of("--sensitivity", "hessian", "sqnr"),
        ),
    ] = "hessian",
    act_bits: ActBits = "8",
    method: Annotated[
        str,
        _option(
            "--method",
            help="none: to the nearest level; dfq: channels equalized, biases corrected, without data unless --data or "
            "--calibration is given; adaround: by each layer's output; brecq: by each block's, with scales and biases; "
            "auto: the best of these.",
            check=values.one_of("method", "none", "dfq", "adaround", "brecq", "auto"),
        ),
    ] = "none",
    granularity: Annotated[
        str | None,
        _option(
            "--granularity",
            help="channel; tensor: one grid after folding BatchNorm; unfolded: one grid on the weights as trained, "
            "with BatchNorm in per-channel scales. (default: channel; auto tries unfolded too)",
            check=values.one_of("--granularity", "channel", "tensor", "unfolded"),
        ),
    ] = None,
    weight_range: Annotated[
        str | None,
        _option(
            "--weight-range",
            help="Of weights: minmax, percentile[:99.99] or mse. (default: minmax; brecq's: mse to 4 bits, and mixed)",
            check=values.range_rule("--weight-range", *values.WEIGHT_RANGES),
        ),
    ] = None,
    symmetric: Annotated[
        bool, _option("--symmetric/--asymmetric", help="Weight grids with zero point 0, or with one of their own.")
    ] = True,
    act_range: ActRange = None,
    keep: Annotated[
        list[str] | None,
        _option("--keep", help="PATTERN=BITS: other weight bits for some layers; repeatable.", check=values.keep),
    ] = None,
    embeddings: Embeddings = False,
    parts: Annotated[
        str | None,
        _option(
            "--parts",
            help="What of dfq comes before rounding: equalize,absorb,correct or some, or none.",
            check=_parts,
        ),
    ] = None,
    relu6: Annotated[
        str,
        _option(
            "--relu6",
            help="dfq: clip: the same function, a bound for each channel; relu: ReLU in its place.",
            check=values.one_of("--relu6", "clip", "relu"),
        ),
    ] = "clip",
    data: DataName = None,
    data_dir: DataDir = None,
    model: ModelName = None,
    weights: Weights = None,
    model_arg: ModelArg = None,
    stem: Stem = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    calibration: Annotated[
        int | None,
        _option(
            "--calibration",
            help="Training images that set activation ranges; 0: none, BatchNorm's statistics do. "
            "(default: 512; 0 for dfq without --data)",
            min=0,
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    workers: Workers = 2,
    output: Annotated[
        Path | None,
        _option(
            "--output",
            "-o",
            help="The checkpoint; .onnx goes beside it. (default: SOURCE.w4a8-none...)",
            panel="Output",
        ),
    ] = None,
    overwrite: Overwrite = False,
    min_accuracy: MinAccuracy = None,
    max_drop: MaxDrop = None,
    max_bytes: MaxBytes = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> dict[str, Any]:
    """Quantize without training: codes, an ONNX file, and its proof."""
    wanted = _require_one_target(weight_bits, target_bits, target_bytes)
    weight_bits = 8 if weight_bits is None else weight_bits
    acts, kept = values.act_bits(act_bits), values.keep(keep or [])
    source = gates.source(source, weights, DEFAULT_SOURCE)
    grid = "" if granularity in (None, "channel") else f"-{granularity}"
    suffix = f"w{wanted}{f'a{acts}' if acts else ''}-{method}{grid}"
    output = output or gates.beside(source, f"{suffix}.safetensors")
    gates.require_output(output, ".safetensors", source=source)
    onnx = output.with_suffix(".onnx")
    gates.require_free([output, onnx], overwrite=overwrite)
    if parts is not None and method == "auto":
        raise InputError("--method auto tries which --parts help: leave one of the two out")
    prepared = None if parts is None else _parts(parts)
    without = calibration == 0 or (method == "dfq" and data is None and calibration is None)
    if without and act_range is not None:
        raise InputError(f"--act-range {act_range} looks at images: give --calibration, or leave it to the BatchNorms")

    from r2cli import data as datasets
    from r2cli.calibration import deployed, observers
    from r2cli.cli import deliver, subject
    from r2cli.ptq import auto, mixed_precision, weight_grids
    from r2cli.ptq import post_training as worker
    from r2cli.train import loop

    act_range = act_range or observers.usual(acts or 8)
    narrow = weight_bits if target_bits is None and target_bytes is None else min(mixed_precision.WIDTHS)
    asked, weight_range = weight_range, weight_range or weight_grids.usual(method, narrow)
    started = perf_counter()
    network = subject.Network(model, weights, model_arg, stem)
    images = subject.Images(data, data_dir, workers, size, mean, std)
    made, loaded = subject.load(source, network, images, needed=not without)
    measured = loaded.name != subject.NOISE
    if not measured and (min_accuracy is not None or max_drop is not None):
        raise InputError("--min-accuracy and --max-drop need images: give --data")
    settings = worker.PtqSettings(
        method, weight_bits, acts, granularity or "channel", kept, prepared, relu6, weight_range, act_range, symmetric
    )
    settings = replace(settings, embeddings=embeddings)
    if dry_run:
        options = {**settings.__dict__, "calibration": calibration, "seed": seed}
        if target_bits or target_bytes:
            options |= {"target_bits": target_bits, "target_bytes": target_bytes, "sensitivity": sensitivity}
        lines = [f"would quantize {source} ({made.model.name}) to {suffix} -> {output}, {onnx}"]
        console.tell(lines, as_json=json)
        return {"command": "ptq", "options": options}
    where = loop.device(device)
    calibration = 0 if without else subject.calibration(calibration, loaded)
    batches = datasets.Again(lambda: datasets.calibration(loaded, calibration, where, seed))
    choice: list[worker.ChosenBits] = []
    if target_bits or target_bytes:
        target = worker.BitTarget(target_bits, target_bytes, sensitivity)
        plain = replace(settings, method="none") if method == "auto" else settings
        plain, choice = worker.choose_bits(made, plain, target, batches, where, seed)
        settings = replace(plain, method=method)
    before = loop.evaluate(deployed.network(made).to(where), loaded.test, where) if measured else None
    note = f"float top-1 {before:.2f} %" if before is not None else "no images, so accuracy is not measured"
    console.note(f"quantizing {source} to {suffix}: {note}")
    shown_to = None if without else datasets.Again(lambda: (batch for batch, _ in batches))
    trials: list[auto.Trial] = []
    if method == "auto":
        if shown_to is None:
            raise InputError("--method auto needs images: give --calibration, or --method dfq, which needs none")
        grids, rules = (granularity,) if granularity else auto.GRIDS, (asked,) if asked else ()
        coded, rows, settings, trials = auto.choose(
            made, settings, shown_to, where, grids=grids, rules=rules, told=_tried
        )
    else:
        with console.bar(method, sum(tensor.ndim > 1 for tensor in made.floats.values())) as progress:
            coded, rows = worker.quantize(made, settings, shown_to, where, progress.advance)
    # What was chosen is recorded, and not what was asked for: the same choice is the same bytes, however it came.
    options = {**settings.__dict__, "calibration": calibration, "seed": seed}
    more: dict[str, Any] = {
        "ranges": "batchnorm" if without else "calibration",
        "layers": [row.__dict__ for row in rows],
        "mixed": [row.__dict__ for row in choice],
        "trials": [trial.__dict__ for trial in trials],
    }
    if not measured:
        more |= {"top1": None, "torch_top1": None}
    notes = [*([_again(settings, rows)] if choice else []), *([_chosen(trials)] if trials else [])]
    if method == "dfq" or not calibration:
        notes.append(_origin(calibration))
    if method == "dfq" and relu6 == "relu":
        more["relu_top1"] = relu = _top1_with_relu(made, loaded, where) if measured else None
        notes += [f"ReLU6 became ReLU: float top-1 {relu:.2f} %, {before:.2f} before"] if measured else []
    order = deliver.Order("ptq", output, options, data, started, json, min_accuracy, max_drop, max_bytes)
    return deliver.compressed(
        order,
        coded,
        loaded,
        before,
        original=made,
        more=more,
        table=lambda report: _layers(rows, report["float_operations"]),
        notes=notes,
    )


def _top1_with_relu(made: "checkpoint.Checkpoint", loaded: "datasets.Data", where: "torch.device") -> float:
    """Top-1 of the float network with ReLU in the place of ReLU6, in percent."""
    from r2cli.calibration import deployed
    from r2cli.graph.read import trace
    from r2cli.ptq import equalize
    from r2cli.train import loop

    net = trace(deployed.network(made))
    equalize.without_relu6(net)
    return loop.evaluate(net.to(where), loaded.test, where)


def _origin(calibration: int) -> str:
    shown = f"{calibration} images" if calibration else "the BatchNorms' statistics, without an image"
    return f"ranges and corrections: from {shown}"


def _require_one_target(weight_bits: int | None, bits: float | None, size: int | None) -> str:
    """How the output's name tells the weights' bits. Raises InputError for more than one wish."""
    asked = {"--weight-bits": weight_bits, "--target-bits": bits, "--target-bytes": size}
    given = [f"{option} {value}" for option, value in asked.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are two wishes: give one of them")
    return f"{bits:g}" if bits else f"{size}B" if size else str(8 if weight_bits is None else weight_bits)


def _tried(trial: "auto.Trial") -> None:
    console.note(f"{trial}: outputs at {trial.sqnr:.1f} dB, {trial.divergence:.2g} nats, {trial.seconds:.1f} s")


def _chosen(trials: "Sequence[auto.Trial]") -> str:
    """What was chosen and why, as options that give the same bytes."""
    best = min(trials, key=lambda trial: trial.divergence)
    plain = min((trial for trial in trials if trial.method == "none"), key=lambda trial: trial.divergence)
    rounded = f", {plain.divergence:.2g} ({plain.sqnr:.1f}) with nearest rounding at its best"
    against = "" if plain is best else rounded
    parts = ",".join(best.parts) or "none"
    again = f"--method {best.method} --granularity {best.granularity} --weight-range {best.weight_range}"
    return (
        f"chosen of {len(trials)} trials, for probabilities {best.divergence:.2g} nats (outputs {best.sqnr:.1f} dB) "
        f"from the float network's{against}; the same again: {again} --parts {parts}"
    )


def _again(settings: "worker.PtqSettings", rows: "Sequence[worker.QuantizedLayer]") -> str:
    """The choice of mixed precision as options that give the same bytes."""
    from r2cli.ptq import weight_grids

    count = sum(math.prod(row.shape) for row in rows)
    mean = sum(row.bits * math.prod(row.shape) for row in rows) / count
    kept = "".join(f" --keep {name}={bits}" for name, bits in settings.keep.items())
    if settings.weight_range != weight_grids.usual(settings.method, settings.weight_bits):
        kept += f" --weight-range {settings.weight_range}"
    return f"{mean:.2f} bits a weight on average; the same again: --weight-bits {settings.weight_bits}{kept}"


def _layers(rows: Sequence[Any], left: Sequence[Mapping[str, Any]]) -> Any:
    """A row for every layer, and one for every kind of operation that stays float, with the reason."""
    cells = [
        (row.layer, "x".join(map(str, row.shape)), row.bits, row.grid, f"{row.sqnr:.1f}", row.note) for row in rows
    ]
    kinds: dict[tuple[str, str], list[str]] = {}
    for each in left:
        kinds.setdefault((each["kind"], each["reason"]), []).append(each["node"])
    for (kind, reason), nodes in kinds.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        cells.append((f"{nodes[0]}{more}", "", "", "float", "", f"{kind}: {reason}"))
    return console.table(("layer", "shape", "bits", "grid", "dB", "note"), cells)
