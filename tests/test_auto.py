"""`--method auto`: what is kept is the best of what was tried, for a reason that it gives, and can be had again."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import R2
from r2cli import data
from r2cli.calibration import deployed
from r2cli.ptq import auto, layer_sweep, post_training
from r2cli.quantized import decibels
from r2cli.quantized.decibels import sqnr
from r2cli.storage import checkpoint

CPU = torch.device("cpu")


def _shown(made: checkpoint.Checkpoint) -> list[torch.Tensor]:
    return [images for images, _ in data.calibration(data.load("digits", spec=made.input), 160, CPU, 0)]


def _settings(bits: int) -> post_training.PtqSettings:
    return post_training.PtqSettings("auto", bits, 8, "channel", {})


@pytest.mark.slow
def test_where_rounding_is_not_heard_nothing_is_learned(trained: Path) -> None:
    made = checkpoint.load(trained)
    shown, told = _shown(made), list[str]()
    coded, rows, own, trials = auto.choose(made, _settings(8), shown, CPU, tell=told.append)
    assert [line.split(": outputs")[0] for line in told] == [str(trial) for trial in trials] and len(rows) == 10
    forms = [(trial.granularity, trial.weight_range, trial.parts) for trial in trials]
    assert forms == [(grid, "minmax", parts) for grid in ("channel", "unfolded") for parts in auto.PARTS]
    best = auto.kept(trials)
    assert best is min(trials, key=lambda trial: trial.divergence)
    assert best.sqnr > auto.ENOUGH and {trial.method for trial in trials} == {"none"}
    assert (own.method, own.granularity, own.weight_range, own.parts) == (
        best.method,
        best.granularity,
        best.weight_range,
        best.parts,
    )
    same, _ = post_training.quantize(made, own, shown, CPU)
    assert all(coded.coded[name].codes.equal(same.coded[name].codes) for name in coded.coded)
    assert all(coded.activations[name].scale.equal(same.activations[name].scale) for name in coded.activations)


@pytest.mark.slow
def test_where_it_is_heard_the_best_of_what_is_learned_is_kept(trained: Path) -> None:
    """On the one grid that is asked for."""
    made = checkpoint.load(trained)
    shown = _shown(made)
    coded, _, own, trials = auto.choose(made, _settings(4), shown, CPU, grids=["tensor"])
    assert {trial.granularity for trial in trials} == {"tensor"}
    assert [trial.method for trial in trials] == ["none"] * 6 + ["brecq"] * 2
    best = auto.kept(trials)
    assert best is trials[6] or best.lead > auto.SURE
    assert (own.method, own.parts, own.weight_range) == ("brecq", best.parts, best.weight_range)
    with torch.inference_mode():
        outputs, expected = (torch.cat([deployed.network(one)(x) for x in shown]) for one in (coded, made))
    # What the trial told in float32, summed again.
    assert sqnr(outputs, expected) == pytest.approx(best.sqnr, abs=1e-3)
    assert float(auto.divergences(outputs, expected).mean()) == pytest.approx(best.divergence, rel=1e-3)


@pytest.mark.slow
def test_what_is_learned_tells_once_that_it_does_not_see_all_images(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, told = checkpoint.load(trained), list[str]()
    monkeypatch.setattr(layer_sweep, "MEMORY", 40 * 4 * 64)  # for the inputs of 40 images
    auto.choose(made, replace(_settings(4), steps=1), _shown(made), CPU, grids=["tensor"], tell=told.append)
    assert [line for line in told if "of the images" in line] == [
        "weights are rounded by 40 of the images: more take over 0 GiB of memory"
    ]


@pytest.mark.slow
def test_one_range_where_it_is_asked_for(trained: Path) -> None:
    made = checkpoint.load(trained)
    *_, own, trials = auto.choose(made, _settings(8), _shown(made), CPU, grids=["unfolded"], rules=["mse"])
    assert [(trial.granularity, trial.weight_range, trial.parts) for trial in trials] == [
        ("unfolded", "mse", parts) for parts in auto.PARTS
    ]
    assert own.granularity == "unfolded" and own.weight_range == "mse"


def test_divergence_is_of_probabilities() -> None:
    expected = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert float(auto.divergences(expected + 5, expected).mean()) == pytest.approx(0, abs=1e-12)
    found = torch.tensor([[0.0, 1.0], [1.0, 3.0]])  # 1/2 ln((1 + e)^2 / 4e) in the first row, nothing in the second
    wanted = [0.5 * math.log((1 + math.e) ** 2 / (4 * math.e)), 0]
    assert auto.divergences(found, expected).tolist() == pytest.approx(wanted, abs=1e-12)


def test_a_lead_is_counted_in_standard_errors() -> None:
    against = torch.tensor([1.0, 2.0, 3.0, 4.0])
    less = torch.tensor([0.1, 0.3, 0.1, 0.3])  # 0.2 on average, with a deviation of 0.1
    assert auto.lead(against - less, against) == pytest.approx(0.2 / (0.1 / 2))
    assert auto.lead(against, against) == 0 and auto.lead(against + less, against) < -3.9


def test_noise_is_a_share_of_the_signal() -> None:
    expected = (torch.tensor([[3.0], [1.0]]), torch.ones(2, 4))
    outputs = (torch.tensor([[3.0], [2.0]]), torch.ones(2, 4) + torch.tensor([[1.0], [0.0]]))
    assert decibels.noises(outputs, expected).tolist() == pytest.approx([0.5, 0.1])


def _pair(spread: bool) -> checkpoint.Checkpoint:
    """Two convolutions whose channels are as even as they start, or spread apart, as the same function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    factor = torch.randn(8).mul(2).exp() if spread else torch.ones(8)
    weights["0.weight"] *= factor.reshape(-1, 1, 1, 1)
    weights["0.bias"] *= factor
    weights["2.weight"] /= factor.reshape(1, -1, 1, 1)
    spec = checkpoint.ModelSpec("test_auto.py:pair", 4, factory=lambda: copy.deepcopy(model))
    given = checkpoint.InputSpec(1, 8, 8, (0.0,), (1.0,))
    return checkpoint.Checkpoint(spec, given, tuple("abcd"), weights)


