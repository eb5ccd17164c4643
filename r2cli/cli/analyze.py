"""`r2 analyze`: how wide the weights are, which are outliers, and what that costs at few bits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from r2cli import console
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config import values
from r2cli.config.groups import DEFAULT_SOURCE
from r2cli.config.inspection import AnalyzeConfig, AnalyzeFiles, AnalyzeOutput, WeightGates
from r2cli.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from r2cli.analysis.layer_table import Analysis, AnalyzedLayer

ENDINGS = (".png", ".svg", ".pdf", ".html")
LIMIT, LIMIT_OF_MANY = 12, 8  # lines of a single table, and of each of several tables


@command
def analyze(given: AnalyzeFiles, config: AnalyzeConfig, wanted: WeightGates, written: AnalyzeOutput) -> Report:
    """Show every layer's range, outliers and loss at few bits: no data, no model code."""
    started = perf_counter()
    sources, outputs = list(given.files) or [DEFAULT_SOURCE], list(written.output)
    _require_outputs(outputs, sources)
    gates.require_free(outputs, overwrite=written.overwrite)
    if wanted.min_sqnr is not None and config.quick:
        raise InputError("--min-sqnr cannot go with --quick: leave one out")

    from r2cli.analysis import layer_table, records, views
    from r2cli.analysis.advice import advice
    from r2cli.storage.atomic import write_atomically

    found = [view for path in sources for view in views.chosen(path, config.view, everything=config.everything)]
    layers = layer_table.matching([view.layers for view in found], config.only)
    total = sum(map(layer_table.total, layers))
    if written.dry_run:
        told = f"would analyze {sum(map(len, layers))} layers, {total:,} bytes, of {', '.join(map(str, sources))}"
        console.tell([told], as_json=written.json)
        return {"command": "analyze"}
    with console.bar("analyze", total, of_bytes=True) as progress:
        sheets = views.measured(found, layers, config, progress.advance)
    line = advice(_worst(sheets, config.bits), config.bits)
    for path, content in [(path, _drawn(path, sheets, config, line)) for path in outputs]:
        write_atomically(path, content)
    report = {
        "command": "analyze",
        "sigma": config.outlier_sigma,
        "files": [records.sheet(sheet) for sheet in sheets],
        "advice": line,
        "outputs": outputs,
        "seconds": round(perf_counter() - started, 2),
    }
    ready = next((view.file for view in found if view.is_float_checkpoint), None) if outputs else None
    follow = _next(sources, ready, config.bits, written=bool(outputs))
    ending: list[console.Line] = [line, *(f"wrote {path}" for path in outputs), console.next_step(*follow)]
    console.tell([*_shown(sheets, config), *ending], as_json=written.json)
    _require(report, sheets, wanted, config.granularity)
    return report


def _ordered(sheet: "Analysis", config: AnalyzeConfig) -> "tuple[AnalyzedLayer, ...]":
    """Return the rows of `sheet` in the order that was asked for."""
    from r2cli.analysis import layer_table

    return tuple(layer_table.ordered(sheet.rows, config.order, bits=config.bits, granularity=config.granularity))


def _drawn(path: Path, sheets: "Sequence[Analysis]", config: AnalyzeConfig, advice: str) -> bytes:
    """Return the bytes of the picture or page that the ending of `path` asks for."""
    from r2cli.analysis import figure, page

    if path.suffix == ".html":
        first = {"bits": config.bits, "granularity": config.granularity, "sort": config.order}
        return page.to_bytes(sheets, first, sigma=config.outlier_sigma, advice=advice)
    ordered = [replace(sheet, rows=_ordered(sheet, config)) for sheet in sheets]
    limit = LIMIT if config.limit is None else config.limit
    return figure.to_bytes(ordered, path.suffix[1:], limit=limit, bits=config.bits, sigma=config.outlier_sigma)


def _shown(sheets: "Sequence[Analysis]", config: AnalyzeConfig) -> list[console.Line]:
    """Return a table for each of `sheets`, and a comparison if there are several."""
    from r2cli.analysis import terminal

    usual = LIMIT if len(sheets) == 1 else LIMIT_OF_MANY
    limit, shown = usual if config.limit is None else config.limit, list[console.Line]()
    for sheet in sheets:
        rows = _ordered(sheet, config)
        shown += [*terminal.lines(sheet, rows, limit=limit, bits=config.bits, sigma=config.outlier_sigma), ""]
    return [*shown, *terminal.comparison(sheets, config.bits)]


def _require_outputs(outputs: Sequence[Path], sources: Sequence[Path]) -> None:
    """Raise InputError for an output that is a directory or a source, or has an ending that is not known."""
    for path in outputs:
        if path.is_dir() or not path.name:
            raise InputError(f"{path} is a directory: name a file with --output")
        if path.suffix not in ENDINGS:
            raise InputError(f"--output {path} must end in one of {', '.join(ENDINGS)}")
        if path.resolve() in [source.resolve() for source in sources]:
            raise InputError(f"--output {path} is a source itself: give another name")


def _next(sources: Sequence[Path], checkpoint: Path | None, bits: int, *, written: bool) -> list[str]:
    """The next command: write a page; or after that, quantize a checkpoint or set a bound for another file."""
    if checkpoint is not None:
        return ["r2", "ptq", str(checkpoint), "--weight-bits", str(bits)]
    return ["r2", "analyze", *map(str, sources), *(["--min-sqnr", f"15@{bits}"] if written else ["-o", "report.html"])]


def _worst(sheets: "Sequence[Analysis]", bits: int) -> "list[AnalyzedLayer]":
    """Return the rows of the first file in its last view, which is the one that is deployed; the worst first."""
    from r2cli.analysis import layer_table

    last = [sheet for sheet in sheets if sheet.file == sheets[0].file][-1]
    return layer_table.ordered(last.rows, "sqnr" if any(row.losses for row in last.rows) else "range", bits=bits)


def _require(report: Report, sheets: "Sequence[Analysis]", wanted: WeightGates, granularity: str) -> None:
    """Raise CheckFailed with the name of every layer that a gate stops. Every gate stops NaN and infinite weights."""
    gated = (wanted.max_range_ratio, wanted.max_outliers, wanted.min_sqnr)
    failed = [
        f"{sheet.title}: {row.name} ({', '.join(why)})"
        for sheet in sheets
        for row in sheet.rows
        if (why := _stopped(row, wanted, granularity))
    ]
    if failed and any(gate is not None for gate in gated):
        raise CheckFailed("gate failed: " + "; ".join(failed), report)


def _stopped(row: "AnalyzedLayer", wanted: WeightGates, granularity: str) -> list[str]:
    """Return the reasons for which the gates stop a layer."""
    why = []
    if row.nan or row.inf:
        why.append(f"{row.nan} NaN and {row.inf} infinite weights")
    if wanted.max_range_ratio is not None and (row.ratio or 0) > wanted.max_range_ratio:
        why.append(f"max|w|/std {row.ratio:.2f} > {wanted.max_range_ratio:g}")
    if wanted.max_outliers is not None and row.outlier_share > wanted.max_outliers:
        why.append(f"outliers {row.outlier_share:.2g} > {wanted.max_outliers:g}")
    least, bits = values.sqnr_floor(wanted.min_sqnr) if wanted.min_sqnr else (0.0, 0)
    measured = row.sqnr(bits, granularity) if wanted.min_sqnr else None
    if measured is not None and measured < least:
        why.append(f"{measured:.1f} dB < {least:g} at {bits} bits")
    return why
