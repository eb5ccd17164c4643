"""Several processes that train together: the same result as one process, one writer, and a stop that ends the job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import r2cli
from r2cli import data
from r2cli.data.splits import RowShare
from r2cli.palettes import learners, tables
from r2cli.quantized.palette import Palette
from r2cli.registry import DkmOptions
from r2cli.storage import checkpoint
from r2cli.train import hooks, loop, regularizers
from r2cli.train.loop import TrainSettings

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
PALETTES = ("dkm", "shared")


class Double(nn.Module):
    """A small convolutional network without BatchNorm, in float64 as it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.linear = nn.Linear(8 * 36, 10)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.conv(x.to(self.linear.bias.dtype)).relu().flatten(1))
        return out


def fit(folder: Path, resume: bool = False, epochs: int = 2) -> nn.Module:
    loop.seed_everything(0)
    network = Double()
    settings = TrainSettings(epochs, 70, 0.1, 0.9, 1e-4, 0.1, 0.1, 0.1, 0, clip_grad=1.0, ema=0.9)
    watch = hooks.Progress(lambda steps: None, lambda epoch: None)
    loop.fit(
        network,
        data.load("digits", size=8),
        settings,
        device=CPU,
        setting=regularizers.RegularizerSpec("margin", 0.1),
        state=folder / "state.safetensors",
        resume=resume,
        watch=watch,
    )
    return network


def fit_palettes(folder: Path, method: str) -> dict[str, Tensor]:
    """The tables and codes that training with `method` gives `Double`, soft in one epoch and hard in another."""
    loop.seed_everything(0)
    network = Double().float()  # hard weights are float32
    made: dict[str, learners.Learner] = {}
    for name in ("conv", "linear"):
        weight, form = network.get_submodule(name).weight, tables.PaletteForm(2, 1, None, 32)
        assert isinstance(weight, Tensor)
        made[name] = learners.learner_of(method)(weight.detach(), form, DkmOptions(), torch.Generator().manual_seed(0))
    learners.put_on(network, made)

    def before_epoch(number: int) -> None:
        for learner, weight in learners.each(network, made):
            learner.before_epoch(weight, 0.5 if number == 1 else None)

    own = [learner.centroids for learner in made.values() if isinstance(learner.centroids, nn.Parameter)]
    groups = [{"params": own, "weight_decay": 0.0, "base_lr": 1e-3}] if own else []
    loop.fit(
        network,
        data.load("digits", size=8),
        TrainSettings(2, 70, 0.02, 0.9, 1e-4, 0.1, 0.0, 0.0, 0),
        device=CPU,
        setting=hooks.TrainHooks({}, groups, before_epoch, lambda number: None),
        state=folder / "state.safetensors",
        resume=False,
        watch=hooks.Progress(lambda steps: None, lambda epoch: None),
    )
    coded = learners.take_off(network, made)
    found = {f"{name}.lut": one.codec.lut for name, one in coded.items() if isinstance(one.codec, Palette)}
    return found | {f"{name}.codes": one.codes for name, one in coded.items()}


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*start, *arguments], capture_output=True, text=True)


def test_shares_make_up_the_batch() -> None:
    for count in (1, 2, 7, 64):
        parts = torch.cat([RowShare(rank, 3).positions(count) for rank in range(3)])
        assert parts.sort().values.equal(torch.arange(count))


@pytest.mark.parametrize("augment", [False, True])
def test_every_process_gets_its_images_of_the_same_batches(augment: bool) -> None:
    def batches(share: RowShare) -> list[tuple[Tensor, Tensor]]:
        shuffle = torch.Generator().manual_seed(3)
        return list(source.train.batches(64, CPU, shuffle, augment=augment, share=share))

    source = data.load("fake:1x8x8:4")
    whole, parts = batches(RowShare()), [batches(RowShare(rank, 2)) for rank in range(2)]
    for batch, (images, labels) in enumerate(whole):
        for rank, part in enumerate(parts):
            assert part[batch][0].equal(images[rank::2]) and part[batch][1].equal(labels[rank::2])


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes trained: the network, and its palettes with each method."""
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(__file__, str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by one process, a new one: after thousands of tests in a process torch has crashed here (signal 11)."""
    folder = tmp_path_factory.mktemp("alone")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_train_what_one_does(together: Path, alone: Path) -> None:
    # Batches of 70 of 1,200 images: the last one has 10, and each process half of it.
    one, two = (checkpoint.load_tensors(folder / "network.safetensors")[0] for folder in (alone, together))
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-9)
    first, second = (
        json.loads(checkpoint.load_tensors(folder / "network" / "state.safetensors")[1]["r2_resume"])["history"]
        for folder in (alone, together)
    )
    assert [epoch["top1"] for epoch in first] == [epoch["top1"] for epoch in second]
    assert [epoch["loss"] for epoch in first] == pytest.approx([epoch["loss"] for epoch in second], rel=1e-6)


