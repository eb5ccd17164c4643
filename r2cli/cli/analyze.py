"""`r2 analyze`: how wide the weights are, which are outliers, and what that costs at few bits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r2cli import console, values
from r2cli.cli import gates
from r2cli.errors import CheckFailed, InputError
from r2cli.options import GATES, OUTPUT, DryRun, Json, Overwrite, _option

if TYPE_CHECKING:
    from r2cli.analyze.analysis import Analysis, AnalyzedLayer

ENDINGS = (".png", ".svg", ".pdf", ".html")
SORTS = ("sqnr", "range", "outliers", "kurtosis", "size", "name")
VIEWS = ("both", "trained", "folded")
BITS = (8, 4, 3, 2, 1)  # what is measured
LIMIT = 12  # lines of a table, 8 where there are several


def _floor(text: str) -> tuple[float, int]:
    """--min-sqnr DB@BITS. Raises InputError for anything else."""
    decibel, _, bits = text.partition("@")
    try:
        found = float(decibel), int(bits)
    except ValueError as error:
        raise InputError(f"--min-sqnr {text} is not DB@BITS, for example 20@4") from error
    if not math.isfinite(found[0]):
        raise InputError(f"--min-sqnr {text} would stop nothing or everything: give a number of dB")
    values.number_of("--min-sqnr …@", *BITS, what="not measured")(found[1])
    return found


def analyze(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Weights: any .safetensors file, an index of shards or their directory, or .onnx; several are "
            "compared. (default: model.safetensors)",
            show_default=False,
        ),
    ] = None,
    only: Annotated[list[str] | None, _option("--only", help="Layers by name pattern; repeatable.")] = None,
    view: Annotated[
        str,
        _option(
            "--view",
            help="Of a checkpoint with BatchNorm: trained, folded, or both.",
            check=values.one_of("--view", *VIEWS),
        ),
    ] = "both",
    outlier_sigma: Annotated[
        float,
        _option(
            "--outlier-sigma",
            help="An outlier is further from the mean than this many standard deviations; of normal weights 4 leaves "
            "1 in 16,000 there.",
            min=0.1,
        ),
    ] = 4.0,
    bits: Annotated[
        int,
        _option(
            "--bits",
            help="8, 4, 3, 2 or 1: what the table and its order are about.",
            check=values.number_of("--bits", *BITS, what="not measured"),
        ),
    ] = 4,
    granularity: Annotated[
        str,
        _option(
            "--granularity",
            help="tensor or channel: the grids that --sort sqnr and --min-sqnr look at.",
            check=values.one_of("--granularity", "tensor", "channel"),
        ),
    ] = "tensor",
    sort: Annotated[
        str | None,
        _option(
            "--sort",
            help="sqnr, range, outliers, kurtosis, size or name. (default: sqnr; quick: range)",
            check=values.one_of("--sort", *SORTS),
        ),
    ] = None,
    limit: Annotated[
        int | None,
        _option("--limit", help="Layers in a table or picture; 0: all. (default: 12, several tables 8)", min=0),
    ] = None,
    everything: Annotated[bool, _option("--all", help="Biases and other vectors too.")] = False,
    quick: Annotated[bool, _option("--quick", help="Ranges and outliers only: no SQNR, no channels.")] = False,
    threads: Annotated[
        int | None, _option("--threads", help="Tensors side by side. (default: one a core)", min=1)
    ] = None,
    output: Annotated[
        list[Path] | None,
        _option("--output", "-o", help="A picture (.png, .svg, .pdf) or a page (.html); repeatable.", panel=OUTPUT),
    ] = None,
    overwrite: Overwrite = False,
    max_range_ratio: Annotated[
        float | None, _option("--max-range-ratio", help="Most max|w| / std of a layer.", panel=GATES, min=0)
    ] = None,
    max_outliers: Annotated[
        float | None, _option("--max-outliers", help="Most of a layer that is outliers, 0 to 1.", panel=GATES, min=0)
    ] = None,
    min_sqnr: Annotated[
        str | None,
        _option("--min-sqnr", help="DB@BITS: least SQNR of a layer on min-max grids.", panel=GATES, check=_floor),
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> dict[str, Any]:
    """Show every layer's range, outliers and loss at few bits: no data, no model code."""
    sources, outputs = files or [Path("model.safetensors")], output or []
    _require_outputs(outputs, sources)
    gates.require_free(outputs, overwrite=overwrite)
    sort = sort or ("range" if quick else "sqnr")
    if min_sqnr is not None and quick:
        raise InputError("--min-sqnr needs what --quick leaves out: give one of them")
    floor = None if min_sqnr is None else _floor(min_sqnr)

    import os

    from r2cli.analyze import analysis as worker
    from r2cli.analyze import figure, page, records, terminal, views
    from r2cli.analyze.advice import advice
    from r2cli.storage import checkpoint

    def order(rows: "Sequence[AnalyzedLayer]") -> "tuple[AnalyzedLayer, ...]":
        return tuple(worker.ordered(rows, sort, bits=bits, granularity=granularity))

    started = perf_counter()
    settings = worker.AnalyzeSettings(outlier_sigma, quick, everything)
    found = [each for path in sources for each in views.chosen(path, view, everything=everything)]
    layers = worker.matching([each.layers for each in found], only or [])
    total = sum(worker.total(each) for each in layers)
    if dry_run:
        told = f"would analyze {sum(map(len, layers))} layers, {total:,} bytes, of {', '.join(map(str, sources))}"
        console.tell([told], as_json=json)
        return {"command": "analyze"}
    sheets = []
    with console.bar("analyze", total, of_bytes=True) as progress:
        for each, chosen in zip(found, layers, strict=True):
            rows = worker.rows(chosen, settings, threads=threads or os.cpu_count() or 1, advance=progress.advance)
            sheets.append(worker.Analysis(str(each.file), each.name, rows, each.others, each.note))
    line = advice(_worst(sheets, bits), bits)
    made = []
    for path in outputs:
        if path.suffix == ".html":
            shown_first = {"bits": bits, "granularity": granularity, "sort": sort}
            made.append(page.to_bytes(sheets, shown_first, sigma=outlier_sigma, advice=line))
        else:
            ordered = [replace(each, rows=order(each.rows)) for each in sheets]
            most = LIMIT if limit is None else limit
            made.append(figure.to_bytes(ordered, path.suffix[1:], limit=most, bits=bits, sigma=outlier_sigma))
    for path, content in zip(outputs, made, strict=True):
        checkpoint.write_atomically(path, content)
    report = {
        "command": "analyze",
        "sigma": outlier_sigma,
        "files": [records.sheet(sheet) for sheet in sheets],
        "advice": line,
        "outputs": outputs,
        "seconds": round(perf_counter() - started, 2),
    }
    shown: list[console.Line] = []
    many = limit if limit is not None else LIMIT if len(sheets) == 1 else 8
    for sheet in sheets:
        shown += [*terminal.lines(sheet, order(sheet.rows), limit=many, bits=bits, sigma=outlier_sigma), ""]
    ready = next((each.file for each in found if each.is_float_checkpoint), None)
    follow = _next(sources, ready if outputs else None, bits, written=bool(outputs))
    shown += [
        *terminal.comparison(sheets, bits),
        line,
        *(f"wrote {path}" for path in outputs),
        console.next_step(follow),
    ]
    console.tell(shown, as_json=json)
    _require(report, sheets, max_range_ratio, max_outliers, floor, granularity)
    return report


