"""The tables of a recipe: numbers from the reports of its steps, by the variables of its matrix.

They are written as text, Markdown, CSV and JSON. A cell is the mean over the variables that the table does not list,
such as seeds, with the sample standard deviation. CSV and JSON also have the least and the greatest value.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from r2cli.errors import unknown
from r2cli.workflow.recipe import Recipe, label, require_complete


@dataclass(frozen=True)
class Table:
    """Rows of texts by column, in the order of the steps. `records` has the numbers of every cell.

    `failures` are the gates and proofs that steps failed. The cells of these steps have a dagger.
    """

    title: str
    rows: Sequence[Mapping[str, str]]
    records: Sequence[Mapping[str, Any]] = ()
    failures: Sequence[str] = ()

    def markdown(self) -> str:
        head = list(self.rows[0]) if self.rows else []
        lines = [f"**{self.title}**", "", _line(head), "|---" * len(head) + "|"]
        notes = ["", *(f"{DAGGER} {failure}" for failure in self.failures)] if self.failures else []
        return "\n".join([*lines, *(_line(row.values()) for row in self.rows), *notes, ""])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables(recipe: Recipe, results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the tables of a recipe. `results` are those of `runner.execute`: command, values, report and failure.

    Raises InputError for a metric that a report does not have.
    """
    return [_table(recipe, table, results) for table in recipe.tables]


def as_csv(tables: Sequence[Table]) -> str:
    """Return CSV with a line for every cell of every table: the table, the variables of the row, column and numbers."""
    records = [{"table": table.title, **record} for table in tables for record in table.records]
    names = dict.fromkeys(key for record in records for key in record if key not in NUMBERS)
    out = io.StringIO()
    writer = csv.DictWriter(out, [*names, *NUMBERS], restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({**record, "values": " ".join(map(str, record["values"]))})
    return out.getvalue()


DAGGER = "†"
METRIC = "{metric}"  # in the title of a column: what was measured, and its unit
NUMBERS = ("n", "mean", "sd", "least", "greatest", "values")


def _table(recipe: Recipe, table: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Table:
    require_complete(recipe, table)
    names, column = table["rows"], table.get("column")
    needed = {*names, *([column] if column else [])}
    cells: dict[tuple[str, ...], dict[str, list[Any]]] = {}
    failures: dict[tuple[tuple[str, ...], str], str] = {}
    for result in results:
        if result["command"] != table["run"] or not needed <= result["values"].keys():
            continue
        row = tuple(label(result["values"][name]) for name in names)
        for title, metric in table["metrics"].items():
            found = _found(result["report"], metric)
            if found is None:
                raise unknown(f"metric of {recipe.path}", metric, result["report"])
            title = title.replace(METRIC, _metric(result["report"]))
            head = title if column is None else f"{label(result['values'][column])} {title}".strip()
            cells.setdefault(row, {}).setdefault(head, []).append(found[0])
            if result.get("failed"):
                failures[row, head] = result["failed"]
    heads = list(dict.fromkeys(head for columns in cells.values() for head in columns))  # each once, in order
    rows = [
        dict(zip(names, row, strict=True))
        | {
            head: f"{_cell(columns[head])}{f' {DAGGER}' if (row, head) in failures else ''}" if head in columns else "-"
            for head in heads
        }
        for row, columns in cells.items()
    ]
    records = [
        dict(zip(names, row, strict=True)) | {"column": head} | _numbers(values)
        for row, columns in cells.items()
        for head, values in columns.items()
    ]
    return Table(table.get("title", ""), rows, records, tuple(dict.fromkeys(failures.values())))


def _metric(report: Any) -> str:
    """What a report measured, with its unit: 'mIoU', 'PSNR dB', 'top-1 %'."""
    own = report.get("metric") or {}
    return f"{own.get('label', 'metric')} {own.get('unit', '')}".strip()


def _found(report: Any, metric: str) -> tuple[Any] | None:
    """The value of `metric`, or of 'metric.value' in a report within; None where there is none.

    A metric that was not measured has the value None.
    """
    name, _, rest = metric.partition(".")
    if not isinstance(report, Mapping) or name not in report:
        return None
    unmeasured = name == "metric" and report[name] is None
    return (report[name],) if not rest or unmeasured else _found(report[name], rest)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _numbers(values: Sequence[Any]) -> dict[str, Any]:
    """Return count, mean, sample standard deviation (of two or more), least and greatest. Texts have only a count."""
    out: dict[str, Any] = {"n": len(values), "mean": None, "sd": None, "least": None, "greatest": None}
    if _are_numbers(values):
        out |= {"mean": mean(values), "least": min(values), "greatest": max(values)}
        out["sd"] = stdev(values) if len(values) > 1 else None
    return {**out, "values": list(values)}


def _cell(values: Sequence[Any]) -> str:
    """Write one value, or the mean of several with their sample standard deviation."""
    if not _are_numbers(values):
        return ", ".join(dict.fromkeys("-" if value is None else str(value) for value in values))
    shape = ".0f" if all(isinstance(value, int) for value in values) else ".2f"
    if len(values) == 1:
        return f"{values[0]:,{shape}}"
    return f"{mean(values):,{shape}} ± {stdev(values):,{shape}}"
