"""`r2 run` and `r2 recipe` as commands, and the shipped recipes in the wheel."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import R2
from r2cli.errors import InputError
from r2cli.train import state
from r2cli.train.hooks import Epoch
from r2cli.workflow import recipe

ROOT = Path(__file__).parent.parent

SMALL = """# Two small networks.
[matrix]
reg = ["none", "linf"]

[[step]]
run = "pretrain"
model = "resnet8"
data = "digits:64"
size = 8
epochs = 1
reg = "{reg}"
output = "{reg}.safetensors"

[[step]]
run = "ptq"
source = "{reg}.safetensors"
output = "{reg}.w8.safetensors"

[[table]]
title = "small"
run = "ptq"
rows = ["reg"]
metrics = { "top-1" = "top1" }
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "line", "named"),
    [
        ("epochs = 1", "epoch = 1", 10, "--epochs"),
        ("epochs = 1", 'epochs = "one"', 10, "--epochs"),
        ("epochs = 1", "epochs = 0", 10, "--epochs"),
        ("epochs = 1", "resume = true\nsymetric = true", 11, "--symetric"),
        ("source =", "symmetric = false\nsource =", 16, "asymmetric = true"),
        ("source =", "nosuch = false\nsource =", 16, "--nosuch"),
        ("source =", 'method = "adarond"\nsource =', 16, "did you mean 'adaround'"),
        ("source =", "weight-bits = 9\nsource =", 16, "give 1 to 8"),
        ("source =", 'keep = "conv"\nsource =', 16, "PATTERN=BITS"),
    ],
)
def test_what_a_command_does_not_take_has_its_line(
    old: str, new: str, line: int, named: str, small: Path, r2: R2
) -> None:
    small.write_text(SMALL.replace(old, new))
    ran = r2("run", "small.toml", "--json")
    assert ran.code == 2 and json.loads(ran.out)["exit_code"] == 2
    assert f"small.toml:{line}: r2 p" in ran.err and named in ran.err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_what_only_the_step_can_see_has_its_line_too(small: Path, r2: R2) -> None:
    small.write_text(SMALL.replace("source =", 'keep = "nosuch=4"\nsource ='))
    ran = r2("run", "small.toml")
    assert ran.code == 2 and Path("runs/small/none.safetensors").exists()
    assert "small.toml:16: r2 ptq -> none.w8.safetensors: " in ran.err and "'nosuch'" in ran.err


# One of the two networks' files is larger than it may be.
ONE_TOO_LARGE = (
    SMALL.replace("source =", 'max-bytes = "{reg.limit}"\nsource =')
    .replace(
        'reg = ["none", "linf"]',
        'reg = [{ name = "none", reg = "none", limit = 9 }, { name = "linf", reg = "linf" }]',
    )
    .replace('reg = "{reg}"', 'reg = "{reg.reg}"')
)


@pytest.mark.slow
def test_what_fails_a_check_has_a_dagger_and_stops_nothing(small: Path, r2: R2) -> None:
    small.write_text(ONE_TOO_LARGE)
    for _ in range(2):  # made, and remembered
        ran = r2("run", "small.toml", "--json")
        (table,) = json.loads(ran.out)["tables"]
        assert ran.code == 1 and [bool(step["failed"]) for step in json.loads(ran.out)["results"]].count(True) == 1
        cells = {row["reg"]: row["top-1"] for row in table["rows"]}
        assert "†" in cells["none"] and "†" not in cells["linf"]
        assert len(table["failures"]) == 1 and "--max-bytes 9" in table["failures"][0]
        assert "†" in Path("runs/small/tables.md").read_text()


@pytest.mark.slow
def test_a_gate_of_training_stops_nothing_either(small: Path, r2: R2) -> None:
    small.write_text(SMALL.replace("epochs = 1", "epochs = 1\nmin-accuracy = 99.9"))
    ran = r2("run", "small.toml")
    assert ran.code == 1 and "2 of 4 steps failed a check: " in ran.err
    assert "†" not in ran.out and Path("runs/small/linf.w8.onnx").exists()


NOISY = """import torch


def net(num_classes: int) -> torch.nn.Module:
    print("hello")
    layers = torch.nn.Conv2d(1, num_classes, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    return torch.nn.Sequential(*layers)
"""


