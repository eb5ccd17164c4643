"""Recipes: what a matrix makes of the steps, what runs again and what does not, and what the tables hold."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import r2cli
from r2cli.errors import CheckFailed, InputError
from r2cli.workflow import recipe, runner, smoke
from r2cli.workflow import results as tabled
from r2cli.workflow.recipe import Recipe, Step


def read(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text)
    return recipe.load(path)


def expanded(folder: Path, text: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    made = recipe.steps(read(folder, text))
    return [(step.command, dict(step.options), dict(step.values)) for step in made]


def refused(folder: Path, text: str) -> str:
    """The message of the InputError; every one names the recipe."""
    with pytest.raises(InputError) as caught:
        recipe.steps(read(folder, text))
    assert caught.value.exit_code == 2
    assert str(folder / "recipe.toml") in str(caught.value)
    return str(caught.value)


# --- expansion -----------------------------------------------------------------------------------------------------


def test_a_step_is_made_once_for_what_it_mentions(tmp_path: Path) -> None:
    text = """
        [matrix]
        seed = [0, 1]
        reg = ["none", "margin"]
        bits = [8, 4]

        [[step]]
        run = "pretrain"
        epochs = 3

        [[step]]
        run = "pretrain"
        reg = "{reg}"
        output = "{reg}.safetensors"

        [[step]]
        run = "ptq"
        source = "{reg}.safetensors"
        weight-bits = "{bits}"
    """
    assert expanded(tmp_path, text) == [
        ("pretrain", {"epochs": 3}, {}),
        ("pretrain", {"reg": "none", "output": "none.safetensors"}, {"reg": "none"}),
        ("pretrain", {"reg": "margin", "output": "margin.safetensors"}, {"reg": "margin"}),
        ("ptq", {"source": "none.safetensors", "weight-bits": 8}, {"reg": "none", "bits": 8}),
        ("ptq", {"source": "none.safetensors", "weight-bits": 4}, {"reg": "none", "bits": 4}),
        ("ptq", {"source": "margin.safetensors", "weight-bits": 8}, {"reg": "margin", "bits": 8}),
        ("ptq", {"source": "margin.safetensors", "weight-bits": 4}, {"reg": "margin", "bits": 4}),
    ]


def test_a_table_of_the_matrix_gives_its_entries(tmp_path: Path) -> None:
    text = """
        [matrix]
        pre = [{ name = "plain" }, { name = "10x", reg = "margin", decay = 4e-4 }]

        [[step]]
        run = "pretrain"
        reg = "{pre.reg}"
        weight-decay = "{pre.decay}"
        output = "{pre}-{pre.name}.safetensors"
    """
    made = expanded(tmp_path, text)
    # An entry that a table lacks leaves the option out; the table itself is called by its name.
    assert [options for _, options, _ in made] == [
        {"output": "plain-plain.safetensors"},
        {"reg": "margin", "weight-decay": 4e-4, "output": "10x-10x.safetensors"},
    ]
    assert made[0][2] == {"pre": {"name": "plain"}}


def test_a_whole_placeholder_keeps_its_type(tmp_path: Path) -> None:
    text = """
        [matrix]
        x = [4, 0.5, true, "a", ["p=8", "q=4"]]

        [[step]]
        run = "ptq"
        whole = "{x}"
        part = "w{x}a8"
        listed = ["{x}", "b{x}", 3]
        plain = 7
    """
    options = [own for _, own, _ in expanded(tmp_path, text)]
    assert [own["whole"] for own in options] == [4, 0.5, True, "a", ["p=8", "q=4"]]
    assert [type(own["whole"]) for own in options] == [int, float, bool, str, list]
    assert [own["part"] for own in options[:4]] == ["w4a8", "w0.5a8", "wTruea8", "waa8"]
    assert options[0]["listed"] == [4, "b4", 3]
    assert {own["plain"] for own in options} == {7}


def test_arguments_of_a_step(tmp_path: Path) -> None:
    options = {
        "weight-bits": 4,
        "source": "a.safetensors",
        "keep": ["classifier=8", "stem=8"],
        "equalize": True,
        "absorb": False,
        "max-drop": 0.5,
        "output": "a b.safetensors",
    }
    step = Step("ptq", options, {})
    assert step.arguments(Path("runs") / "x") == [
        "ptq",
        "runs/x/a.safetensors",
        *("--weight-bits", "4"),
        *("--keep", "classifier=8", "--keep", "stem=8"),
        "--equalize",
        *("--max-drop", "0.5"),
        *("--output", "runs/x/a b.safetensors"),
    ]
    short = Step("evaluate", {"source": "a b", "json": True}, {})
    assert recipe.shell(short, Path("f")) == "r2 evaluate 'f/a b' --json"


# --- what cannot be read -------------------------------------------------------------------------------------------

STEP = '[[step]]\nrun = "pretrain"\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (STEP + 'reg = "{reg}"\n[matrix]\nrex = ["none"]\n', ["'reg'", "'rex'"]),
        (STEP + 'reg = "{reg.name}"\n[matrix]\nrex = ["none"]\n', ["'reg'", "'rex'"]),
        (STEP + 'keep = ["a={bit}"]\n[matrix]\nbits = [4]\n', ["'bit'", "'bits'"]),
        (STEP + "[[tables]]\n", ["'tables'", "'table'"]),
        (STEP + "[matrx]\n", ["'matrx'", "'matrix'"]),
        ('[[step]]\nrun = "pretrian"\n', ["'pretrian'", "'pretrain'"]),
        ('[[step]]\nrun = "quantize"\n', ["'quantize'", "ptq"]),
        ('[[step]]\nreg = "none"\n', ["pretrain"]),
        ("[matrix]\nreg = ['none']\n", ["[[step]]"]),
        ("", ["[[step]]"]),
        ("[[step]\n", ["line 1"]),
        (STEP + "reg = none\n", ["line 3"]),
        (STEP + "reg = 1\nreg = 2\n", ["line 4"]),
        # Tables where lists are wanted, and the other way round.
        *[
            pytest.param(text, [])
            for text in (
                STEP + 'reg = "{reg}"\n[matrix]\nreg = "margin"\n',
                STEP + 'bits = "{bits}"\n[matrix]\nbits = 4\n',
                STEP + 'reg = "{reg.name}"\n[matrix]\nreg = ["none"]\n',
                '[step]\nrun = "pretrain"\n',
                "matrix = 3\n" + STEP + 'reg = "{reg}"\n',
                STEP + "day = 2026-11-21\n",
            )
        ],
    ],
)
def test_what_cannot_be_read_is_named(text: str, named: Sequence[str], tmp_path: Path) -> None:
    message = refused(tmp_path, text)
    for part in named:
        assert part in message


def test_a_recipe_that_is_no_text_file_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "no such.toml", tmp_path, binary):
        with pytest.raises(InputError) as caught:
            recipe.load(path)
        assert str(path) in str(caught.value)


# --- execution -----------------------------------------------------------------------------------------------------


class Commands:
    """In the place of `r2`: writes what it was told to do, refuses to replace a file, and can be stopped at a step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[list[str]] = []
        self.stop_at: str | None = None
        self.told: list[str] = []

    def __call__(self, arguments: list[str]) -> dict[str, Any]:
        assert "--json" in arguments
        self.ran.append(arguments)
        source = "" if arguments[1].startswith("--") else Path(arguments[1]).read_text()
        own = [text for text in arguments if text not in ("--json", "--overwrite")]
        made = json.dumps([source, *(text.replace(str(self.folder), ".") for text in own)])
        if "--output" in arguments:
            output = Path(arguments[arguments.index("--output") + 1])
            if output.exists() and "--overwrite" not in arguments:
                raise InputError(f"{output} is there already")
            output.write_text("half of it" if self.stop_at == output.name else made)
            if arguments[0] == "ptq":
                output.with_suffix(".onnx").write_text(made)
            if self.stop_at == output.name:
                raise KeyboardInterrupt
        return {"made": made}

    def names(self) -> list[str]:
        """What ran since the last look: the outputs, `!` where it was told to overwrite."""
        ran, self.ran = self.ran, []
        shown = []
        for arguments in ran:
            name = Path(arguments[arguments.index("--output") + 1]).name if "--output" in arguments else arguments[0]
            shown.append(name + "!" * ("--overwrite" in arguments))
        return shown


