"""The tasks of docs/tasks.md, end to end: its commands are run as they stand there, with their gates."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from conftest import R2, ROOT

TEXT = (ROOT / "docs" / "tasks.md").read_text()
PARTS = [part for part in TEXT.split("\n## ") if "```sh" in part]
SECTIONS = {
    part.splitlines()[0]: "".join(re.findall(r"```sh\n(.*?)```", part, re.DOTALL)).splitlines() for part in PARTS
}

# What takes minutes is learned for less time here.
LESS = {"mobile.safetensors": ("--data-arg", "count=128", "--epochs", "1")}


def test_every_task_of_the_guide_has_commands_and_gates() -> None:
    assert len(SECTIONS) == 8
    for title, lines in SECTIONS.items():
        assert any("--max-drop" in line for line in lines), title


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_a_task_is_run_as_the_guide_says(
    title: str, r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    if any("Gpt" in line or "SentencePairs" in line for line in SECTIONS[title]):
        pytest.importorskip("transformers")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for line in SECTIONS[title]:
        program, *words = shlex.split(line)
        if program == "python":
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
        else:
            less = LESS.get(words[-1], ()) if words[0] == "pretrain" else ()
            ran = r2(*words, *less)
            assert program == "r2" and ran.code == 0, f"{line}\n{ran.err}"