def _require_outputs(outputs: Sequence[Path], sources: Sequence[Path]) -> None:
    for path in outputs:
        if path.is_dir() or not path.name:
            raise InputError(f"{path} is a directory: name a file with --output")
        if path.suffix not in ENDINGS:
            raise InputError(f"--output {path} must end in one of {', '.join(ENDINGS)}")
        if path.resolve() in [source.resolve() for source in sources]:
            raise InputError(f"--output {path} is a source itself: give another name")


def _next(sources: Sequence[Path], checkpoint: Path | None, bits: int, *, written: bool) -> str:
    """The next command: look at a page; then quantize a checkpoint, or hold the line for another file."""
    if checkpoint is not None:
        return f"r2 ptq {checkpoint} --weight-bits {bits}"
    return f"r2 analyze {' '.join(map(str, sources))} {f'--min-sqnr 15@{bits}' if written else '-o report.html'}"


def _worst(sheets: "Sequence[Analysis]", bits: int) -> "list[AnalyzedLayer]":
    """The rows of the first file's last view, which is the one that is deployed, the worst first."""
    from r2cli.analyze import analysis as worker

    last = [sheet for sheet in sheets if sheet.file == sheets[0].file][-1]
    return worker.ordered(last.rows, "sqnr" if any(row.losses for row in last.rows) else "range", bits=bits)


def _require(
    report: Mapping[str, Any],
    sheets: "Sequence[Analysis]",
    max_range_ratio: float | None,
    max_outliers: float | None,
    floor: tuple[float, int] | None,
    granularity: str,
) -> None:
    """Raises CheckFailed naming every layer that a gate stops; one with NaN or infinities is stopped by each."""
    failed = []
    for sheet in sheets:
        for row in sheet.rows:
            why = []
            if row.nan or row.inf:
                why.append(f"{row.nan} NaN and {row.inf} infinite weights")
            if max_range_ratio is not None and (row.ratio or 0) > max_range_ratio:
                why.append(f"max|w|/std {row.ratio:.2f} > {max_range_ratio:g}")
            if max_outliers is not None and row.outlier_share > max_outliers:
                why.append(f"outliers {row.outlier_share:.2g} > {max_outliers:g}")
            measured = row.sqnr(floor[1], granularity) if floor else None
            if floor and measured is not None and measured < floor[0]:
                why.append(f"{measured:.1f} dB < {floor[0]:g} at {floor[1]} bits")
            if why:
                failed.append(f"{sheet.title}: {row.name} ({', '.join(why)})")
    gated = max_range_ratio is not None or max_outliers is not None or floor is not None
    if gated and failed:
        raise CheckFailed("gate failed: " + "; ".join(failed), report)
