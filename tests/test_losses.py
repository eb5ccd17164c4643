"""What a network learns: losses by name, the user's own, and the distance to the float network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import r2cli
from conftest import R2
from r2cli.calibration import deployed
from r2cli.calibration.result import Result
from r2cli.data import Data, losses, own
from r2cli.errors import InputError


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lost(name: str, outputs: Any, target: Any, smoothing: float = 0.0) -> float:
    names = ("a", "b") if isinstance(outputs, tuple) else ("a",)
    return float(losses.of_target(losses.LOSSES[name], names, smoothing)(drawn(1), outputs, target))


def test_losses_by_name_are_those_of_torch() -> None:
    logits, labels, numbers = drawn(6, 5), torch.arange(6) % 5, drawn(6, 5, seed=1)
    assert lost("cross-entropy", logits, labels, 0.1) == pytest.approx(
        float(F.cross_entropy(logits, labels, label_smoothing=0.1))
    )
    maps, wanted = drawn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    plain = lost("cross-entropy", (maps, drawn(2)), wanted)
    assert plain == pytest.approx(float(F.cross_entropy(maps, wanted)))
    wanted[0] = 255
    assert lost("cross-entropy", maps, wanted) == pytest.approx(float(F.cross_entropy(maps[1:], wanted[1:])))
    smooth = float(F.cross_entropy(maps[1:], wanted[1:], label_smoothing=0.1))
    assert lost("cross-entropy", maps, wanted, 0.1) == pytest.approx(smooth)
    assert lost("cross-entropy", maps, torch.full_like(wanted, 255)) == 0  # no label counts
    assert lost("mse", logits, numbers) == pytest.approx(float((logits - numbers).square().mean()))
    assert lost("l1", logits[:, :1], numbers[:, 0]) == pytest.approx(float((logits[:, 0] - numbers[:, 0]).abs().mean()))
    share = numbers.sigmoid()
    assert lost("bce", logits, share) == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, share)))
    rows = drawn(2, 7, 4)
    words = torch.tensor([[1, 2, -1], [3, -1, -1]])
    expected = F.ctc_loss(
        rows.log_softmax(2).transpose(0, 1), words.clamp_min(0), torch.tensor([7, 7]), torch.tensor([2, 1])
    )
    assert lost("ctc", rows, words) == pytest.approx(float(expected))


@torch.no_grad()
def test_the_distance_to_a_network_is_zero_for_itself_and_has_no_unit() -> None:
    net, x = nn.Linear(3, 4), drawn(8, 3)
    other = nn.Linear(3, 4)
    for decides in (True, False):
        learned = losses.of_teacher(net, decides=decides)
        assert float(learned(x, net(x), None)) == pytest.approx(0, abs=1e-6)
        assert float(learned(x, other(x), None)) > 0.1
    same = losses.distance([x, 100 * x], [x + 1, 100 * x + 100], decides=False)
    assert float(same) == pytest.approx(float(losses.distance([x], [x + 1], decides=False)))


OWN = """
import torch
def square(outputs, target):
    return (outputs - target).square().mean()
def many(outputs, target):
    return outputs
def number(outputs, target):
    return 1.0
def apart(outputs, target):
    return outputs.detach().mean()
def raises(outputs, target):
    return outputs["map"]
"""

WRONG: dict[str, tuple[str, Any, str]] = {
    "labels outside": ("cross-entropy", torch.tensor([0, 1, 9]), "the label 9 is none of the network's 4 classes"),
    "no labels": ("cross-entropy", None, "labels are integers, and the target is missing"),
    "numbers": ("cross-entropy", drawn(3), "the target is float32"),
    "another shape": ("mse", drawn(3, 5), r"gives \(3, 4\) and the target is \(3, 5\)"),
    "no words": ("ctc", drawn(3), r"ctc takes logits \(n, time, classes\)"),
    "unknown": ("mes", None, "unknown --loss 'mes'"),
    "many": ("own.py:many", None, r"--loss own.py:many gave float32 \(3, 4\): it must return one number"),
    "number": ("own.py:number", None, "--loss own.py:number gave a float: it must return one number"),
    "apart": ("own.py:apart", None, "--loss own.py:apart gave a number without a gradient"),
    "raises": ("own.py:raises", None, "--loss own.py:raises raised .*: it takes"),
    "no function": ("own.py:cube", None, "unknown loss in own.py 'cube'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_loss_or_no_target_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, target, why = WRONG[kind]
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=why):
        losses.of_target(losses.named(name), ("a",))(drawn(1), drawn(3, 4).requires_grad_(), target)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def unlabelled(count: int = 96) -> Data:
    return own.to_data("x", ([(drawn(count, 4), None)], [(drawn(32, 4, seed=9), None)]))


@torch.no_grad()
def noise(made: Result, x: Tensor) -> float:
    assert made.original is not None
    wanted = deployed.network(made.original)(x)
    return float((made.network(x) - wanted).square().sum() / wanted.square().sum())


def test_two_bits_are_learned_from_the_float_network_without_labels() -> None:
    torch.manual_seed(0)
    net, source, x = Net().eval(), unlabelled(), drawn(32, 4, seed=9)
    config = r2cli.QatConfig(weight_bits=2, act_bits="8", batch_size=16, epochs=1, lr=1e-9)
    before, after = (
        r2cli.finetune(net, source, one)
        for one in (config, r2cli.QatConfig(**{**config.__dict__, "epochs": 12, "lr": 0.02}))
    )
    assert noise(after, x) < 0.5 * noise(before, x)
    assert after.options["loss"] == "distill" and after.epochs[-1].value is None
    palettes = r2cli.palettize(net, source, r2cli.PalettizeConfig(bits=1, epochs=2, hard_epochs=1, batch_size=32))
    assert palettes.options["loss"] == "distill" and len(palettes.layers) == 2


def test_bits_are_chosen_without_labels_by_what_the_network_itself_gives() -> None:
    net = Net().eval()
    made = r2cli.quantize(net, unlabelled(), r2cli.PtqConfig(target_bits=4.0, act_bits="none"))
    assert len(made.bits) == 2 and all(value > 0 for each in made.bits for value in each.sensitivity.values())


def test_a_regression_is_trained_from_the_command_line(r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(
        OWN
        + """
from torch import nn
def net():
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1))
def data():
    x = torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
    return [(x, x[:, :1] - 2 * x[:, 1:2])]
"""
    )
    monkeypatch.chdir(tmp_path)
    given = ("--data", "own.py:data", "--metric", "r2", "--json")
    ran = r2("pretrain", "--model", "own.py:net", *given, "--epochs", 30, "--batch-size", 16, "--lr", 0.05)
    assert ran.code == 0 and json.loads(ran.out)["metric"]["value"] > 0.95, ran.err
    assert "R2 0.9" in ran.err
    more = ("--model", "own.py:net", *given, "--epochs", 3, "--batch-size", 16, "--lr", 0.01)
    ran = r2("qat", "model.safetensors", *more, "--loss", "own.py:square", "--weight-bits", 4, "--max-drop", 0.1)
    report = json.loads(ran.out)
    assert ran.code == 0 and report["options"]["loss"] == "own.py:square", ran.err
    assert report["trained_top1"] is None and report["trained_value"] > 0.8
    ran = r2("pretrain", "--model", "own.py:net", "--data", "own.py:data", "-o", "x.safetensors")
    assert ran.code == 2 and "has number targets: give --metric mse, or --loss mse" in ran.err
