"""`r2 palettize`: weights as indices into small tables of centroids, by k-means or by training."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from r2cli import console, values
from r2cli.cli import gates
from r2cli.errors import InputError
from r2cli.options import (
    DEFAULT_SOURCE,
    ActRange,
    DataDir,
    DataName,
    DryRun,
    Embeddings,
    Json,
    MaxBytes,
    MaxDrop,
    Mean,
    MinAccuracy,
    ModelArg,
    ModelName,
    Optimizer,
    Overwrite,
    Precision,
    Seed,
    Size,
    Source,
    Std,
    Stem,
    Weights,
    Workers,
    _option,
    resume_state,
)
from r2cli.options import Device as DeviceName

if TYPE_CHECKING:
    from r2cli import data as datasets
    from r2cli.palettize import palettes as worker
    from r2cli.train.hooks import Epoch

METHODS = ("kmeans", "dkm", "shared")
TRAINING = "Training (dkm, shared)"
LR = {"dkm": 0.02, "shared": 0.02}
ADAMW_LR = LUT_LR = 1e-4
WARM_UP = 0.05  # of the steps
RATIO = 0.3  # of dkm: a network with small weights, as after soft-min-max, is thrown out without it
CLIP, CLIP_FEW, FEW = 1.0, 5.0, 2  # of dkm; where many centroids share a small layer's weights its softmax is steep


def palettize(
    source: Source = None,
    bits: Annotated[int, _option("--bits", help="2**BITS centroids a table, 1 to 8.", check=values.bits("--bits"))] = 4,
    dim: Annotated[
        int,
        _option(
            "--dim",
            help="Values of a centroid, 1, 2, 4 or 8: BITS / DIM bits a weight.",
            check=values.number_of("--dim", 1, 2, 4, 8),
        ),
    ] = 1,
    method: Annotated[
        str | None,
        _option(
            "--method",
            help="kmeans: no training; dkm: through soft assignments; shared: k-means' codes, centroids trained. "
            "(default: dkm; kmeans for a file without a network of r2's)",
            check=values.one_of("method", *METHODS),
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        _option(
            "--group-size",
            help="Output channels that share a table; a layer that it does not divide has one. (default: all)",
            min=1,
        ),
    ] = None,
    lut_bits: Annotated[
        int,
        _option(
            "--lut-bits",
            help="8: tables of int8 with a scale; 32: of float32.",
            check=values.number_of("--lut-bits", 8, 32),
        ),
    ] = 8,
    act_bits: Annotated[
        str | None,
        _option(
            "--act-bits",
            help="8 to 4, or none to leave activations float. (default: 8; none with --lut-bits 32)",
            check=values.act_bits,
        ),
    ] = None,
    act_range: ActRange = None,
    keep: Annotated[
        list[str] | None,
        _option(
            "--keep",
            help="PATTERN=BITS or PATTERN=BITSxDIM: another palette for some layers; repeatable.",
            check=values.keep_forms,
        ),
    ] = None,
    embeddings: Embeddings = False,
    weigh: Annotated[
        str,
        _option(
            "--weigh",
            help="kmeans: none, or fisher: by squared gradients on training images.",
            check=values.one_of("--weigh", "none", "fisher"),
        ),
    ] = "none",
    epochs: Annotated[int, _option("--epochs", help="Passes over the data.", min=1, panel=TRAINING)] = 8,
    hard_epochs: Annotated[
        int, _option("--hard-epochs", help="Of them, at the end, with hard assignments.", min=0, panel=TRAINING)
    ] = 2,
    temperature: Annotated[
        float,
        _option(
            "--temperature",
            help="dkm: of the first epoch, as a share of each layer's mean squared distance; it falls to a tenth.",
            min=0.001,
            panel=TRAINING,
        ),
    ] = 0.5,
    iterations: Annotated[
        int, _option("--iterations", help="dkm: k-means iterations a step.", min=1, max=20, panel=TRAINING)
    ] = 3,
    batch_size: Annotated[int, _option("--batch-size", help="Images a step.", min=2, panel=TRAINING)] = 64,
    optimizer: Optimizer = None,
    lr: Annotated[
        float | None, _option("--lr", help="Peak learning rate. (default: 0.02; adamw 1e-4)", min=0, panel=TRAINING)
    ] = None,
    lut_lr: Annotated[
        float, _option("--lut-lr", help="shared: peak rate of the centroids.", min=0, panel=TRAINING)
    ] = LUT_LR,
    momentum: Annotated[float, _option("--momentum", help="Nesterov momentum.", min=0, max=1, panel=TRAINING)] = 0.9,
    clip_grad: Annotated[
        float | None,
        _option(
            "--clip-grad",
            help="Most length of the gradient, all weights together. 0: any. (default: dkm's is 1; 5 at 1 and 2 bits)",
            min=0,
            panel=TRAINING,
        ),
    ] = None,
    clip_ratio: Annotated[
        float | None,
        _option(
            "--clip-ratio",
            help="Most length of a layer's gradient, as a share of its weights'. 0: any. (default: dkm's is 0.3)",
            min=0,
            panel=TRAINING,
        ),
    ] = None,
    weight_decay: Annotated[float, _option("--weight-decay", help="L2 on weights.", min=0, panel=TRAINING)] = 4e-5,
    precision: Precision = "float32",
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
            help="Training images for BatchNorm's statistics and activation ranges; 0: none. (default: 512)",
            min=0,
        ),
    ] = None,
    seed: Seed = 0,
    device: DeviceName = "auto",
    workers: Workers = 2,
    output: Annotated[
        Path | None,
        _option(
            "--output", "-o", help="The checkpoint; .onnx goes beside it. (default: SOURCE.b4d1-dkm...)", panel="Output"
        ),
    ] = None,
    resume: Annotated[bool, _option("--resume", help="Go on where a stopped run left off.", panel="Output")] = False,
    overwrite: Overwrite = False,
    min_accuracy: MinAccuracy = None,
    max_drop: MaxDrop = None,
    max_bytes: MaxBytes = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> dict[str, Any]:
    """Compress to tables of centroids: codes, an ONNX file, and its proof."""
    started = perf_counter()
    kept = values.keep_forms(keep or [], dim)
    acts = _act_bits(act_bits, lut_bits)
    source = gates.source(source, weights, DEFAULT_SOURCE)
    is_network = weights is not None or _is_checkpoint(source)
    method = method or ("dkm" if is_network else "kmeans")
    suffix = f"b{bits}d{dim}{f'g{group_size}' if group_size else ''}-{method}"
    output = output or gates.beside(source, f"{suffix}.safetensors")
    gates.require_output(output, ".safetensors", source=source)
    onnx, state = output.with_suffix(".onnx"), resume_state(output)
    gates.require_free([output, onnx] if is_network else [output], overwrite=overwrite)
    _require_consistent(method, is_network=is_network, resume=resume, weigh=weigh, soft=epochs - hard_epochs)

    from r2cli import data as datasets
    from r2cli.calibration import deployed, observers
    from r2cli.cli import deliver, subject
    from r2cli.palettize import palettes as worker
    from r2cli.palettize import soft_training
    from r2cli.train import distributed, loop
    from r2cli.train.loop import ADAMW, TrainSettings

    act_range = act_range or observers.usual(acts or 8)
    settings = worker.PaletteSettings(method, bits, dim, group_size, lut_bits, acts, kept, act_range, embeddings)
    if not is_network:
        return _file(source, output, settings, seed=seed, dry_run=dry_run, max_bytes=max_bytes, json=json)
    if method != "kmeans":
        gates.require_no_state(state, resume=resume, overwrite=overwrite)
    network = subject.Network(model, weights, model_arg, stem)
    made, loaded = subject.load(source, network, subject.Images(data, data_dir, workers, size, mean, std))
    where, there = loop.device(device), len(loaded.train)
    calibration = subject.calibration(calibration, loaded)
    if not calibration and (acts or method != "kmeans" or weigh != "none"):
        raise InputError("--calibration 0 leaves no images to work on: give --method kmeans and --act-bits none")
    options: dict[str, Any] = {**settings.__dict__, "calibration": calibration, "seed": seed}
    training = None
    if method == "kmeans":
        options["weigh"] = weigh
    else:
        steps_by = gates.optimizer(optimizer, is_text=made.input.is_text)
        usual = ADAMW_LR if steps_by == ADAMW else LR[method]
        if method == "dkm":
            clip_ratio = RATIO if clip_ratio is None else clip_ratio
            clip_grad = (CLIP_FEW if bits <= FEW else CLIP) if clip_grad is None else clip_grad
        training = TrainSettings(
            *(epochs, batch_size, usual if lr is None else lr, momentum, weight_decay, WARM_UP, 0.0, 0.0, seed),
            clip_grad=clip_grad,
            clip_ratio=clip_ratio,
            precision=loop.precision(precision, where),
            optimizer=steps_by,
        )
        options |= {**training.__dict__, "hard_epochs": hard_epochs, "temperature": temperature}
        options |= {"iterations": iterations, "lut_lr": lut_lr}
    if dry_run:
        lines = [f"would palettize {source} ({made.model.name}) to {suffix} -> {output}, {onnx}"]
        console.tell(lines, as_json=json)
        return {"command": "palettize", "options": options}
    loop.seed_everything(seed)
    before = loop.evaluate(deployed.network(made).to(where), loaded.test, where)
    console.note(f"palettizing {source} to {suffix}: float top-1 {before:.2f} %")

    def batches() -> "Iterator[datasets.Batch]":
        return datasets.calibration(loaded, calibration, where, seed)

    work = worker.PaletteTask(made, settings, batches if calibration else None, where, seed)
    epochs_told: list[dict[str, float]] = []
    if training is None:
        with console.bar("k-means", sum(tensor.ndim > 1 for tensor in made.floats.values())) as progress:
            coded, rows = worker.by_kmeans(work, weigh=weigh == "fisher", advance=progress.advance)
    else:
        schedule = soft_training.Schedule(epochs, hard_epochs if method == "dkm" else 0, temperature, temperature / 10)
        plan = soft_training.PalettePlan(training, schedule, iterations, lut_lr)
        total = epochs * loop.steps_per_epoch(there, batch_size)
        with gates.told_of(state), console.bar(method, total) as progress:

            def told(epoch: "Epoch", gap: float) -> None:
                epochs_told.append({**epoch.__dict__, "gap": gap})
                progress.line(_line(epoch, epochs, gap))

            following = soft_training.PaletteRunControl(state, resume, progress.advance, told)
            coded, rows = soft_training.by_training(work, plan, loaded, following)
    distributed.end_others()
    order = deliver.Order("palettize", output, options, data, started, json, min_accuracy, max_drop, max_bytes, state)
    more = {**_sizes(rows), "layers": [row.__dict__ for row in rows], "epochs": epochs_told}
    notes = _ended_higher(epochs_told)
    return deliver.compressed(
        order, coded, loaded, before, original=made, more=more, table=lambda _: _layers(rows), notes=notes
    )


def _require_consistent(method: str, *, is_network: bool, resume: bool, weigh: str, soft: int) -> None:
    """Raises InputError for options that do not go together."""
    if not is_network and (method != "kmeans" or weigh != "none"):
        what = f"--method {method}" if method != "kmeans" else f"--weigh {weigh}"
        raise InputError(f"{what} needs a network and its data, and the file has none: give --method kmeans alone")
    if method == "kmeans" and resume:
        raise InputError("--resume belongs to training: --method kmeans has nothing to resume")
    if method != "kmeans" and weigh != "none":
        raise InputError(f"--weigh {weigh} belongs to --method kmeans")
    if method == "dkm" and soft < 1:
        raise InputError("--hard-epochs leaves none of --epochs soft: give fewer")


def _file(
    source: Path,
    output: Path,
    settings: "worker.PaletteSettings",
    *,
    seed: int,
    dry_run: bool,
    max_bytes: int | None,
    json: bool,
) -> dict[str, Any]:
    """Palettize a file of weights without a network."""
    from r2cli.palettize import weight_files

    started = perf_counter()
    size = weight_files.total(source)
    options = {**settings.__dict__, "seed": seed}
    if dry_run:
        lines = [f"would palettize {source}, {size:,} bytes of tensors -> {output}"]
        console.tell(lines, as_json=json)
        return {"command": "palettize", "options": options}
    with console.bar("palettize", size, of_bytes=True) as progress:
        rows = weight_files.write(source, output, settings, seed=seed, advance=progress.advance)
    written = output.stat().st_size
    report = {
        "command": "palettize",
        "checkpoint": output,
        "bytes": written,
        **_sizes(rows),
        "layers": [row.__dict__ for row in rows],
        "options": options,
        "seconds": round(perf_counter() - started, 1),
    }
    summary = f"{output}: {written:,} bytes of {size:,}, {report['bits_per_weight']:.2f} bits a weight with tables"
    console.tell([_layers(rows), summary, console.next_step(f"r2 analyze {output}")], as_json=json)
    gates.require(report, max_bytes=max_bytes, size=written)
    return report


def _ended_higher(epochs: Sequence[Mapping[str, float]]) -> list[str]:
    """A line where training ended with more loss than its first epoch had: steps were too large, most likely."""
    if not epochs or epochs[-1]["loss"] <= epochs[0]["loss"]:
        return []
    first, last = epochs[0]["loss"], epochs[-1]["loss"]
    return [f"the last epoch's loss is above the first one's ({last:.2f}, {first:.2f}): lower --clip-ratio or --lr"]


def _line(epoch: "Epoch", epochs: int, gap: float) -> str:
    return (
        f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}  loss {epoch.loss:.4f}  "
        f"hard top-1 {epoch.top1:.2f} %  soft to hard {100 * gap:.1f} %  {epoch.images_per_second:,.0f} images/s"
    )


def _is_checkpoint(source: Path) -> bool:
    """Whether `source` is a network of r2's; what is not there is taken for one, and reported as one."""
    from r2cli.storage import stream

    if not source.is_file():
        return not source.is_dir()
    return source.suffix != ".json" and "r2" in stream.metadata(source)


