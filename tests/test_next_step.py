"""What commands say to do next: lines that a shell reads as they were meant, and sentences with the way on."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import typer

from conftest import R2
from r2cli.cli import main
from r2cli.config import layer_form

ROOT = Path(__file__).parent.parent
NETS = "from torch import nn\n\n\ndef mlp():\n    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))\n"
LINES = (
    "pretrain --model 'a b/nets.py:mlp' --data 'npz:a b/labels.npz' --epochs 1 -o 'a b/own.safetensors'",
    "ptq 'a b/own.safetensors' --model 'a b/nets.py:mlp' --data 'npz:a b/labels.npz'",
    "analyze 'a b/float.safetensors'",
    "analyze 'a b/float.safetensors' -o 'a b/page.html' --overwrite",
    "cost 'a b/float.safetensors' --widths 8 -o 'a b/cost.csv'",
    "ptq 'a b/float.safetensors' --data digits:64 -o 'a b/codes.safetensors'",
    "analyze 'a b/codes.onnx' -o 'a b/page.html' --overwrite",
    "compare 'a b/float.safetensors' 'a b/codes.safetensors' --data digits:64 --samples 8 --mend 0",
    "export 'a b/codes.safetensors' -o 'a b/again.onnx' --no-eval",
    "verify 'a b/codes.onnx' --against 'a b/codes.safetensors' --data digits:64",
    "palettize 'a b/float.safetensors' --bits 4 --method kmeans --data digits:64 -o 'a b/palettes.safetensors'",
    "init 'a b/float.safetensors' --data digits:64 -o 'a b/mine.toml'",
    "recipe cp quickstart 'a b/copy.toml'",
)


def test_every_next_line_reads_paths_with_spaces_as_one_word(
    r2: R2, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a b").mkdir()
    shutil.copy(trained, "a b/float.safetensors")
    Path("a b/nets.py").write_text(NETS)
    x = np.random.default_rng(0).standard_normal((64, 8)).astype("float32")
    np.savez("a b/labels.npz", x=x, target=np.arange(64) % 3)
    commands: Any = typer.main.get_command(main.app)
    for line in LINES:
        ran = r2(*shlex.split(line))
        assert ran.code == 0, (line, ran.err)
        (following,) = [own.removeprefix("next: ") for own in ran.out.splitlines() if own.startswith("next: ")]
        program, command, *words = shlex.split(following)
        assert program == "r2" and any(" " in word for word in words), following
        commands.commands[command].make_context(command, list(words))
        named = [word.removeprefix("npz:").removesuffix(":mlp") for word in words if " " in word]
        assert all(Path(word).exists() for word in named), following
    assert "`r2 run 'a b/mine.toml'`" in Path("a b/mine.toml").read_text().splitlines()[1]


def test_a_layer_with_a_quote_in_its_name_is_one_word() -> None:
    (option,) = layer_form.shown({"it's": 8})
    assert shlex.split(option) == ["--keep", "it's=8"]


RECIPE = """
[matrix]
seed = [0, 1]

[[step]]
run = "pretrain"
model = "resnet8"
size = 8
data = "digits:64"
epochs = 100000
seed = "{seed}"
output = "s{seed}.safetensors"
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_is_stopped_says_how_it_goes_on(jobs: int, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(RECIPE)
    process = subprocess.Popen(
        [sys.executable, "-m", "r2cli", "run", "small.toml", "--jobs", str(jobs), "--work-dir", "here"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "here/s0.resume.safetensors").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "here keeps what is done: the same line goes on\n" in err
    logs = [line.partition("  # log: ")[2] for line in err.splitlines() if line.startswith("[")]
    assert logs == ([""] if jobs == 1 else [str(Path("here/logs/1.log")), str(Path("here/logs/2.log"))])


def test_a_table_of_a_recipe_without_titles_is_told_the_form(r2: R2, tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(f'{RECIPE}\n[[table]]\nrun = "pretrain"\nrows = ["seed"]\nmetrics = ["metric.value"]\n')
    ran = r2("run", recipe)
    assert ran.code == 2 and 'metrics = { top1 = "metric.value" }' in ran.err


def test_weights_that_are_cut_off_are_said_to_be(r2: R2, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.pth", tmp_path / "trunc.pth"
    for zipped in (True, False):
        torch.save({"a": torch.zeros(1000)}, whole, _use_new_zipfile_serialization=zipped)
        cut.write_bytes(whole.read_bytes()[:2000])
        ran = r2("ptq", "--model", "resnet8", "--weights", cut, "--data", "digits:64")
        assert ran.code == 2 and ran.err == f"r2: {cut} is cut off or damaged: copy or write it again\n"


def test_number_targets_without_a_metric_are_told_which_to_give(
    r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS.replace("16, 3", "16, 1"))
    x = np.random.default_rng(0).standard_normal((64, 8)).astype("float32")
    np.savez("reg.npz", x=x, target=x.sum(1, keepdims=True))
    np.savez("bare.npz", x=x)
    line = ["pretrain", "--model", "nets.py:mlp", "--epochs", 1, "--data"]
    ran = r2(*line, "npz:reg.npz")
    assert ran.code == 2 and "npz:reg.npz has number targets: give --metric mse, or --loss mse" in ran.err
    assert "give data with targets" in r2(*line, "npz:bare.npz").err
    for option in ("--metric", "--loss"):
        ran = r2(*line, "npz:reg.npz", option, "mse", "--overwrite")
        assert ran.code == 0, ran.err


@pytest.mark.parametrize(("size", "other"), [(32, "imagenet"), (224, "small")])
def test_weights_of_another_stem_are_told_which(size: int, other: str, r2: R2, tmp_path: Path) -> None:
    network = torchvision.models.resnet18(num_classes=10)
    if other == "small":
        network.conv1 = torch.nn.Conv2d(3, 64, 3, bias=False)
    torch.save(network.state_dict(), tmp_path / "own.pth")
    line = ["export", "--model", "resnet18", "--weights", tmp_path / "own.pth", "--data", f"fake:3x{size}x{size}:10"]
    ran = r2(*line, "-o", tmp_path / "own.onnx")
    assert ran.code == 2 and ran.err.rstrip().endswith(f"(give --stem {other})"), ran.err
    if other == "imagenet":
        ran = r2(*line, "-o", tmp_path / "own.onnx", "--stem", other, "--dry-run")
        assert ran.code == 0, ran.err
        network.layer1[0].conv1 = torch.nn.Conv2d(64, 64, 1, bias=False)
        torch.save(network.state_dict(), tmp_path / "own.pth")
        assert "--stem" not in r2(*line, "-o", tmp_path / "other.onnx").err