@pytest.mark.slow
def test_side_by_side_gives_the_same_files_tables_and_failures(
    small: Path, r2: R2, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of their own do what this one does, whatever a network prints, and whatever misses its gate."""
    Path("noisy.py").write_text(NOISY)
    small.write_text(
        ONE_TOO_LARGE.replace('model = "resnet8"', 'model = "noisy.py:net"')
        .replace("source =", 'model = "noisy.py:net"\nsource =')
        .replace("epochs = 1", "epochs = 1\nmin-accuracy = 99.9")
    )
    one = r2("run", "small.toml", "--work-dir", "one", "--json")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # one for each of two jobs: sums depend on the number
    two = r2("run", "small.toml", "--work-dir", "two", "--jobs", 2, "--json")
    assert one.code == two.code == 1, one.err + two.err
    assert "hello" not in one.out + two.out and "hello" in one.err
    told, again = json.loads(one.out), json.loads(two.out)
    assert told["tables"] == again["tables"]
    failed = [
        [step["failed"] and step["failed"].replace("two/", "one/") for step in each["results"]]
        for each in (told, again)
    ]
    assert failed[0] == failed[1] and [bool(each) for each in failed[0]].count(True) == 3
    for name in ("none.w8.onnx", "linf.w8.safetensors", "tables.md", "tables.csv", "tables.json", "tables.png"):
        assert (Path("one") / name).read_bytes() == (Path("two") / name).read_bytes()
    (table,) = json.loads(Path("one/tables.json").read_text())
    assert [(row["reg"], row["n"]) for row in table["records"]] == [("none", 1), ("linf", 1)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there a process cannot be asked to end")
def test_a_run_that_ignores_interrupts_ends_when_asked_to(small: Path) -> None:
    """As `r2 run ... &` in a script: a shell without job control lets such a command ignore interrupts."""
    small.write_text(SMALL.replace("epochs = 1", "epochs = 100000"))
    line = [sys.executable, "-m", "r2cli", "run", "small.toml", "--jobs", "2", "--work-dir", "here"]
    started = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *line],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with started:
        try:
            while not Path("here/none.resume.safetensors").exists():
                assert started.poll() is None, started.stderr and started.stderr.read()
                time.sleep(0.1)
            started.terminate()
            assert started.wait(60) == 130
        finally:
            started.kill()


@pytest.mark.slow
def test_a_source_that_does_not_say_where_its_data_is_is_told_before_any_work(small: Path, r2: R2) -> None:
    small.write_text(SMALL.replace("digits:64", "imagefolder:here"))
    ran = r2("run", "small.toml")
    assert ran.code == 2 and "none.safetensors does not record where its imagefolder is: give data here" in ran.err
    assert "small.toml:14: r2 ptq -> none.w8.safetensors" in ran.err and not Path("small").exists()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            'source = "{reg}',
            'source = "{reg}x',
            "16: r2 ptq -> none.w8.safetensors: 'nonex.safetensors' is not in runs/small",
        ),
        (
            'output = "{reg}.w8',
            'output = "w8',
            "17: r2 ptq -> w8.safetensors: a step before writes 'w8.safetensors' too",
        ),
    ],
)
def test_files_that_do_not_fit_together_are_told_before_any_work(
    old: str, new: str, told: str, small: Path, r2: R2
) -> None:
    small.write_text(SMALL.replace(old, new))
    ran = r2("run", small)
    assert ran.code == 2 and told in ran.err and not list(Path("runs").rglob("*.safetensors")), ran.err


def test_files_that_stand_elsewhere_or_have_names_of_their_own_are_no_mistake(small: Path) -> None:
    def step(command: str, **options: str) -> recipe.Step:
        return recipe.Step(command, options, {})

    Path("other").mkdir()
    Path("other/net.safetensors").touch()
    folder = Path("runs/small")  # which is not there yet
    for steps in (
        [step("ptq", source="../../other/net.safetensors", output="a.safetensors")],
        [step("ptq", source=str(small.parent / "other/net.safetensors"), output="a.safetensors")],
        [step("pretrain", output="m.safetensors"), step("ptq", source="./m.safetensors", output="a.safetensors")],
        [step("pretrain", output="m.safetensors"), step("evaluate", source="m.tflite")],
        [step("ptq", source="../../other/net.safetensors"), step("evaluate", source="net.w8a8-none.onnx")],
    ):
        recipe.require_files(steps, folder)
    with pytest.raises(InputError, match="net.safetensors' is not in"):
        recipe.require_files([step("ptq", source="../other/net.safetensors", output="a.safetensors")], folder)


@pytest.mark.slow
def test_a_step_s_exit_code_is_the_run_s(small: Path, r2: R2) -> None:
    small.write_text(SMALL.replace("source =", "min-accuracy = 100\nsource ="))
    ran = r2("run", "small.toml", "--set", "matrix.reg=none")
    assert ran.code == 1 and "small.toml:16: r2 ptq -> none.w8.safetensors: gate failed" in ran.err


@pytest.mark.slow
def test_a_stopped_run_goes_on_within_the_step(small: Path, r2: R2, monkeypatch: pytest.MonkeyPatch) -> None:
    training, *_ = SMALL.split('[[step]]\nrun = "ptq"')
    small.write_text(training.replace("epochs = 1", "epochs = 3"))
    command = ("run", "small.toml", "--only", "linf.safetensors", "--work-dir")
    save = state.save

    def stop(state: state.State, history: Sequence[Epoch]) -> None:
        save(state, history)
        if len(history) == 2:
            raise KeyboardInterrupt

    assert r2(*command, "whole").code == 0
    monkeypatch.setattr(state, "save", stop)
    assert r2(*command, "stopped").code == 130
    assert Path("stopped/linf.resume.safetensors").exists() and not Path("stopped/linf.safetensors").exists()
    monkeypatch.setattr(state, "save", save)
    again = r2(*command, "stopped")
    assert again.code == 0 and "epoch 3/3" in again.err and "epoch 2/3" not in again.err
    assert Path("whole/linf.safetensors").read_bytes() == Path("stopped/linf.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_is_done_says_so_and_a_second_one_at_the_same_time_is_refused(small: Path, r2: R2) -> None:
    command = ("run", "small.toml", "--only", "linf.safetensors", "--work-dir", "here", "--resume")
    first = r2(*command, "--json")
    assert first.code == 0 and json.loads(first.out)["finished_before"] is False
    again = r2(*command)
    assert again.code == 0 and "all 2 steps were done with the same options" in again.out
    assert json.loads(r2(*command, "--json").out)["finished_before"] is True
    Path("here/linf.safetensors").write_bytes(b"another")
    changed = r2(*command)
    assert (
        changed.code == 2 and "small.toml" in changed.err and "linf.safetensors is not as it was written" in changed.err
    )
    hold = "import sys; from pathlib import Path; from r2cli.storage import atomic\n"
    hold += "with atomic.locked(Path('here/results.json')):\n    print(flush=True)\n    sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        refused = r2(*command[:-1])
        other.kill()
    assert refused.code == 2 and f"another run (process {other.pid} on " in refused.err and "--work-dir" in refused.err


@pytest.mark.slow
def test_a_trial_writes_elsewhere_and_says_so(small: Path, r2: R2) -> None:
    ran = r2("run", "small.toml", "--smoke")
    assert ran.code == 0, ran.err
    assert "SMOKE" in ran.out and "64" in ran.err
    assert Path("runs/small-smoke/linf.w8.onnx").exists() and not Path("runs/small").exists()


# --- r2 recipe -----------------------------------------------------------------------------------------------------


def test_recipes_are_listed_shown_and_copied(r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = {own["name"]: own for own in json.loads(r2("recipe", "ls", "--json").out)["recipes"]}
    names = {str(path.relative_to(ROOT / "recipes").with_suffix("")) for path in (ROOT / "recipes").rglob("*.toml")}
    assert listed.keys() == names and all(own["about"] for own in listed.values())
    text = (ROOT / "recipes/quickstart.toml").read_text()
    assert r2("recipe", "show", "quickstart").out == text
    assert r2("recipe", "cp", "quickstart").code == 0 and Path("quickstart.toml").read_text() == text
    assert r2("recipe", "cp", "quickstart").code == 2
    assert r2("recipe", "cp", "cpu/digits", "mine.toml").code == 0 and Path("mine.toml").exists()
    assert r2("recipe", "cp", "cpu/digits", "mine").code == 2
    wrong = r2("recipe", "show", "quikstart")
    assert wrong.code == 2 and "'quickstart'" in wrong.err


@pytest.mark.slow
def test_a_shipped_recipe_runs_by_its_name(r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [r2("run", name, "--dry-run").out for name in ("cpu/digits", "recipes/cpu/digits.toml")]
    assert lines[0] == lines[1] and "runs/cpu/digits/" in lines[0]
    shutil.copy(ROOT / "recipes/quickstart.toml", "cpu.toml")
    assert "runs/cpu/none" in r2("run", "cpu.toml", "--dry-run").out  # a file of one's own


@pytest.mark.slow
def test_the_wheel_has_the_recipes(tmp_path: Path) -> None:
    for name in ("r2cli", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    made = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(tmp_path)], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, suffix in (("r2cli", ".py"), ("recipes", ".toml")):
        for path in (tmp_path / folder).rglob(f"*{suffix}"):
            name = str(path.relative_to(tmp_path))
            assert name in inside or f"r2cli/{name}" in inside, name
    assert "r2cli/recipes/cpu/digits.toml" in inside and "r2cli/analysis/page.html" in inside