def _act_bits(text: str | None, lut_bits: int) -> int | None:
    if text is None:
        return 8 if lut_bits == 8 else None
    bits = values.act_bits(text)
    if bits and lut_bits != 8:
        raise InputError(f"--act-bits {bits} needs integer weights: give --lut-bits 8, or --act-bits none")
    return bits


def _sizes(rows: "Sequence[worker.PalettizedLayer]") -> dict[str, float]:
    """Bits a weight over all layers, tables and scales included, as they are and entropy-coded."""
    count = sum(math.prod(row.shape) for row in rows)
    size = sum(row.size * math.prod(row.shape) for row in rows) / count
    coded = sum(row.entropy_coded * math.prod(row.shape) for row in rows) / count
    return {"bits_per_weight": size, "entropy_coded_bits": coded}


def _layers(rows: "Sequence[worker.PalettizedLayer]") -> Any:
    cells = [
        (
            row.layer,
            "x".join(map(str, row.shape)),
            f"{row.bits}/{row.dim}",
            row.tables,
            f"{row.size:.2f}",
            f"{row.entropy_coded:.2f}",
            f"{row.sqnr:.1f}",
            row.note,
        )
        for row in rows
    ]
    return console.table(("layer", "shape", "bits/dim", "tables", "size", "Huffman", "dB", "note"), cells)
