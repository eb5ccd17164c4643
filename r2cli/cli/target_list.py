"""`r2 targets`: where files can be made to run."""

from dataclasses import asdict

from r2cli import console
from r2cli.cli.command import Report, command
from r2cli.config import targets
from r2cli.config.groups import Listed
from r2cli.config.targets import Target


@command
def list_targets(answer: Listed) -> Report:
    """List where files can be made to run, what they are like, and whether r2 ran them there."""
    rows = [(row.name, row.about, _form(row), row.runs) for row in targets.ROWS]
    heads = ("--target", "runs on", "file", "run in")
    console.tell([console.table(heads, rows), "next: r2 export MODEL --target NAME"], as_json=answer.json)
    return {"command": "targets", "targets": [{**asdict(row), "opset": targets.LEAST_OPSET} for row in targets.ROWS]}


def _form(row: Target) -> str:
    """What its file is like, in a few words."""
    if not row.integers:
        return "float"
    parts = [
        "INT8" if row.signed else "UINT8",
        "zero point 0" if row.symmetric else "",
        "" if row.integer_biases else "float biases",
        "packed weights" if row.packed else "INT8 weights",
        f"batch {row.batch}" if row.batch else "",
        f"opset to {row.most_opset}" if row.most_opset < targets.MOST_OPSET else "",
    ]
    return ", ".join(filter(None, parts))