@pytest.mark.parametrize("method", PALETTES)
def test_two_processes_train_the_palettes_that_one_does(method: str, together: Path, alone: Path) -> None:
    one, two = (checkpoint.load_tensors(folder / f"{method}.safetensors")[0] for folder in (alone, together))
    assert set(one) == set(two)
    for name, tensor in one.items():
        if name.endswith("lut"):  # of float32: the mean of two halves' gradients rounds otherwise
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
        else:  # a weight in the middle of two centroids may go to either
            assert float((two[name] == tensor).double().mean()) > 0.995


def command(folder: Path, *more: str) -> list[str]:
    options = ["--model", "resnet8", "--size", "8", "--epochs", "2", "--device", "cpu"]
    return ["-m", "r2cli", "pretrain", *options, "-o", str(folder / "model.safetensors"), *more]


def test_one_process_prints_and_writes_and_a_stopped_run_goes_on_with_another_number(tmp_path: Path) -> None:
    done = torchrun(*command(tmp_path, "--json"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one object: the other process printed nothing
    assert report["top1"] > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.manifest.json", "model.safetensors"]
    # A run of two processes that was stopped after its first epoch goes on in one.
    stop = "import sys; from r2cli.train import state\nreal = state.save\n"
    stop += "def once(*given):\n    real(*given)\n    sys.exit(9)\nstate.save = once\n"
    script = tmp_path / "stopping.py"
    script.write_text(stop + "from r2cli.cli.main import main\nmain()\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    assert torchrun(str(script), *command(broken)[2:]).returncode != 0  # one that dies ends the job
    assert [path.name for path in broken.iterdir()] == ["model.resume.safetensors"]
    alone = subprocess.run([sys.executable, *command(broken, "--resume", "--json")], capture_output=True, text=True)
    assert alone.returncode == 0 and len(json.loads(alone.stdout)["epochs"]) == 2
    assert sorted(path.name for path in broken.iterdir()) == ["model.manifest.json", "model.safetensors"]


@pytest.mark.parametrize("method", ["lsq", "ewgs"])
def test_quantizers_are_trained_by_two_processes(trained: Path, tmp_path: Path, method: str) -> None:
    """BatchNorm sees a process's own images, so that the weights are not those of one process; their accuracy is."""
    config = r2cli.QatConfig(method=method, weight_bits=4, act_bits=4, epochs=2, device="cpu")
    alone = r2cli.finetune(trained, None, config).epochs[-1].top1
    options = ["--method", method, "--weight-bits", "4", "--act-bits", "4", "--epochs", "2", "--device", "cpu"]
    output = tmp_path / "2.safetensors"
    done = torchrun("-m", "r2cli", "qat", str(trained), *options, "-o", str(output), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] and report["top1"] > 85 and abs(alone - report["top1"]) < 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.manifest.json", "2.onnx", "2.safetensors"]


def test_a_command_for_one_process_says_so(tmp_path: Path) -> None:
    alone = [sys.executable, "-m", "r2cli", "evaluate", str(tmp_path / "none.onnx")]
    done = subprocess.run(alone, capture_output=True, text=True, env=os.environ | {"WORLD_SIZE": "2", "RANK": "1"})
    assert done.returncode == 2 and "(process 1) r2 evaluate runs in one process" in done.stderr


if __name__ == "__main__":
    for name in ("network", *PALETTES):
        folder = Path(sys.argv[1], name)
        folder.mkdir(exist_ok=True)
        result = fit(folder).state_dict() if name == "network" else fit_palettes(folder, name)
        if os.environ.get("RANK", "0") == "0":
            checkpoint.save_tensors(folder.with_suffix(".safetensors"), result, {})