def two(lr: float = 0.1, bits: int = 4, **more: Any) -> list[Step]:
    return [
        Step("pretrain", {"lr": lr, "output": "model"} | more, {"lr": lr}),
        Step("ptq", {"source": "model", "weight-bits": bits, "output": "coded"}, {"bits": bits}),
    ]


def run(
    steps: Sequence[Step], folder: Path, invoke: Any, tell: Callable[[str], None], *, overwrite: bool = False
) -> list[dict[str, Any]]:
    return runner.execute(
        steps, folder, lambda number, line: runner.InThisProcess(invoke, line), tell, overwrite=overwrite
    )


def execute(steps: Sequence[Step], commands: Commands, *, overwrite: bool = False) -> list[dict[str, Any]]:
    return run(steps, commands.folder, commands, commands.told.append, overwrite=overwrite)


def test_steps_run_in_order_and_once(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    results = execute(two(), commands)
    assert commands.ran == [
        ["pretrain", "--lr", "0.1", "--output", f"{tmp_path}/model", "--json"],
        ["ptq", f"{tmp_path}/model", "--weight-bits", "4", "--output", f"{tmp_path}/coded", "--json"],
    ]
    assert [(r["command"], r["values"]) for r in results] == [("pretrain", {"lr": 0.1}), ("ptq", {"bits": 4})]
    assert [r["report"]["made"] for r in results] == [(tmp_path / n).read_text() for n in ("model", "coded")]
    assert len(commands.told) == 2
    commands.names()
    assert execute(two(), commands) == results
    assert commands.names() == []
    assert len(commands.told) == 2


def resumed(steps: Sequence[Step], commands: Commands, *, overwrite: bool = False) -> list[dict[str, Any]]:
    """The steps run with --resume."""

    def start(number: int, line: list[str]) -> runner.InThisProcess:
        return runner.InThisProcess(commands, line)

    return runner.execute(steps, commands.folder, start, commands.told.append, resume=True, overwrite=overwrite)


def test_resume_starts_goes_on_and_leaves_alone_what_is_done(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    commands.stop_at = "coded"
    with pytest.raises(KeyboardInterrupt):
        resumed(two(), commands)
    commands.stop_at = None
    assert commands.names() == ["model", "coded"]
    done = resumed(two(), commands)
    assert commands.names() == ["coded!"]  # its own half, which a killed run left
    assert resumed(two(), commands) == done and commands.names() == []


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (two(lr=0.2), "with lr = 0.1, not 0.2"),
        (two(bits=3), "with weight-bits = 4, not 3"),
        (two(epochs=2), "with epochs = None, not 2"),
        ([Step("qat", {"output": "model"}, {})], f"as `r2 pretrain` by r2 {r2cli.__version__}"),
    ],
    ids=["lr", "bits", "epochs", "command"],
)
def test_resume_refuses_other_options_before_any_step_runs(steps: list[Step], told: str, tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    execute(two(), commands)
    commands.names()
    with pytest.raises(InputError, match=f"it was done {told}: leave out --resume to do it again"):
        resumed(steps, commands)
    assert commands.names() == []


def test_resume_takes_other_options_for_a_step_that_wrote_nothing(tmp_path: Path) -> None:
    commands = Commands(tmp_path)

    def refuses(arguments: list[str]) -> dict[str, Any]:
        if arguments[0] == "ptq":
            raise InputError("no such bits")
        return commands(arguments)

    with pytest.raises(InputError, match="no such bits"):
        run(two(bits=40), tmp_path, refuses, commands.told.append)
    assert commands.names() == ["model"]
    resumed(two(bits=4), commands)
    assert commands.names() == ["coded!"]
    (tmp_path / "coded").unlink()
    (tmp_path / "coded.onnx").unlink()
    with pytest.raises(InputError, match="it was done with weight-bits = 4, not 3"):
        resumed(two(bits=3), commands)  # this one was finished, and somebody may look for its files


def test_resume_refuses_other_options_for_a_step_that_goes_on(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    commands.stop_at = "model"
    with pytest.raises(KeyboardInterrupt):
        execute(two(), commands)
    with pytest.raises(InputError, match="it was done with lr = 0.1, not 0.2"):
        resumed(two(lr=0.2), commands)


def test_resume_names_a_file_that_is_missing_or_was_exchanged(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    execute(two(), commands)
    commands.names()
    for name in ("model", "coded", "coded.onnx"):
        path = tmp_path / name
        right = path.read_bytes()
        for wrong, what in ((None, "is missing"), (b"another", "is not as it was written")):
            path.unlink(missing_ok=True)
            if wrong is not None:
                path.write_bytes(wrong)
            with pytest.raises(InputError, match=f"{path} {what}: put it back, or run all again with --overwrite"):
                resumed(two(), commands)
        path.write_bytes(right)
    assert commands.names() == []
    (tmp_path / "coded").unlink()
    resumed(two(), commands, overwrite=True)
    assert commands.names() == ["model!", "coded!"]


def test_resume_names_a_source_that_was_changed(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    (tmp_path / "given").write_text("one")
    steps = [Step("ptq", {"source": "given", "output": "coded"}, {})]
    execute(steps, commands)
    (tmp_path / "given").write_text("two")
    with pytest.raises(InputError, match="its source has changed since: leave out --resume to do it again"):
        resumed(steps, commands)


def test_a_changed_step_runs_alone(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    execute(two(), commands)
    commands.names()
    changed = two()[0], Step("ptq", {"source": "model", "weight-bits": 2, "output": "other"}, {})
    execute(changed, commands)
    assert commands.names() == ["other"]


def test_what_is_gone_is_made_again(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    execute(two(), commands)
    commands.names()
    (tmp_path / "coded").unlink()
    execute(two(), commands)
    assert commands.names() == ["coded!"]
    (tmp_path / "model").unlink()
    execute(two(), commands)
    assert commands.names() == ["model!"]  # it has the same bytes again, so what reads it is as it was


def test_a_changed_option_replaces_the_output_and_what_depends_on_it(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    execute(two(lr=0.1), commands)
    commands.names()
    execute(two(lr=0.2), commands)
    assert commands.names() == ["model!", "coded!"]
    assert "0.2" in (tmp_path / "coded").read_text()


def test_a_changed_option_reaches_what_depends_on_it(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    execute(two(), commands)
    commands.names()
    (tmp_path / "model").unlink()
    results = execute(two(lr=0.2), commands)
    assert [name.rstrip("!") for name in commands.names()] == ["model", "coded"]
    assert "0.2" in results[1]["report"]["made"]


def test_a_training_step_that_was_stopped_goes_on_from_its_last_epoch(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    state = tmp_path / "model.resume.safetensors"

    def stopped(arguments: list[str]) -> Any:
        state.write_text("after one epoch")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(two(), tmp_path, stopped, commands.told.append, overwrite=False)
    execute(two(), commands)
    assert "--resume" in commands.ran[0] and "--overwrite" not in commands.ran[0]
    assert "--resume" not in commands.ran[1]
    commands.names()
    # Nor does a file that a run had written before it was stopped stand in its way.
    record = json.loads((tmp_path / "results.json").read_text())
    record["model"]["report"] = None
    (tmp_path / "results.json").write_text(json.dumps(record))
    execute(two(), commands)
    assert "--resume" in commands.ran[0] and "--overwrite" in commands.ran[0]
    commands.names()
    # Not with other options, and not where all is to be done again.
    (tmp_path / "model").unlink()
    execute(two(lr=0.2), commands)
    assert "--resume" not in commands.ran[0]
    commands.names()
    execute(two(lr=0.2), commands, overwrite=True)
    assert "--resume" not in commands.ran[0] and "--overwrite" in commands.ran[0]


def test_going_back_to_the_first_options_makes_the_first_file(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    first = execute(two(lr=0.1), commands)
    for name in ("model", "coded"):
        (tmp_path / name).unlink()
    execute(two(lr=0.2), commands)
    commands.names()
    assert execute(two(lr=0.1), commands) == first
    assert "0.1" in (tmp_path / "model").read_text()


def test_what_depends_on_a_new_file_runs_after_an_interrupt_too(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    steps = [
        Step("pretrain", {"reg": "none", "output": "a"}, {}),
        Step("pretrain", {"reg": "margin", "output": "b"}, {}),
        Step("ptq", {"source": "a", "output": "a.coded"}, {}),
    ]
    execute(steps, commands)
    for name in ("a", "b"):
        (tmp_path / name).unlink()
    steps[0] = Step("pretrain", {"reg": "linf", "output": "a"}, {})
    commands.stop_at = "b"
    with pytest.raises(KeyboardInterrupt):
        execute(steps, commands)
    commands.stop_at = None
    execute(steps, commands)
    assert "linf" in (tmp_path / "a.coded").read_text()


def test_an_interrupted_step_runs_again_over_its_own_file(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    commands.stop_at = "coded"
    with pytest.raises(KeyboardInterrupt):
        execute(two(), commands)
    assert commands.names() == ["model", "coded"]
    assert (tmp_path / "coded").read_text() == "half of it"
    commands.stop_at = None
    results = execute(two(), commands)
    assert commands.names() == ["coded!"]
    assert results[1]["report"]["made"] == (tmp_path / "coded").read_text()
    execute(two(), commands)
    assert commands.names() == []


def test_a_failed_gate_is_not_done(tmp_path: Path) -> None:
    commands = Commands(tmp_path)

    def gated(arguments: list[str]) -> dict[str, Any]:
        commands(arguments)
        raise CheckFailed("gate failed")

    with pytest.raises(CheckFailed):
        run(two(), tmp_path, gated, commands.told.append, overwrite=False)
    assert commands.names() == ["model"]
    execute(two(), commands)
    assert commands.names() == ["model!", "coded"]


def test_a_stranger_s_file_is_not_replaced(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    (tmp_path / "model").write_text("of another hand")
    with pytest.raises(InputError):
        execute(two(), commands)
    assert (tmp_path / "model").read_text() == "of another hand"
    execute(two(), commands, overwrite=True)
    assert (tmp_path / "model").read_text() != "of another hand"


def test_a_stranger_s_file_is_not_replaced_by_the_second_try(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    (tmp_path / "model").write_text("of another hand")
    for _ in range(2):
        with pytest.raises(InputError):
            execute(two(), commands)
    assert (tmp_path / "model").read_text() == "of another hand"


def test_overwrite_runs_everything(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    execute(two(), commands)
    commands.names()
    execute(two(), commands, overwrite=True)
    assert commands.names() == ["model!", "coded!"]
    execute(two(), commands)
    assert commands.names() == []


def test_another_version_s_work_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(tmp_path)
    steps = [Step("evaluate", {"data": "digits"}, {})]
    execute(steps, commands)
    execute(steps, commands)
    assert commands.names() == ["evaluate"]
    monkeypatch.setattr(runner, "__version__", "999")
    execute(steps, commands)
    assert commands.names() == ["evaluate"]


def test_a_step_without_output_makes_nothing_stale(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    training = Step("pretrain", {"output": "model"}, {})
    execute([training], commands)
    commands.names()
    execute([Step("evaluate", {"data": "digits"}, {}), training], commands)
    assert commands.names() == ["evaluate"]


def test_a_damaged_record_is_an_empty_one(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    (tmp_path / "results.json").write_text('{"half of')
    execute(two(), commands)
    assert commands.names() == ["model", "coded"]


# --- tables --------------------------------------------------------------------------------------------------------

METRICS = {"top-1": "top1", "bytes": "bytes"}


def results(found: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[dict[str, Any]]:
    other = {"command": "pretrain", "values": {"reg": "none"}, "report": {"top1": -1}}
    return [other, *({"command": "ptq", "values": dict(v), "report": dict(r)} for v, r in found)]


Row = tuple[Mapping[str, Any], Mapping[str, Any]]


def table(found: Sequence[Row], **layout: Any) -> list[dict[str, str]]:
    asked = Recipe(Path("recipe.toml"), {}, [], [{"run": "ptq", **layout}])
    (made,) = tabled.tables(asked, results(found))
    return [dict(row) for row in made.rows]


def test_a_table_of_one_value_each() -> None:
    rows = [
        ({"reg": "none", "bits": 8}, {"top1": 97.346, "bytes": 1234567}),
        ({"reg": "margin", "bits": 4}, {"top1": 9.0, "bytes": 12}),
    ]
    assert table(rows, rows=["reg", "bits"], metrics=METRICS) == [
        {"reg": "none", "bits": "8", "top-1": "97.35", "bytes": "1,234,567"},
        {"reg": "margin", "bits": "4", "top-1": "9.00", "bytes": "12"},
    ]


def test_what_a_table_does_not_list_is_averaged() -> None:
    rows = [
        ({"reg": reg, "seed": seed}, {"top1": value, "bytes": 1000 + seed})
        for reg, own in (("none", (10.0, 20.0, 60.0)), ("margin", (97.0, 98.0, 98.5)))
        for seed, value in enumerate(own)
    ]
    assert table(rows, rows=["reg"], metrics=METRICS) == [
        {"reg": "none", "top-1": "30.00 ± 26.46", "bytes": "1,001 ± 1"},
        {"reg": "margin", "top-1": "97.83 ± 0.76", "bytes": "1,001 ± 1"},
    ]


def test_a_column_turns_a_variable_across() -> None:
    rows = [
        ({"reg": {"name": reg, "x": 1}, "bits": bits, "seed": seed}, {"top1": value + seed})
        for reg, bits, value in (("none", 8, 97.0), ("none", 4, 50.0), ("margin", 8, 96.0), ("margin", 4, 95.0))
        for seed in (0, 2)
    ]
    assert table(rows, rows=["reg"], column="bits", metrics={"top-1": "top1"}) == [
        {"reg": "none", "8 top-1": "98.00 ± 1.41", "4 top-1": "51.00 ± 1.41"},
        {"reg": "margin", "8 top-1": "97.00 ± 1.41", "4 top-1": "96.00 ± 1.41"},
    ]
    # Without a title the column's value is the whole head.
    assert table(rows[:1], rows=["reg"], column="bits", metrics={"": "top1"}) == [{"reg": "none", "8": "97.00"}]


def test_a_step_without_a_table_s_variables_is_not_in_it() -> None:
    rows: list[Row] = [({"reg": "none"}, {"top1": 97.0}), ({"reg": "none", "bits": 4}, {"top1": 50.0})]
    assert table(rows, rows=["bits"], metrics={"top-1": "top1"}) == [{"bits": "4", "top-1": "50.00"}]
    assert table(rows, rows=["reg"], column="bits", metrics={"": "top1"}) == [{"reg": "none", "4": "50.00"}]
    assert table(rows, rows=["reg"], metrics={"top-1": "top1"}) == [{"reg": "none", "top-1": "73.50 ± 33.23"}]


def test_every_row_has_every_column() -> None:
    rows = [({"reg": "none", "bits": 8}, {"top1": 97.0}), ({"reg": "margin", "bits": 4}, {"top1": 50.0})]
    made = table(rows, rows=["reg"], column="bits", metrics={"": "top1"})
    assert [list(row) for row in made] == [["reg", "8", "4"]] * 2
    assert made[0]["8"] == "97.00" and made[1]["4"] == "50.00"


def test_a_table_as_markdown() -> None:
    rows = [{"reg": "none", "top-1": "97.00"}, {"reg": "margin", "top-1": "98.00"}]
    assert tabled.Table("what it buys", rows).markdown() == (
        "**what it buys**\n\n| reg | top-1 |\n|---|---|\n| none | 97.00 |\n| margin | 98.00 |\n"
    )


def test_texts_are_listed_once_each() -> None:
    rows = [({"seed": seed}, {"ticks": ticks}) for seed, ticks in enumerate(["ok", "ok", "off"])]
    assert table(rows, rows=[], metrics={"proof": "ticks"}) == [{"proof": "ok, off"}]


def test_a_metric_that_no_report_has_suggests_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        table([({"reg": "none"}, {"top1": 1.0})], rows=["reg"], metrics={"top-1": "top-1"})
    assert "'top-1'" in str(caught.value) and "'top1'" in str(caught.value)
    assert "recipe.toml" in str(caught.value)


@pytest.mark.parametrize("missing", ["rows", "metrics", "run"])
def test_a_table_without_a_key_is_refused(missing: str) -> None:
    layout = {"run": "ptq", "rows": ["reg"], "metrics": {"top-1": "top1"}}
    del layout[missing]
    asked = Recipe(Path("recipe.toml"), {}, [], [layout])
    with pytest.raises(InputError, match=missing):
        tabled.tables(asked, results([({"reg": "none"}, {"top1": 1.0})]))


@pytest.mark.parametrize("change", [('run = "ptq"', 'run = "qat"'), ("{reg}.w8", "{seed}.w8")])
def test_a_table_that_no_step_can_fill_is_refused(change: tuple[str, str], tmp_path: Path) -> None:
    text = """
        [matrix]
        reg = ["none", "linf"]
        seed = [1, 2]
        [[step]]
        run = "ptq"
        source = "a.safetensors"
        output = "{reg}.w8.safetensors"
        [[table]]
        run = "ptq"
        rows = ["reg"]
        metrics = { "top-1" = "top1" }
    """
    (tmp_path / "good.toml").write_text(text)
    recipe.load(tmp_path / "good.toml")
    (tmp_path / "bad.toml").write_text(text.replace(*change, 1))
    with pytest.raises(InputError, match=r"bad\.toml: a \[\[table\]\] (by reg, and no ptq step|of ptq, and no step)"):
        recipe.load(tmp_path / "bad.toml")
    (tmp_path / "number.toml").write_text(text.replace('["reg"]', "[1]"))
    with pytest.raises(InputError, match="'rows.0' is 1, not a text"):
        recipe.load(tmp_path / "number.toml")


def test_set_that_leaves_a_table_without_steps_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("""
        [matrix]
        bits = [8, 4]
        [[step]]
        run = "analyze"
        source = "a.safetensors"
        bits = "{bits}"
        [[table]]
        run = "analyze"
        rows = ["bits"]
        metrics = { "seconds" = "seconds" }
    """)
    loaded = recipe.load(path)
    assert len(recipe.steps(recipe.override(loaded, ["matrix.bits=4"]))) == 1
    with pytest.raises(InputError, match="by bits, and no analyze step"):
        recipe.override(loaded, ["bits=4"])


def test_a_lost_onnx_file_is_made_again(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    execute(two(), commands)
    commands.names()
    (tmp_path / "coded.onnx").unlink()
    execute(two(), commands)
    assert commands.names() == ["coded!"]


def test_a_bar_in_a_name_is_no_column() -> None:
    table = tabled.Table("t", [{"reg": "none", "max|w|/std": "4.0"}])
    assert table.markdown().splitlines()[2:] == ["| reg | max\\|w\\|/std |", "|---|---|", "| none | 4.0 |"]


# --- spread, CSV ---------------------------------------------------------------------------------------------------


def test_a_metric_may_stand_within_a_part_of_the_report() -> None:
    rows = results([({"reg": "none"}, {"metric": {"value": 1.5}, "bytes": 5, "other": None})])

    def made(metric: str) -> tabled.Table:
        layout = {"run": "ptq", "rows": ["reg"], "metrics": {"shown": metric}}
        return tabled.tables(Recipe(Path("recipe.toml"), {}, [], [layout]), rows)[0]

    assert made("metric.value").rows == [{"reg": "none", "shown": "1.50"}]
    for missing in ("metric.other", "bytes.value", "other.value", "proof.command.value"):
        with pytest.raises(InputError, match=f"unknown metric of recipe.toml '{missing}'"):
            made(missing)


def test_a_column_is_named_by_what_was_measured() -> None:
    measured = {"label": "PSNR", "unit": "dB", "value": 31.5}
    rows: list[Row] = [({"bits": 8}, {"top1": None, "metric": measured}), ({"bits": 4}, {"top1": None, "metric": None})]
    columns = {"ONNX {metric}": "metric.value", "top-1": "top1"}
    assert table(rows[:1], rows=["bits"], metrics=columns) == [{"bits": "8", "ONNX PSNR dB": "31.50", "top-1": "-"}]
    (unmeasured,) = table(rows[1:], rows=["bits"], metrics=columns)
    assert unmeasured == {"bits": "4", "ONNX metric": "-", "top-1": "-"}


def test_a_table_as_numbers() -> None:
    rows = [({"reg": "none", "seed": n}, {"top1": value, "proof": "ok"}) for n, value in enumerate((10.0, 20.0, 60.0))]
    layout = {"run": "ptq", "rows": ["reg"], "metrics": {"top-1": "top1", "proof": "proof"}}
    (made,) = tabled.tables(Recipe(Path("recipe.toml"), {}, [], [{"title": "t", **layout}]), results(rows))
    number, text = made.records
    # The sample's deviation: sqrt((20^2 + 10^2 + 30^2) / 2).
    assert number == {
        "reg": "none",
        "column": "top-1",
        "n": 3,
        "mean": 30.0,
        "sd": pytest.approx(700**0.5),
        "least": 10.0,
        "greatest": 60.0,
        "values": [10.0, 20.0, 60.0],
    }
    assert text["n"] == 3 and text["mean"] is text["sd"] is None and text["values"] == ["ok"] * 3
    assert tabled.as_csv([made]).splitlines() == [
        "table,reg,column,n,mean,sd,least,greatest,values",
        f"t,none,top-1,3,30.0,{700**0.5},10.0,60.0,10.0 20.0 60.0",
        "t,none,proof,3,,,,,ok ok ok",
    ]


def test_one_value_has_no_spread() -> None:
    asked = Recipe(Path("recipe.toml"), {}, [], [{"run": "ptq", "rows": ["reg"], "metrics": {"top-1": "top1"}}])
    (made,) = tabled.tables(asked, results([({"reg": "none"}, {"top1": 10.0})]))
    assert made.records[0]["sd"] is None and made.records[0]["n"] == 1


# --- places, --set, --only -----------------------------------------------------------------------------------------

PLACED = """# a comment
[matrix]
seed = [0, 1]
pre = [{ name = "plain", reg = "none" }, { name = "strong", reg = "margin" }]

[[step]]
run = "pretrain"
reg = "{pre.reg}"
seed = "{seed}"
output = "{pre}-{seed}.safetensors"

[[step]]
run = "ptq"
"weight-bits" = 4
source = "{pre}-{seed}.safetensors"
output = "{pre}-{seed}.w4.safetensors"
"""


def test_an_error_has_its_place(tmp_path: Path) -> None:
    step = recipe.steps(read(tmp_path, PLACED))[4]
    path = tmp_path / "recipe.toml"
    assert step.blame("No such option: --weight-bits").startswith(f"{path}:14: r2 ptq -> plain-0.w4.safetensors: No")
    assert step.blame("'plain-0.safetensors' is gone").startswith(f"{path}:15: ")
    assert step.blame("--weight-bits-more is another").startswith(f"{path}:12: ")
    assert Step("ptq", {}, {}).blame("it failed") == "r2 ptq: it failed"


def test_set_changes_the_steps_that_have_the_key(tmp_path: Path) -> None:
    def made(*texts: str) -> list[dict[str, Any]]:
        return [dict(step.options) for step in recipe.steps(recipe.override(read(tmp_path, PLACED), texts))]

    assert [own.get("weight-bits") for own in made("weight-bits=2")] == [None] * 4 + [2] * 4
    assert {own.get("epochs") for own in made("pretrain.epochs=1")[:4]} == {1}
    assert "epochs" not in made("pretrain.epochs=1")[4]
    assert [own["seed"] for own in made("matrix.seed=7")[:2]] == [7, 7]
    assert [own["seed"] for own in made("matrix.seed=[5, 6]")[:4]] == [5, 5, 6, 6]
    assert [own["reg"] for own in made("matrix.pre=strong", "matrix.seed=0")[:1]] == ["margin"]
    assert made("weight-bits=imagefolder:a=b")[4]["weight-bits"] == "imagefolder:a=b"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epochs=1", "'epochs'"),
        ("matrix.sed=1", "'seed'"),
        ("qat.epochs=1", "'qat.epochs'"),
        ("epochs", "KEY=VALUE"),
        ("output=a", "output"),
    ],
)
def test_what_cannot_be_set_is_named(text: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        recipe.steps(recipe.override(read(tmp_path, PLACED), [text]))
    assert named in str(caught.value)


def test_only_takes_along_what_is_read(tmp_path: Path) -> None:
    todo = recipe.steps(read(tmp_path, PLACED))

    def outputs(pattern: str) -> list[str]:
        return [step.options["output"].removesuffix(".safetensors") for step in recipe.only(todo, pattern)]

    assert outputs("plain-1.w4*") == ["plain-1", "plain-1.w4"]
    assert outputs("pretrain --reg margin") == ["strong-0", "strong-1"]
    assert len(outputs("*")) == 8
    with pytest.raises(InputError, match="8 steps"):
        outputs("nothing such")


# --- what was read, and side by side -------------------------------------------------------------------------------


def test_other_bytes_of_a_source_are_another_input(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    (tmp_path / "model").write_text("one")
    steps = two()[1:]
    execute(steps, commands)
    (tmp_path / "model").write_text("one")
    execute(steps, commands)
    assert commands.names() == ["coded"]
    (tmp_path / "model").write_text("two")
    execute(steps, commands)
    assert commands.names() == ["coded!"]


@pytest.mark.parametrize("command", ["ptq", "qat", "palettize"])
def test_every_command_that_writes_an_onnx_file_makes_it_again(command: str, tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    step = Step(command, {"output": "coded.safetensors"}, {})
    execute([step], commands)
    (tmp_path / "coded.onnx").write_text("")
    execute([step], commands)
    commands.names()
    (tmp_path / "coded.onnx").unlink()
    execute([step], commands)
    assert commands.names() == ["coded.safetensors!"]


class Slow:
    """A job that is done when it has been looked at so many times; notes who runs beside whom."""

    def __init__(
        self, name: str, looks: int, running: list[str], seen: list[set[str]], error: BaseException | None
    ) -> None:
        self.name, self.looks, self.running, self.error, self.stopped = name, looks, running, error, False
        running.append(name)
        seen.append(set(running))

    def done(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def report(self) -> Any:
        self.running.remove(self.name)
        if self.error:
            raise self.error
        return {"made": self.name}

    def stop(self) -> None:
        self.stopped = True


def side_by_side(
    folder: Path, looks: Mapping[str, int], number: int, errors: Mapping[str, BaseException] = {}
) -> tuple[list[set[str]], Any, list[Slow]]:
    """Who ran beside whom as each began, what came of it, and the jobs: a and b, c that reads a, d that reads b."""
    steps = [
        Step("pretrain", {"output": "a.safetensors"}, {}),
        Step("ptq", {"output": "b.safetensors"}, {}),
        Step("ptq", {"source": "a.safetensors", "output": "c.safetensors"}, {}),
        Step("evaluate", {"source": "b.onnx"}, {}),
    ]
    running: list[str] = []
    seen: list[set[str]] = []
    made: list[Slow] = []

    def start(at: int, arguments: list[str]) -> Slow:
        name = "abcd"[at - 1]
        made.append(Slow(name, looks.get(name, 0), running, seen, errors.get(name)))
        return made[-1]

    try:
        out: Any = [
            own["report"]["made"] for own in runner.execute(steps, folder, start, lambda text: None, jobs=number)
        ]
    except (Exception, KeyboardInterrupt) as error:
        out = error
    return seen, out, made


def test_what_failed_a_check_is_done_and_stays_failed(tmp_path: Path) -> None:
    commands = Commands(tmp_path)

    def first_fails(arguments: list[str]) -> dict[str, Any]:
        report = commands(arguments)
        if arguments[0] == "pretrain":
            raise CheckFailed("gate failed", report)
        return report

    done = run(two(), tmp_path, first_fails, commands.told.append, overwrite=False)
    assert commands.names() == ["model", "coded"]
    assert [each["failed"] for each in done] == ["r2 pretrain -> model: gate failed", None]
    assert any("model" in line and "gate failed" in line for line in commands.told)
    again = run(two(), tmp_path, first_fails, commands.told.append, overwrite=False)
    assert commands.names() == [] and [each["failed"] for each in again] == [each["failed"] for each in done]


def test_independent_steps_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PAUSE", 0)
    seen, out, _ = side_by_side(tmp_path / "1", {"b": 5}, 2)
    assert seen == [{"a"}, {"a", "b"}, {"b", "c"}, {"d"}] and out == list("abcd")
    seen, out, _ = side_by_side(tmp_path / "2", {}, 1)
    assert seen == [{"a"}, {"b"}, {"c"}, {"d"}] and out == list("abcd")
    seen, _, _ = side_by_side(tmp_path / "3", {"a": 5}, 9)
    assert seen == [{"a"}, {"a", "b"}, {"a", "d"}, {"c"}]


@pytest.mark.parametrize("kind", [InputError, CheckFailed])
def test_a_step_that_fails_names_itself_and_starts_no_other(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PAUSE", 0)
    seen, error, made = side_by_side(tmp_path, {"b": 5}, 2, {"a": kind("no luck")})
    assert isinstance(error, kind) and str(error) == "r2 pretrain -> a.safetensors: no luck"
    assert len(seen) == 2 and not any(job.stopped for job in made)  # b comes to its end


def test_an_interrupt_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PAUSE", 0)
    _, error, made = side_by_side(tmp_path, {"b": 5}, 2, {"a": KeyboardInterrupt()})
    assert isinstance(error, KeyboardInterrupt) and [job.stopped for job in made] == [False, True]


def test_threads_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [runner.threads_each(number) for number in (1, 2, 3, 9)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert runner.threads_each(2) == 2


@pytest.mark.slow
def test_a_process_gives_its_report_or_its_error(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "1.log"
    report = runner.InOwnProcess(["pretrain", "--dry-run", "--json"], 1, log).report()
    assert report["command"] == "pretrain"
    with pytest.raises(InputError, match="'lnf'.*'linf'"):
        runner.InOwnProcess(["pretrain", "--reg", "lnf", "--json"], 1, log).report()
    assert "linf" in log.read_text()


# --- smoke ---------------------------------------------------------------------------------------------------------


def test_a_trial_has_every_step_once_on_little_data(tmp_path: Path) -> None:
    text = PLACED.replace('run = "pretrain"', 'run = "pretrain"\ndata = "imagefolder:x"\nepochs = 90\nsize = 224')
    text = text.replace('run = "ptq"', 'run = "ptq"\ncalibration = 512\nmin-accuracy = 90')
    text += '\n[[step]]\nrun = "palettize"\nsource = "../other/net.safetensors"\ndata = "imagefolder:x"\nbits = 2\n'
    todo, told = smoke.small(recipe.steps(smoke.reduced(read(tmp_path, text))), tmp_path)
    assert [(step.command, dict(step.options)) for step in todo] == [
        (
            "pretrain",
            {"data": "digits:64", "epochs": 1, "reg": "margin", "seed": 1, "output": "strong-1.safetensors"}
            | {"batch-size": 32},
        ),
        ("ptq", {"weight-bits": 4, "source": "strong-1.safetensors", "output": "strong-1.w4.safetensors"}),
        ("pretrain", {"data": "digits:64", "epochs": 1, "batch-size": 32, "output": "stand-in.safetensors"}),
        (
            "palettize",
            {"source": "stand-in.safetensors", "data": "digits:64", "bits": 2}
            | {"epochs": 1, "batch-size": 32, "hard-epochs": 0},
        ),
    ]
    assert "imagefolder:x is digits:64" in told and any("net.safetensors" in line for line in told)


@pytest.mark.slow
def test_a_trial_of_text_reads_what_it_brings_itself(tmp_path: Path) -> None:
    text = PLACED.replace('run = "pretrain"', 'run = "pretrain"\nmodel = "text:minilm"\ndata = "qnli:x.tsv"')
    todo, told = smoke.small(recipe.steps(smoke.reduced(read(tmp_path, text))), tmp_path / "made")
    options = todo[0].options
    assert options["model"] == f"text:{tmp_path}/made/text/network" and "text:minilm is " in " ".join(told)
    assert not (tmp_path / "made").exists()
    pytest.importorskip("transformers")
    smoke.provide(todo, tmp_path / "made")
    assert Path(options["data"].removeprefix("qnli:")).read_text().count("entailment") == 128
    assert Path(options["model"].removeprefix("text:"), "config.json").exists()
