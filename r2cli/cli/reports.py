"""`--report KIND:FILE`: how a command ended, for the pages of a pipeline. A kind is one entry of KINDS."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from time import perf_counter
from typing import Any
from xml.etree import ElementTree

from r2cli import console
from r2cli.cli import outcome
from r2cli.cli.outcome import Outcome
from r2cli.config.values import REPORTS, STEP, report_kind

_within: ContextVar[bool] = ContextVar("_within", default=False)


@contextmanager
def written(asked: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Write the reports `asked` when the block ends, whichever way. The block adds its own report to what it is given.

    Raises R2Error where a file cannot be written. A step of `r2 run` writes none: the run does.
    """
    found: dict[str, Any] = {}
    if _within.get() or os.environ.get(STEP):
        yield found
        return
    token, started = _within.set(True), perf_counter()
    code, message = 0, ""
    try:
        yield found
    except Exception as error:
        message, code = outcome.told(error, sys.argv[1:])
        found.update(getattr(error, "report", None) or {})
        raise
    finally:
        _within.reset(token)
        ended = Outcome(" ".join(sys.argv[1:]), code, message, found, perf_counter() - started)
        for each in asked:
            kind, path = report_kind(each)
            KINDS[kind](ended, path)


def cases(ended: Outcome) -> list[tuple[str, str]]:
    """What was checked (checks of the proof, gates, steps of a recipe), each with what is wrong with it, or ''."""
    report = ended.report
    checked = (*report.get("checks", ()), *report.get("gates", ()))
    found = [(each["name"], "" if each["passed"] else each["detail"]) for each in checked]
    steps = enumerate(report.get("results", ()), 1)
    return found + [(f"step {number}: r2 {each['command']}", each["failed"] or "") for number, each in steps]


def unsaid(ended: Outcome) -> str:
    """The error of the command, where none of its cases says it, or ''."""
    return "" if ended.code == 1 and any(wrong for _, wrong in cases(ended)) else ended.message


def junit(ended: Outcome, path: Path | None) -> None:
    """A file of JUnit's XML: a test case for the command, and one for each check, gate and step."""
    assert path is not None
    tests = [(f"r2 {ended.line}", unsaid(ended)), *cases(ended)]
    counted = {"tests": str(len(tests)), "time": f"{ended.seconds:.3f}"}
    counted |= {"failures": str(sum(bool(wrong) for _, wrong in tests[1:])), "errors": str(int(bool(tests[0][1])))}
    root = ElementTree.Element("testsuites", counted)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "r2", **counted})
    for number, (name, wrong) in enumerate(tests):
        seconds = {"time": f"{ended.seconds:.3f}"} if not number else {}
        case = ElementTree.SubElement(suite, "testcase", {"classname": "r2", "name": console.escaped(name), **seconds})
        if wrong:
            ElementTree.SubElement(case, "failure" if number else "error", {"message": console.escaped(wrong)})
    _write(path, ElementTree.tostring(root, "utf-8", xml_declaration=True))


def markdown(ended: Outcome, path: Path | None) -> None:
    """A page of Markdown: what came out, and a table of all that was checked."""
    assert path is not None
    _write(path, as_markdown(ended).encode())


def github(ended: Outcome, path: Path | None) -> None:
    """Annotations for GitHub Actions on standard error, and the page of Markdown in the summary of its step."""
    summary = path or Path(os.environ.get("GITHUB_STEP_SUMMARY", ""))
    if summary.name:
        with summary.open("a", encoding="utf-8") as file:
            file.write(as_markdown(ended) + "\n")
    for name, wrong in cases(ended):
        if wrong:
            console.command_of_github("error", f"r2: {name}", wrong)
    if message := unsaid(ended):
        console.command_of_github("error", "r2", message)


def as_markdown(ended: Outcome) -> str:
    """The page: a heading that says whether it passed, the numbers, a table of what was checked, the error."""
    verdict = {0: "passed", 1: "failed"}.get(ended.code, "stopped")
    lines = [f"### r2 {cell(ended.report.get('command', ended.line))}: {verdict}", "", f"`r2 {cell(ended.line)}`", ""]
    facts = _facts(ended.report)
    if facts:
        lines += ["| | |", "| --- | --- |", *(f"| {name} | {cell(value)} |" for name, value in facts), ""]
    if found := cases(ended):
        lines += ["| check | |", "| --- | --- |"]
        lines += [f"| {cell(name)} | {f'❌ {cell(wrong)}' if wrong else '✅'} |" for name, wrong in found]
        lines.append("")
    return "\n".join([*lines, *([cell(ended.message), ""] if ended.message else [])])


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What people look for first, by name, where the report has it."""
    shown: dict[str, Callable[[Any], str]] = {
        "output": str,
        "metric": lambda metric: metric["shown"],
        "bytes": "{:,}".format,
        "bits_per_weight": "{:.2f}".format,
        "latency_ratio": "{:.2f} of float32".format,
        "latency_ms": "{:.2f} ms an image".format,
        "seconds": "{:.1f}".format,
    }
    return [
        (name.replace("_", " "), tell(report[name])) for name, tell in shown.items() if report.get(name) is not None
    ]


def cell(text: object) -> str:
    """A text that stays in its cell of a table, and does nothing to a terminal."""
    return console.escaped(" ".join(str(text).split())).replace("|", "\\|").replace("`", "'")


def _write(path: Path, content: bytes) -> None:
    from r2cli.storage.atomic import write_atomically

    write_atomically(path, content)


KINDS: Mapping[str, Callable[[Outcome, Path | None], None]] = {"junit": junit, "markdown": markdown, "github": github}
assert KINDS.keys() == set(REPORTS)
