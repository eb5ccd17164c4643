"""What helps people before the work: examples in --help, what a shell offers, `r2 doctor`."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from conftest import R2
from r2cli.cli import completion, doctor, main
from r2cli.cli.examples import EXAMPLES
from r2cli.config import targets


def test_every_command_ends_its_help_in_two_examples_that_it_can_read(r2: R2) -> None:
    commands: Any = typer.main.get_command(main.app)
    assert EXAMPLES.keys() == main.COMMANDS.keys()
    for name, lines in EXAMPLES.items():
        assert len(lines) == 2
        shown = " ".join(r2(name, "--help").out.split())
        for line in lines:
            program, command, *options = shlex.split(line)
            assert (program, command) == ("r2", name) and line in shown
            commands.commands[name].make_context(name, options)


def offered(command: str, option: str, incomplete: str = "", **given: Any) -> list[str]:
    commands: Any = typer.main.get_command(main.app)
    (found,) = [each for each in commands.commands[command].params if option in each.opts]
    context: Any = SimpleNamespace(params=given)
    return [item.value for item in found.shell_complete(context, incomplete)]


def test_a_shell_is_offered_the_choices_of_an_option() -> None:
    assert {"none", "brecq"} <= set(offered("ptq", "--method"))
    assert offered("palettize", "--dim") == ["1", "2", "4", "8"]
    assert offered("ptq", "--target", "t") == [name for name in targets.TARGETS if name.startswith("t")]
    assert offered("ptq", "--seed") == []


def test_a_shell_is_offered_the_layers_of_the_checkpoint_on_the_line(trained: Path, tmp_path: Path) -> None:
    found = offered("ptq", "--keep", "", source=trained)
    assert found and all(name.endswith("=") for name in found) and not any("bn" in name for name in found)
    assert offered("ptq", "--keep", found[0][:-2], source=trained)[0] == found[0]
    headers = (b"[]", b'{"a.weight', b'{"a.weight": {}}', b'{"a.weight": 1}', b"[" * 100_000)
    for content in (b"", b"\xff" * 8, *(len(one).to_bytes(8, "little") + one for one in headers)):
        (tmp_path / "bad.safetensors").write_bytes(content)
        assert offered("ptq", "--keep", "", source=tmp_path / "bad.safetensors") == []
    assert completion.layers(SimpleNamespace(params={"source": tmp_path / "none"}), "") == []  # type: ignore[arg-type]


def test_doctor_tries_a_network_and_says_what_it_found(r2: R2) -> None:
    ran = r2("doctor", "--json")
    assert ran.code == 0, ran.err
    found = {each["name"]: each for each in json.loads(ran.out)["findings"]}
    assert found["torch"]["fine"] and found["self-test"]["fine"] and "proved" in found["self-test"]["detail"]


def test_doctor_names_what_is_missing_and_what_mends_it(r2: R2, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=900", "r2-nowhere>=1", "numpy", 'r2-nowhere2; extra == "timm"', 'numpy; extra == "text"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    ran = r2("doctor")
    assert ran.code == 1 and "will not work here as it should: torch, r2-nowhere" in ran.err
    lines = ran.out.splitlines()
    assert any(line.startswith("✗ torch") and line.endswith("; pip install 'torch>=900'") for line in lines)
    assert any(line.startswith("✗ r2-nowhere: missing; pip install 'r2-nowhere>=1'") for line in lines)
    assert any(line.startswith("- [timm]") and line.endswith("; pip install 'r2cli[timm]'") for line in lines)
    assert any(line.startswith("✓ [text]") for line in lines) and "self-test" not in ran.out


def test_doctor_says_why_the_network_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **more: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("r2cli.api.quantize", broken)
    found = doctor.tried()
    assert found.fine is False and "no such kernel" in found.detail


def test_init_writes_a_recipe_that_runs_as_it_is(r2: R2, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "mine.toml"
    ran = r2("init", trained, "--data", "digits:64", "-o", output)
    assert ran.code == 0 and f"next: r2 run {output}" in ran.out, ran.err
    lines = [line.strip() for line in ran.out.splitlines() if line.startswith("  r2 ptq")]
    assert len(lines) == 3 and all(f"#   {line}" in output.read_text() for line in lines)
    assert r2("init", trained, "--data", "digits:64", "-o", output).code == 2  # it is there
    ran = r2("run", output, "--only", "w8a8*", "--work-dir", tmp_path / "runs", "--json")
    assert ran.code == 0, ran.err
    (row,) = json.loads(ran.out)["tables"][0]["rows"]
    assert row["plan"] == "8 bits, none" and float(row["ONNX top-1 %"]) > 80 and row["proof"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["net.py:factory", "--weights", "none.pth", "--data", "digits"], "net.py"),
        (["none.onnx"], "none.onnx does not exist"),
        (["resnet8", "--model", "resnet20"], "two networks"),
        (["none.safetensors", "-o", "a.txt"], "must be a file that ends in .toml"),
    ],
)
def test_init_of_what_is_not_there_is_one_sentence(
    line: list[str], told: str, r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = r2("init", *line)
    assert ran.code == 2 and told in ran.err and not list(tmp_path.iterdir()), ran.err


def test_a_misspelt_command_is_sent_to_the_list_of_commands(r2: R2) -> None:
    ran = r2("docter")
    assert ran.code == 2 and "Did you mean 'doctor'? Try `r2 --help`." in ran.err
    assert r2("doctor", "--self-tst").err.endswith("Try `r2 doctor --help`.\n")
