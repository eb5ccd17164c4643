"""The documents: each `r2` line of README.md and docs/ is one that r2 can read, and is run in this process, small.

A document's lines run in their order, in a folder of its own: what a line reads is the reader's own (`SHELF`), or an
earlier line wrote it. Training is one epoch of few images, as in a smoke run of a recipe. Of an output that is shown,
words are compared: ticks, headings, names of files and the next command. docs/tasks.md, docs/ci.md and the examples in
Python of docs/api.md, deploy.md and methods.md have tests of their own.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from conftest import R2, ROOT, Ran
from r2cli.cli import main
from r2cli.ptq import brecq
from r2cli.workflow import smoke
from r2cli.workflow.recipe import Step

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"ci.md", "tasks.md"}
WITH_EXAMPLES = {"api.md", "deploy.md", "methods.md"}  # in Python, which other tests run
# Why a line is read by the parser and not run: by a word of the line.
NOT_RUN = {
    "--pretrained": "it downloads weights",
    "torchrun": "several processes: tests/test_distributed.py",
}
if find_spec("transformers") is None:
    NOT_RUN |= dict.fromkeys(("text:minilm", "text.safetensors", "text.b2d1-dkm.onnx"), "transformers is not installed")
if find_spec("ai_edge_litert") is None:
    NOT_RUN |= dict.fromkeys(("tflite", "ethos-u"), "LiteRT is not installed")
GATES = {"--min-accuracy", "--max-drop", "--max-bytes", "--min-sqnr", "--max-latency", "--max-range-ratio"}


@dataclass(frozen=True)
class Line:
    """A command of a document, in words, and the output that the document shows."""

    document: str
    words: tuple[str, ...]
    shown: tuple[str, ...] = ()

    @property
    def is_r2(self) -> bool:
        return self.words[0] in ("r2", "torchrun")

    @property
    def arguments(self) -> list[str]:
        """What r2 is given."""
        return list(self.words[1 + self.words.index("r2cli" if "torchrun" in self.words else "r2") :])

    @property
    def reason(self) -> str | None:
        """Why the line is not run, or None."""
        return next((why for word, why in NOT_RUN.items() if word in self.words), None)

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


def lines(document: Path) -> Iterator[Line]:
    """The commands in the blocks `sh` and `console` of a document."""
    for kind, block in re.findall(r"^```(sh|console)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
        entries = block.split("\n$ ") if kind == "console" else block.splitlines()
        for entry in entries:
            first, *shown = entry.removeprefix("$ ").splitlines() or [""]
            for part in first.split(" && "):
                if words := shlex.split(part, comments=True):
                    yield Line(document.name, tuple(words), tuple(shown))


OWN = [path for path in DOCUMENTS if path.name not in ELSEWHERE]
LINES = {path.name: [line for line in lines(path) if line.is_r2] for path in OWN}


def python(name: str) -> list[str]:
    """The blocks of Python in a document that are not tested elsewhere."""
    text = (ROOT / ("docs" if name != "README.md" else "") / name).read_text()
    found = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [] if name in WITH_EXAMPLES else found


def own_files(name: str) -> dict[str, str]:
    """The files that a document shows: blocks of Python that begin with `# NAME.py`."""
    return {named[1]: block for block in python(name) if (named := re.match(r"# (\w+\.py)\n", block))}


def test_r2_can_read_every_line() -> None:
    r2: Any = typer.main.get_command(main.app)
    for line in sum(LINES.values(), start=[]):
        words, command = line.arguments, r2
        while hasattr(command, "commands"):
            assert words and words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        command.make_context(line.words[0], words)


def test_every_reason_not_to_run_a_line_has_one() -> None:
    given = {word for line in sum(LINES.values(), start=[]) for word in line.words}
    assert NOT_RUN.keys() <= given


def test_commands_and_what_they_show_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "```sh\nx y && r2 run 'a b'  # why\n```\n```console\n$ r2 qat\n✓ size: 3\n7\n$ r2 ls\n```\n"
    )
    found = list(lines(tmp_path / "a.md"))
    assert [line.words for line in found] == [("x", "y"), ("r2", "run", "a b"), ("r2", "qat"), ("r2", "ls")]
    assert found[2].shown == ("✓ size: 3", "7") and words_of("✓ size: 4\n8") == words_of("\n".join(found[2].shown))
    assert words_of("✗ size: 4") != words_of("✓ size: 4") != words_of("✓ sizes: 4")
    assert words_of("a.onnx: top-1 3 %\nnext: r2 ls\nr2: no") == ["a.onnx: t", "next: r2 ls"]


def test_every_option_that_is_named_is_one_of_r2() -> None:
    r2: Any = typer.main.get_command(main.app)
    commands = [*r2.commands.values(), *r2.commands["recipe"].commands.values()]
    known = {name for command in commands for each in command.params for name in (*each.opts, *each.secondary_opts)}
    for path in DOCUMENTS:
        blocks = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", " ".join(re.findall(r"`([^`]+)`", blocks))))
        assert named <= known | {"--help", "--nproc-per-node", "--optimization_style"}, (path.name, named - known)


def test_the_readme_is_short_and_links_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 150
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
            assert link.startswith("http") or (path.parent / link).exists(), f"{path.name}: {link}"
        assert path.name == "README.md" or f"(docs/{path.name})" in readme, f"README does not name docs/{path.name}"


def _picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def _image_folder(path: Path, r2: R2) -> None:
    """Ten classes of noise, in the layout of ImageNet."""
    for seed in range(50):
        _picture(path / ("train" if seed < 30 else "val") / f"class{seed % 10}" / f"{seed}.png", seed)


def _weights(path: Path, r2: R2) -> None:
    provided("net.py", r2)
    net: dict[str, Any] = {}
    exec(Path("net.py").read_text(), net)
    torch.manual_seed(0)
    torch.save(net["factory"]().state_dict(), path)


def _model(path: Path, r2: R2) -> None:
    """What README's first command writes."""
    assert run(small(Line("", ("r2", "pretrain", "--reg", "margin"))), r2).code == 0
    path.write_bytes(Path("model.safetensors").read_bytes())