@pytest.mark.parametrize("spread", [False, True])
def test_a_network_is_equalized_where_its_channels_are_spread(spread: bool) -> None:
    shown = [torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))]
    found = auto.equalization(_pair(spread), _settings(2), shown, CPU)
    assert found.parts == (("equalize",) if spread else ()) and str(found).startswith("eq" if spread else "not eq")


def test_rounding_is_learned_on_the_network_as_it_is_and_equalized() -> None:
    def trial(parts: tuple[str, ...], sqnr: float) -> auto.Trial:
        return auto.Trial("none", "tensor", "minmax", parts, sqnr, 0.1, 0.1)

    plain = [trial((), 3.0), trial(("correct",), 9.0)]
    both = auto.learned_trials(_settings(4), ["tensor"], [], [*plain, trial(post_training.DFQ, 4.0)])
    assert [(own.method, own.parts, own.weight_range) for own in both] == [
        ("brecq", (), "mse"),
        ("brecq", ("equalize",), "mse"),
    ]
    # Where nothing is equalized the whole of DFQ is its correction.
    (own,) = auto.learned_trials(_settings(5), ["tensor"], [], [*plain, trial(post_training.DFQ, 9.0)])
    assert own.parts == () and own.weight_range == "minmax"


@pytest.mark.slow
def test_the_command_says_what_it_chose_and_how_to_have_it_again(
    r2: R2, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(trained.read_bytes())
    common = ("--weight-bits", 4, "--calibration", 128, "--json")
    first = r2("ptq", "--method", "auto", "--granularity", "tensor", *common, "-o", "first.safetensors")
    assert first.code == 0, first.err
    report = json.loads(first.out)
    (best,) = (trial for trial in report["trials"] if trial["kept"])
    assert len(report["trials"]) == 8 and best["method"] == "brecq" and "brecq" in report["again"]
    again = r2("ptq", *report["again"], *common, "-o", "again.safetensors")
    assert again.code == 0, again.err
    for ending in ("safetensors", "onnx"):
        assert Path(f"first.{ending}").read_bytes() == Path(f"again.{ending}").read_bytes()


@pytest.mark.slow
def test_the_report_lists_the_trials_and_wishes_that_clash_are_refused(
    r2: R2, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(trained.read_bytes())
    ran = r2("ptq", "--method", "auto", "--granularity", "tensor", "--calibration", 64, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert [trial["granularity"] for trial in report["trials"]] == ["tensor"] * 3
    assert report["options"]["method"] == "none" and Path("model.w8a8-auto-tensor.onnx").exists()
    for wish, told in (
        (("--parts", "equalize"), "--method auto chooses the --parts itself"),
        (("--calibration", 0), "--method auto needs images"),
    ):
        refused = r2("ptq", "--method", "auto", *wish, "--overwrite")
        assert refused.code == 2 and told in refused.err, refused.err
    wrong = r2("ptq", "--parts", "equalize,colour")
    assert wrong.code == 2 and "colour" in wrong.err
    mixed = r2("ptq", "--method", "auto", "--target-bits", 4.5, "--sensitivity", "sqnr", "--dry-run")
    assert mixed.code == 0, mixed.err
