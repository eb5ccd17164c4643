"""docs/tour.ipynb runs from top to bottom, and says what the outputs that it comes with say."""

import re
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def told(notebook: Any) -> list[list[str]]:
    """What each cell printed, its numbers left out, and the kinds of its pictures."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [
        [re.sub(r"\s*[\d.,]+", " #", one.text) if one.output_type == "stream" else sorted(one.data)[0] for one in each]
        for each in outputs
    ]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shipped, run = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(run, timeout=300, kernel_name="python3", resources=where, coalesce_streams=True).execute()
    assert told(run) == told(shipped)
    assert sum(kind == "image/png" for cell in told(run) for kind in cell) == 4
    assert NOTEBOOK.stat().st_size < 300_000