def _network_file(path: Path, r2: R2) -> None:
    provided("net.pth DIR", r2)
    given = ("--model", "net.py:factory", "--weights", "net.pth", "--data", "imagefolder:DIR")
    assert r2("export", *given, "-o", path).code == 0


def _other_file(path: Path, r2: R2) -> None:
    """What other tools may write: the weights are floats still, and the file is larger."""
    provided("other.float.onnx", r2)
    model = onnx.load("other.float.onnx")
    model.metadata_props.add(key="tool", value="x" * 4096)
    onnx.save(model, path)


def _text(path: Path, r2: R2) -> None:
    smoke.provide([Step("pretrain", {"data": "qnli:"}, {})], Path())
    Path(smoke.NETWORK).rename("minilm")
    Path(smoke.PAIRS).rename("qnli_dev.tsv")


# What is the reader's own: who writes it, by its name.
SHELF: dict[str, Callable[[Path, R2], object]] = {
    "net.py": lambda path, r2: path.write_text(own_files("own-network.md")["net.py"]),
    "net.pth": _weights,
    "network.onnx": _network_file,
    "other.float.onnx": _network_file,
    "other.int8.onnx": _other_file,
    **dict.fromkeys(("model.safetensors", "none.safetensors"), _model),
    "llm.safetensors": lambda path, r2: save_file({"a.weight": torch.randn(64, 32)}, path),
    "minilm": _text,
    "qnli_dev.tsv": _text,
    **dict.fromkeys(("DIR", "cifar10", "imagenet"), _image_folder),
}


def provided(word: str, r2: R2) -> None:
    """Put what `word` names of the shelf into the folder, if it is not there."""
    for name in re.findall(r"[\w.]+", word):
        if name in SHELF and not Path(name).exists():
            SHELF[name](Path(name), r2)


def small(line: Line) -> list[str]:
    """The line with little data, a small network and one epoch; of options that are given twice the last counts."""
    command, *given = [{"resnet18": "resnet8"}.get(word, word) for word in line.arguments]
    if command == "run":
        return [command, *given, "--dry-run"]  # the gate runs all recipes small
    more = dict(smoke.TRAINING.get(command, {}))
    if command == "pretrain" and "--model" not in given:
        more["model"] = "resnet8"
    if "--data" in given:
        more.pop("data", None)
    elif command == "pretrain":
        more["size"] = 8
    if "kmeans" in given or "llm.safetensors" in given:
        more = {}
    return [command, *given, *(part for key, value in more.items() for part in (f"--{key}", str(value)))]


RAN: dict[tuple[str, ...], tuple[Ran, dict[Path, bytes]]] = {}


def run(arguments: list[str], r2: R2) -> Ran:
    """Run a line, or put what it wrote in another document's folder into this one."""
    line, before = tuple(arguments), {*Path().rglob("*")}
    if line not in RAN:
        ran = r2(*arguments)
        RAN[line] = ran, {path: path.read_bytes() for path in {*Path().rglob("*")} - before if path.is_file()}
    ran, files = RAN[line]
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return ran


def words_of(output: str) -> list[str]:
    """The words of an output that do not depend on the network: ticks, headings, files, what to do next."""
    found = []
    for line in output.splitlines():
        if tick := re.match(r"[✓✗] [\w ]+:", line):
            found.append(tick[0])
        elif line.startswith(("next: ", "layer ")):
            found.append(" ".join(line.removesuffix(" --data digits:64").split()))
        elif made := re.match(r"[\w.-]+\.(safetensors|onnx): [a-z]", line):
            found.append(made[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LINES if LINES[name]])
def test_the_lines_run(name: str, r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(brecq, "METHOD", brecq.with_steps(5))
    for path, text in own_files(name).items():
        Path(path).write_text(text)
    for line in LINES[name]:
        if line.reason:
            continue
        for word in line.arguments:
            provided(word, r2)
        ran = run(small(line), r2)
        shown, got = words_of("\n".join(line.shown)), words_of(ran.out)
        fails = any(each.startswith("✗") for each in shown)
        assert ran.code in ({1} if fails else {0, 1} if GATES & {*line.words} else {0}), f"{line}\n{ran.err}{ran.out}"
        assert set(shown) <= {*got, *words_of(ran.err)}, f"{line}\n{ran.out}"
    for block in python(name):
        if block not in own_files(name).values():
            exec(compile(block, name, "exec"), {})
