"""docs/ci.md: its lines are run by bash, in order and in one folder, and the Dockerfile names what is there.

`r2` on the PATH is a script that asks this process to run the command, since another would import torch for each line.
`pip` does nothing, and `docker` runs what an image would run.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import R2, ROOT

DOCUMENT = (ROOT / "docs/ci.md").read_text()
ASKING = """#!/usr/bin/env bash
printf '%s\\0' "$PWD" "$@" > "$ASK"
read -r code < "$ANSWER"
cat "$SAID"
exit "$code"
"""
DOCKER = """#!/usr/bin/env bash
case $1 in
  build) test -f "${@: -1}/Dockerfile" ;;
  run) until [ "$1" = r2 ]; do shift; done; exec "$@" ;;
esac
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


class Shell:
    """bash in a folder, whose `r2` is the one of this process."""

    def __init__(self, folder: Path, r2: R2) -> None:
        self.folder, self.r2, self.ran = folder, r2, list[str]()
        self.own = folder.parent / "own"
        self.own.mkdir()
        for name, content in (("r2", ASKING), ("pip", "#!/bin/sh\n"), ("docker", DOCKER)):
            (self.own / name).write_text(content)
            (self.own / name).chmod(0o755)
        for name in ("ask", "answer"):
            os.mkfifo(self.own / name)
        # Open for both ends, so that neither side waits for the other to open its own.
        self.ask, self.answer = (os.open(self.own / name, os.O_RDWR) for name in ("ask", "answer"))

    def run(self, script: str) -> tuple[int, str]:
        """The exit code of a script, and all that its commands printed."""
        given = {"ASK": self.own / "ask", "ANSWER": self.own / "answer", "SAID": self.own / "said"}
        path = {"PATH": f"{self.own}{os.pathsep}{os.environ['PATH']}"}
        env = os.environ | path | {key: str(value) for key, value in given.items()}
        with (self.own / "output").open("w+") as output:
            line = ["bash", "-euo", "pipefail", "-c", script]
            with subprocess.Popen(line, cwd=self.folder, env=env, stdout=output, stderr=subprocess.STDOUT) as process:
                end = threading.Thread(target=lambda: (process.wait(), os.write(self.ask, b"\0")))
                end.start()
                try:
                    while (asked := os.read(self.ask, 4096)) != b"\0":
                        self._answer(*asked.decode().split("\0")[:-1])
                finally:
                    process.kill()  # where a command raised, and bash would wait for its answer
                    end.join()
            output.seek(0)
            return process.returncode, output.read()

    def _answer(self, where: str, *arguments: str) -> None:
        self.ran.append(arguments[0])
        with contextlib.chdir(where):
            ran = self.r2(*arguments)
        (self.own / "said").write_text(ran.err + ran.out)
        os.write(self.answer, f"{ran.code}\n".encode())


@pytest.fixture
def shell(trained: Path, tmp_path: Path, r2: R2) -> Shell:
    """A folder as a pipeline checks it out: a network, the recipe, the Dockerfile."""
    (tmp_path / "checkout").mkdir()
    shutil.copy(trained, tmp_path / "checkout/model.safetensors")
    shutil.copy(ROOT / "Dockerfile", tmp_path / "checkout")
    (tmp_path / "checkout/model.toml").write_text(next(each for each in blocks("toml") if "[[step]]" in each))
    return Shell(tmp_path / "checkout", r2)


def jobs() -> tuple[Any, Any]:
    """GitHub's job and GitLab's."""
    github, gitlab = map(yaml.safe_load, blocks("yaml"))
    return github["jobs"]["model"], gitlab["model"]


@pytest.mark.slow
def test_every_snippet_runs_as_a_shell_script(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (github, gitlab), (*session, container) = jobs(), blocks("sh")
    code, output = shell.run("\n".join(session))
    assert code == 0, output
    assert {"r2.xml", "r2.md", "baseline.json"} <= {path.name for path in shell.folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
        for name, value in github["env"].items():
            patch.setenv(name, value)
        code, output = shell.run("\n".join(step["run"] for step in github["steps"] if "run" in step))
    assert code == 0, output
    kept = next(step["with"] for step in github["steps"] if step.get("uses", "").startswith("actions/cache"))
    assert (shell.folder / kept["path"] / "model/README.md").is_file() and "were done before" not in output
    assert (tmp_path / "summary.md").read_text().count(": passed") == 3
    code, output = shell.run("\n".join(gitlab["script"]))
    assert code == 0 and "all 2 steps were done before" in output, output
    assert len(list(shell.folder.glob(gitlab["artifacts"]["reports"]["junit"]))) == 3
    code, output = shell.run(container)
    assert code == 0, output
    assert shell.ran == "ptq verify run evaluate verify run evaluate evaluate".split()


def test_a_line_that_fails_ends_the_script(shell: Shell) -> None:
    code, output = shell.run("pip install . && r2 targets -q > list.txt\nr2 targets --report junti:a.xml\necho after")
    assert code == 2 and "did you mean 'junit'" in output and "after" not in output
    assert "onnxruntime" in (shell.folder / "list.txt").read_text()


def test_the_options_of_its_pyproject_are_options(shell: Shell) -> None:
    (shell.folder / "pyproject.toml").write_text(next(each for each in blocks("toml") if "[tool.r2]" in each))
    code, output = shell.run("r2 ptq model.safetensors --dry-run --json -q")
    assert code == 0 and json.loads(output)["options"]["keep"] == {"classifier": 8}, output


def test_the_dockerfile_copies_what_the_wheel_needs_and_enters_a_command_that_runs(r2: R2) -> None:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    copied = {Path(name) for key, rest in lines if key == "COPY" and "--from" not in rest for name in rest.split()[:-1]}
    assert copied and all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = {"pyproject.toml", "setup.py", "r2cli", "recipes", project["readme"], *project["license-files"]}
    assert parts <= set(map(str, copied))
    stages = {rest.split()[-1] for key, rest in lines if key == "FROM" and " AS " in rest}
    assert {name for line in lines for name in re.findall("--from=(\\w+)", line[1])} == stages
    entry, usual = (json.loads(rest) for name in ("ENTRYPOINT", "CMD") for key, rest in lines if key == name)
    assert entry == ["r2"] and "r2" in project["scripts"]
    assert r2(*usual).code == 0
