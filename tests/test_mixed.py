"""Mixed precision: the choice against every other, the trace against the Hessian itself, and the way back by --keep."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import r2cli
from conftest import R2
from r2cli import data
from r2cli.errors import InputError
from r2cli.ptq import auto, bit_budget, knapsack, mixed_precision, post_training, quantize
from r2cli.ptq.post_training import PtqSettings
from r2cli.quantized.packing import packed_bytes
from r2cli.storage import checkpoint

CPU = torch.device("cpu")
COSTS = st.lists(st.floats(0, 100), min_size=5, max_size=5)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(8, 400), COSTS), min_size=1, max_size=4), st.floats(0, 1))
def test_the_choice_within_a_budget_is_the_best_of_all(layers: list[tuple[int, list[float]]], share: float) -> None:
    options = {
        f"layer{i}": {b: (packed_bytes(8 * n, b), cost) for b, cost in zip(mixed_precision.WIDTHS, costs, strict=True)}
        for i, (n, costs) in enumerate(layers)
    }
    least, most = (sum(end(size for size, _ in own.values()) for own in options.values()) for end in (min, max))
    budget = least + int(share * (most - least))
    front = knapsack.front(options)
    place = front.within(budget)
    spent = [options[name][bits] for name, bits in front.choice(place).items()]
    assert (sum(size for size, _ in spent), sum(cost for _, cost in spent)) == pytest.approx(
        (front.costs[place], front.losses[place])
    )
    every = [
        [own[bits] for own, bits in zip(options.values(), widths, strict=True)]
        for widths in itertools.product(*options.values())
    ]
    fitting = [sum(cost for _, cost in one) for one in every if sum(size for size, _ in one) <= budget]
    assert front.costs[place] <= budget and front.losses[place] == pytest.approx(min(fitting))


def test_a_front_that_is_thinned_stays_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {f"l{i}": {b: (b * (i + 1.37) ** 0.5, 1.9**-b * (i % 3 + 1)) for b in (8, 6, 4, 2)} for i in range(12)}
    exact = knapsack.front(options)
    monkeypatch.setattr(knapsack, "MOST", 100)
    rough = knapsack.front(options)
    assert len(rough.costs) <= 100 < len(exact.costs)
    for budget in (120.0, 200.0):
        assert rough.losses[rough.within(budget)] <= 1.3 * exact.losses[exact.within(budget)]


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    with pytest.raises(InputError, match="9 bytes is out of reach.*10 bytes at least"):
        knapsack.front({"only": {8: (80, 0.0), 1: (10, 1.0)}}).within(9, " bytes")


@pytest.mark.slow
def test_hutchinsons_mean_is_the_hessians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean of diag d2 loss / dw2, times |w|^2, against torch's own Hessian of the mean cross-entropy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    weights = {
        name: module.get_parameter("weight") for name, module in model.named_children() if isinstance(module, nn.Linear)
    }
    monkeypatch.setattr(mixed_precision, "DRAWS", 2000)
    found = mixed_precision.curvature(fx.symbolic_trace(model), weights, [(x, y)], seed=0)
    for name, weight in weights.items():

        def loss(w: Tensor, name: str = name) -> Tensor:
            out = torch.func.functional_call(model, {f"{name}.weight": w}, (x,))
            return nn.functional.cross_entropy(out, y)

        hessian = torch.autograd.functional.hessian(loss, weight.detach()).reshape(weight.numel(), -1)
        expected = hessian.diagonal().mean() * weight.detach().square().sum()
        assert found[name] == pytest.approx(float(expected), rel=0.1)


def test_a_width_that_is_mostly_noise_is_chosen_where_it_loses_least() -> None:
    """A bit that is sign alone can be nearer to the weights than two that outliers stretch."""
    own, lost = {8: 80, 3: 30, 2: 20, 1: 10}, {8: 1e-5, 3: 0.1, 2: 0.45, 1: 0.36}
    given = post_training.PtqSettings("none", 8, None, "channel", {})
    sizes, numbers = {"a": own, "b": own}, {"a": (80, 0), "b": (80, 0)}
    losses = bit_budget.LayerLosses(given, {}, {}, sizes, {"a": lost, "b": {**lost, 1: 0.9}}, {}, numbers)
    for sensitivity in mixed_precision.SENSITIVITIES:
        target = bit_budget.BitTarget(None, 45, sensitivity)
        front = bit_budget.front(losses, target)
        assert front.choice(front.within(45)) == {"a": 1, "b": 3}


@pytest.mark.parametrize(("budget", "chosen"), [(45, {"a": 2, "b": 2}), (35, {"a": 1, "b": 2})])
def test_one_bit_is_for_budgets_below_two_where_rounding_is_learned(budget: int, chosen: dict[str, int]) -> None:
    own, lost = {8: 80, 3: 30, 2: 20, 1: 10}, {8: 1e-5, 3: 0.1, 2: 0.45, 1: 0.36}
    given = post_training.PtqSettings("brecq", 8, None, "channel", {})
    sizes, numbers = {"a": own, "b": own}, {"a": (80, 0), "b": (80, 0)}
    losses = bit_budget.LayerLosses(given, {}, {}, sizes, {"a": lost, "b": {**lost, 1: 0.9}}, {}, numbers)
    front = bit_budget.front(losses, bit_budget.BitTarget(None, budget, mixed_precision.OUTPUTS))
    assert front.choice(front.within(budget)) == chosen


def test_every_measure_is_a_power_of_what_was_measured() -> None:
    given = post_training.PtqSettings("none", 8, None, "channel", {})
    losses = bit_budget.LayerLosses(given, {}, {}, {}, {"a": {4: 0.3}}, {}, {}, {"a": {4: 0.04}})
    found = {name: own.weights["a"][4] for name, own in bit_budget.by_measures(losses).items()}
    assert found == pytest.approx({"outputs": 0.3, "squared outputs": 0.09, "outputs and noise": 0.06, "noise": 0.04})
    read = bit_budget.by_measures(replace(losses, reads={"a": {8: 0.1}}))
    assert {name: own.reads["a"][8] for name, own in read.items()} == pytest.approx(
        {"outputs": 0.1, "squared outputs": 0.01}
    )


@pytest.fixture(scope="module")
def made(trained: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(trained)


def _choose(
    made: checkpoint.Checkpoint, target: bit_budget.BitTarget, **how: Any
) -> tuple[post_training.PtqSettings, dict[str, int]]:
    settings = replace(post_training.PtqSettings("none", 8, None, "channel", {}, weight_range="mse"), **how)
    batches = list(data.calibration(data.load("digits", spec=made.input), 64, CPU, 0))
    chosen, rows, _ = bit_budget.chosen(bit_budget.measure(made, settings, target, batches, CPU, 0), target)
    return chosen, {row.layer: row.bits for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("sensitivity", mixed_precision.SENSITIVITIES)
@pytest.mark.parametrize("target", [3.2, 2.1])
def test_the_average_is_met_and_the_same_seed_chooses_the_same(
    made: checkpoint.Checkpoint, sensitivity: str, target: float
) -> None:
    chosen, bits = _choose(made, bit_budget.BitTarget(target, None, sensitivity))
    assert (chosen, bits) == _choose(made, bit_budget.BitTarget(target, None, sensitivity))
    coded, rows = post_training.quantize(made, chosen, [], CPU)
    assert {row.layer: row.bits for row in rows} == bits and len(set(bits.values())) > 1
    size = {name: one.codes.numel() for name, one in coded.coded.items()}
    mean = sum(one.codec.bits * size[name] for name, one in coded.coded.items()) / sum(size.values())
    assert target - 0.5 < mean <= target


def test_the_cheapest_choice_of_all_stays_where_a_front_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "MOST", 100)
    sizes = [1000 + 37**i % 1_999_993 for i in range(1, 41)]
    options = {f"l{i}": {b: (size * b, 4.0**-b * size) for b in (8, 4, 3, 2, 1)} for i, size in enumerate(sizes)}
    front = knapsack.front(options)
    assert len(front.costs) <= 100 and front.choice(front.within(sum(sizes))) == dict.fromkeys(options, 1)


def odd_sizes() -> nn.Module:
    """Layers of 45, 315 and 4480 weights: most of their codes do not fill the last byte."""
    layers = [nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 7, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(448, 10))


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_a_mean_of_bits_is_met_by_every_layer_at_those_bits(bits: int) -> None:
    torch.manual_seed(0)
    spec = checkpoint.ModelSpec("test_mixed.py:odd_sizes", 10, 1, factory=odd_sizes)
    source = data.load("digits", size=8)
    odd = checkpoint.Checkpoint(spec, source.input, source.class_names, odd_sizes().state_dict())
    given, target = PtqSettings("none", 8, None, "channel", {}), bit_budget.BitTarget(float(bits), None, "sqnr")
    losses = bit_budget.measure(odd, given, target, [], CPU, 0)
    front = bit_budget.front(losses, target)
    place = front.within(bit_budget.limit(losses, target), bit_budget.unit(target))
    assert front.losses[place] <= sum(own[bits] for own in losses.weights.values()) * (1 + 1e-9)
    spent = sum(width * losses.numbers[name][0] for name, width in front.choice(place).items())
    assert spent <= bits * (45 + 315 + 4480)


def test_equal_choices_of_bits_are_rounded_once(made: checkpoint.Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded, own = [], post_training.quantize

    def quantize_once(one: checkpoint.Checkpoint, settings: PtqSettings, *given: Any) -> Any:
        rounded.append(settings.keep)
        return own(one, settings, *given)

    monkeypatch.setattr(auto, "quantize", quantize_once)
    settings = PtqSettings("none", 4, 8, "channel", {"classifier": 8})
    choices = {"a": settings, "b": replace(settings, keep={"classifier": 2}), "c": replace(settings)}
    images = [torch.rand(4, *made.input.shape, generator=torch.Generator().manual_seed(0))]
    away = auto.distances(made, choices, images, torch.device("cpu"), decides=True)
    assert rounded == [{"classifier": 8}, {"classifier": 2}]
    assert list(away) == ["a", "b", "c"] and away["a"] == away["c"] != away["b"]


@pytest.mark.slow
@pytest.mark.parametrize("forced", [None, *bit_budget.MEASURES])
def test_best_keeps_the_choice_of_bits_whose_outputs_are_nearest(
    made: checkpoint.Checkpoint, forced: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = data.load("digits", spec=made.input), dict[str, Any]()
    own = auto.distances

    def distances(one: checkpoint.Checkpoint, choices: Any, *given: Any, **how: Any) -> dict[str, float]:
        seen["away"] = own(one, choices, *given, **how)
        seen["bits"] = choices
        return seen["away"] if forced is None else {name: float(name != forced) for name in choices}

    monkeypatch.setattr(auto, "distances", distances)
    config = r2cli.PtqConfig(target_bits=2.4, weight_range="mse", device="cpu")
    found = quantize.quantize(made, source, config, calibration=128).settings
    least = forced or min(seen["away"], key=lambda name: seen["away"][name])
    assert found == seen["bits"][least]
    assert len({str(one) for one in seen["bits"].values()}) > 1, "the measures choose differently here"


@pytest.mark.slow
def test_bytes_are_those_of_codes_and_scales_and_named_layers_keep_their_bits(made: checkpoint.Checkpoint) -> None:
    chosen, bits = _choose(made, bit_budget.BitTarget(None, 12_000, "sqnr"), keep={"classifier": 8, "conv": 6})
    assert bits["classifier"] == 8 and bits["conv"] == 6
    coded, _ = post_training.quantize(made, chosen, [], CPU)
    assert 10_000 < sum(one.payload_bytes() for one in coded.coded.values()) <= 12_000


@pytest.mark.slow
@pytest.mark.parametrize(("method", "target", "ranges"), [("none", 3.2, False), ("brecq", 7.5, True)])
def test_what_was_chosen_feeds_back_to_the_same_bytes(
    method: str, target: float, ranges: bool, r2: R2, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(trained.read_bytes())
    common = ("--calibration", 64, "--method", method, "--json")
    first = r2("ptq", "--target-bits", target, *common, "-o", "first.safetensors")
    assert first.code == 0, first.err
    options = json.loads(first.out)["again"]
    # Most layers have 8 bits, for which brecq alone would take minmax.
    assert (("--weight-range", "mse") in itertools.pairwise(options)) == ranges and "--keep" in options
    again = r2("ptq", *options, *common, "-o", "again.safetensors")
    assert again.code == 0, again.err
    for ending in ("safetensors", "onnx"):
        assert Path(f"first.{ending}").read_bytes() == Path(f"again.{ending}").read_bytes()
