"""The tables of a recipe: the reports of its steps by the variables of its matrix, as text, Markdown, CSV and JSON.

What a table does not list, a seed for example, is averaged: mean and sample standard deviation, with the least and the
greatest value in CSV and JSON.
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
    """Rows of text by column, in the order of the steps; `records` has every cell as numbers.

    `failures` are the gates and proofs that failed on what stands in it, in cells with a dagger.
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
    """The recipe's tables of `results`: dicts of command, values, report and failure, as `jobs.execute` returns them.

    Raises InputError for a metric that no report has.
    """
    return [_table(recipe, table, results) for table in recipe.tables]


def as_csv(tables: Sequence[Table]) -> str:
    """A line for every cell of every table: its table, its row's variables, the column, and the numbers."""
    records = [{"table": table.title, **record} for table in tables for record in table.records]
    names = dict.fromkeys(key for record in records for key in record if key not in NUMBERS)
    out = io.StringIO()
    writer = csv.DictWriter(out, [*names, *NUMBERS], restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({**record, "values": " ".join(map(str, record["values"]))})
    return out.getvalue()


DAGGER = "†"
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
            if metric not in result["report"]:
                raise unknown(f"metric of {recipe.path}", metric, result["report"])
            head = title if column is None else f"{label(result['values'][column])} {title}".strip()
            cells.setdefault(row, {}).setdefault(head, []).append(result["report"][metric])
            if result.get("failed"):
                failures[row, head] = result["failed"]
    heads = list(dict.fromkeys(head for own in cells.values() for head in own))
    rows = [
        dict(zip(names, row, strict=True))
        | {
            head: f"{_cell(own[head])}{f' {DAGGER}' if (row, head) in failures else ''}" if head in own else "-"
            for head in heads
        }
        for row, own in cells.items()
    ]
    records = [
        dict(zip(names, row, strict=True)) | {"column": head} | _numbers(values)
        for row, own in cells.items()
        for head, values in own.items()
    ]
    return Table(table.get("title", ""), rows, records, tuple(dict.fromkeys(failures.values())))


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _numbers(values: Sequence[Any]) -> dict[str, Any]:
    """Count, mean, sample standard deviation (of two and more), least and greatest; texts have a count alone."""
    out: dict[str, Any] = {"n": len(values), "mean": None, "sd": None, "least": None, "greatest": None}
    if _are_numbers(values):
        out |= {"mean": mean(values), "least": min(values), "greatest": max(values)}
        out["sd"] = stdev(values) if len(values) > 1 else None
    return {**out, "values": list(values)}


def _cell(values: Sequence[Any]) -> str:
    """One value, or the mean of several with their sample standard deviation."""
    if not _are_numbers(values):
        return ", ".join(dict.fromkeys(map(str, values)))
    shape = ".0f" if all(isinstance(value, int) for value in values) else ".2f"
    if len(values) == 1:
        return f"{values[0]:,{shape}}"
    return f"{mean(values):,{shape}} ± {stdev(values):,{shape}}"
