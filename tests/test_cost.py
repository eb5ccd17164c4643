"""Budgets of any cost: tables, what outputs say of a layer, layers measured alone, the smallest file that is enough."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import r2cli
from conftest import R2
from r2cli import data
from r2cli.deploy import layer_cost, vela
from r2cli.errors import InputError, R2Error
from r2cli.graph.read import trace
from r2cli.models import build
from r2cli.ptq import bit_budget, cost_table, output_change, post_training
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import Checkpoint, ModelSpec

CPU = torch.device("cpu")
LAYERS = {"conv": "Conv 16x1x3x3", "fc.a": "Gemm 10x64", "fc.b": "Gemm 10x64"}


@pytest.fixture(scope="module")
def made(trained: Path) -> Checkpoint:
    return checkpoint.load(trained)


def _table(folder: Path, *rows: str, head: str = "layer,width,cost") -> Path:
    path = folder / "cost.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def test_a_table_names_layers_means_them_by_patterns_or_by_operator_and_shape(tmp_path: Path) -> None:
    rows = ("fc.b,W4A8,7", "*,8,1", "fc.*,8,2", "*,W4A8,3", "Gemm 10x64,W4A8,5", "*,float,9")
    found = cost_table.of_layers(cost_table.read(_table(tmp_path, *rows)), LAYERS)
    assert found == {
        "conv": {8: 1, "W4A8": 3, "float": 9},
        "fc.a": {8: 2, "W4A8": 5, "float": 9},
        "fc.b": {8: 2, "W4A8": 7, "float": 9},
    }
    text = cost_table.written([("conv", 8, 1.5), ("fc.a", "W4A8", 2)])
    assert text == "layer,width,cost\nconv,8,1.5\nfc.a,W4A8,2\n"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (("conv,8,1", "fc.*,8,1", "conv,4,1"), "no cost of 'fc.a' at 4, 'fc.b' at 4"),
        (("*,8,1", "cnv,8,1"), "did you mean 'conv'"),
        (("*,8,many",), r"line 2: \*,8,many"),
        (("*,8,-1",), "line 2"),
        (("*,W9,1",), "no width in line 2: 'W9'"),
        ((), "first line is layer,width,cost"),
    ],
)
def test_a_table_with_holes_or_errors_is_refused_by_name(rows: tuple[str, ...], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        cost_table.of_layers(cost_table.read(_table(tmp_path, *rows)), LAYERS)
    with pytest.raises(InputError, match="cannot be read"):
        cost_table.read(tmp_path / "none.csv")


def test_outputs_say_what_rounding_one_layer_changes() -> None:
    """Against the whole network run again with that layer rounded; a change twice as large counts twice."""
    torch.manual_seed(0)
    net = trace(build(ModelSpec("resnet8", 10, 1, "small")).eval(), torch.zeros(2, 1, 8, 8))
    x = torch.randn(12, 1, 8, 8)
    name = "stages.1.0.shortcut.0"
    weight = net.get_parameter(f"{name}.weight").detach().clone()
    noise = 1e-3 * torch.randn_like(weight)
    tried = {name: {n: output_change.TriedRounding(weight + n * noise) for n in (0, 1, 2)}}
    found = output_change.measure(net, tried, [x[:8], x[8:]], (1, 8, 8))[name]
    with torch.no_grad():
        parts = []
        for part in (x[:8], x[8:]):
            before = net(part)
            after = torch.func.functional_call(net, {f"{name}.weight": weight + noise}, (part,))
            parts.append(len(part) * float((after - before).square().sum() / before.square().sum()))
    assert found[0] == 0 and found[1] == pytest.approx((sum(parts) / 12) ** 0.5, rel=1e-3)
    assert found[2] == pytest.approx(2 * found[1], rel=0.02)
    with pytest.raises(InputError, match="--sensitivity sqnr"):
        output_change.measure(net, tried, [], (1, 8, 8))


def _losses(made: Checkpoint, target: bit_budget.BitTarget, **how: Any) -> bit_budget.LayerLosses:
    settings = replace(post_training.PtqSettings("none", 8, 8, "channel", {}), **how)
    batches = list(data.calibration(data.load("digits", spec=made.input), 32, CPU, 0))
    return bit_budget.measure(made, settings, target, batches, CPU, 0)


def test_a_table_gives_each_layer_its_width_and_what_is_kept_stays(made: Checkpoint, tmp_path: Path) -> None:
    rows = ("*,W8A8,4", "*,W4A8,2", "*,W4A16,3", "*,float,9")
    table = cost_table.read(_table(tmp_path, *rows))
    target = bit_budget.BitTarget(None, None, "outputs", table, 27.0)
    keep: dict[str, int | str] = {"classifier": 8, "conv": "tensor"}
    settings, chosen, points = bit_budget.chosen(_losses(made, target, keep=keep), target)
    bits = {row.layer: row.bits for row in chosen}
    assert bits["classifier"] == 8 and set(bits.values()) == {4, 8}
    assert next(each for each in points if each["chosen"])["cost"] <= 27
    coded, made_rows = post_training.quantize(made, settings, [torch.zeros(2, 1, 8, 8)], CPU)
    assert {row.layer: row.bits for row in made_rows} == bits
    assert coded.coded["conv.weight"].codec.scale.numel() == 1
    with pytest.raises(InputError, match="the target of 3 is out of reach: the layers take 2"):
        bit_budget.chosen(_losses(made, target), replace(target, budget=3.0))
    cheap = replace(target, costs=cost_table.read(_table(tmp_path, "*,W8A8,4", "*,float,3")), budget=1e6)
    with pytest.raises(InputError, match=r"every layer stays float.*Leave the width float out of it"):
        bit_budget.chosen(_losses(made, cheap), cheap)


def test_what_layers_read_gets_its_bits_within_their_mean(made: Checkpoint) -> None:
    target = bit_budget.BitTarget(4.0, None, "outputs", act_widths=(16, 8, 4), act_bits=7.0)
    losses = _losses(made, target)
    _, chosen, _ = bit_budget.chosen(losses, target)
    numbers = {name: reads for name, (_, reads) in losses.numbers.items()}
    mean = sum((row.act_bits or 0) * numbers[row.layer] for row in chosen) / sum(numbers.values())
    assert 5 < mean <= 7 and len({row.act_bits for row in chosen}) > 1
    assert all(own[4] > own[8] > own[16] for own in losses.reads.values())


@pytest.mark.slow
def test_the_smallest_file_that_is_enough_is_found_and_made_again(made: Checkpoint) -> None:
    config = r2cli.PtqConfig(method="none", minimize="bytes", calibration=32, device="cpu")
    source = data.with_test_images(data.load("digits", spec=made.input), 128)
    found = r2cli.quantize(made, source, config, max_drop=2.0)
    trials = found.report["smallest"]
    enough = [trial["spent"] for trial in trials if trial["enough"]]
    spent = sum(one.payload_bytes() for one in found.checkpoint.coded.values())
    assert spent == min(enough) < max(enough) and min(enough) > max(t["spent"] for t in trials if not t["enough"])
    words = found.report["again"]
    keep = [word for flag, word in zip(words, words[1:], strict=False) if flag == "--keep"]
    exact = r2cli.PtqConfig(
        weight_bits=int(words[3]), keep=keep, calibration=32, device="cpu", weight_range=found.settings.weight_range
    )
    assert r2cli.quantize(made, source, exact).to_bytes() == found.to_bytes()
    with pytest.raises(R2Error, match="even the most bits lose"):
        r2cli.quantize(made, source, config, max_drop=-50.0)
    with pytest.raises(InputError, match="--max-drop"):
        r2cli.quantize(made, source, config)


class _Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.b(torch.relu(self.a(x)).mean((2, 3)))
        return found


def _small() -> Checkpoint:
    network = _Small().eval()
    spec = ModelSpec("small", 3, 1, factory=_Small)
    given = data.load("fake:1x8x8:3").input
    return Checkpoint(spec, given, ("a", "b", "c"), dict(network.state_dict()))


def test_every_layer_is_measured_at_every_width_in_onnx_runtime() -> None:
    rows = layer_cost.measured(_small(), "onnxruntime", ("8", "W8A16", "float"))
    assert [(name, width) for name, width, _ in rows] == [(n, w) for n in ("a", "b") for w in (8, "W8A16", "float")]
    assert all(cost > 0 for _, _, cost in rows)
    with pytest.raises(InputError, match="measured by nothing"):
        layer_cost.measured(_small(), "qnn", ("8",))


def test_without_vela_cycles_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda *given, **more: None)
    with pytest.raises(InputError, match="pip install ethos-u-vela"):
        vela.cycles(tmp_path / "x.tflite")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("ptq", "--cost", "c.csv"), "--budget"),
        (("ptq", "--budget", 3), "--cost FILE.csv"),
        (("ptq", "--minimize", "cost"), "--cost FILE.csv"),
        (("ptq", "--minimize", "bytes", "--target-bits", 3), "exclude each other"),
        (("ptq", "--act-widths", "8,16"), "belong together"),
        (("ptq", "--act-widths", "8,12", "--target-act-bits", 9, "--target-bits", 4), "--act-bits 12"),
        (("ptq", "--pareto", "x.png"), "--target-bits"),
        (("cost", "--widths", "8,9"), "--widths '9' is not a width"),
        (("cost", "-o", "x.txt"), ".csv"),
        (("cost", "--target", "qnn"), "known are ethos-u, onnxruntime"),
    ],
)
def test_options_of_budgets_that_make_no_sense_are_refused(
    arguments: tuple[object, ...], told: str, r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = r2(*arguments)
    assert ran.code == 2 and told in ran.err, ran.err
