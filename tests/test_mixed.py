"""Mixed precision: the choice against every other, the trace against the Hessian itself, and the way back by --keep."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from conftest import R2
from r2cli import data
from r2cli.errors import InputError
from r2cli.ptq import bit_budget, mixed_precision, post_training
from r2cli.quantized.packing import packed_bytes
from r2cli.storage import checkpoint

CPU = torch.device("cpu")
COSTS = st.lists(st.floats(0, 100), min_size=5, max_size=5)


def _total(fronts: dict[str, mixed_precision.Front], bits: dict[str, int]) -> tuple[int, float]:
    own = [next((size, cost) for b, size, cost in fronts[name] if b == chosen) for name, chosen in bits.items()]
    return sum(size for size, _ in own), sum(cost for _, cost in own)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(8, 400), COSTS), min_size=1, max_size=4), st.floats(0, 1))
def test_the_budget_is_met_and_little_better_could_be_had(layers: list[tuple[int, list[float]]], share: float) -> None:
    fronts = {
        f"layer{i}": mixed_precision.front(
            {b: (packed_bytes(8 * n, b), cost) for b, cost in zip(mixed_precision.WIDTHS, costs, strict=True)}
        )
        for i, (n, costs) in enumerate(layers)
    }
    least = sum(own[-1][1] for own in fronts.values())
    most = sum(own[0][1] for own in fronts.values())
    budget = least + int(share * (most - least))
    chosen = mixed_precision.choose(fronts, budget)
    size, cost = _total(fronts, chosen)
    assert size <= budget
    every = itertools.product(*([b for b, _, _ in own] for own in fronts.values()))
    best = min(
        (_total(fronts, dict(zip(fronts, bits, strict=True))) for bits in every),
        key=lambda found: found[1] if found[0] <= budget else float("inf"),
    )
    # Greedy on convex fronts is off by no more than its last step.
    steps = [narrow[2] - wide[2] for own in fronts.values() for wide, narrow in itertools.pairwise(own)]
    assert cost <= best[1] + max(steps, default=0.0) + 1e-9


def test_a_front_leaves_out_what_another_width_beats() -> None:
    # Two bits lose more than one: min-max ranges do. Three bits lie above the line from four to one.
    widths = {8: (80, 0.0), 4: (40, 1.0), 3: (30, 50.0), 2: (20, 90.0), 1: (10, 60.0)}
    assert [bits for bits, _, _ in mixed_precision.front(widths)] == [8, 4, 1]


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    with pytest.raises(InputError, match="9 bytes is out of reach.*10 bytes at least"):
        mixed_precision.choose({"only": mixed_precision.front({8: (80, 0.0), 1: (10, 1.0)})}, 9)


@pytest.mark.slow
def test_hutchinsons_mean_is_the_hessians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean of diag d2 loss / dw2, times |w|^2, against torch's own Hessian of the mean cross-entropy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    weights = {name: module.weight for name, module in model.named_children() if isinstance(module, nn.Linear)}
    monkeypatch.setattr(mixed_precision, "DRAWS", 2000)
    found = mixed_precision.curvature(fx.symbolic_trace(model), weights, [(x, y)], seed=0)
    for name, weight in weights.items():

        def loss(w: Tensor, name: str = name) -> Tensor:
            out = torch.func.functional_call(model, {f"{name}.weight": w}, (x,))
            return nn.functional.cross_entropy(out, y)

        hessian = torch.autograd.functional.hessian(loss, weight.detach()).reshape(weight.numel(), -1)
        expected = hessian.diagonal().mean() * weight.detach().square().sum()
        assert found[name] == pytest.approx(float(expected), rel=0.1)


def test_a_width_that_is_mostly_noise_waits_until_nothing_else_fits() -> None:
    """A bit that is sign alone can be nearer to the weights than two that outliers stretch; it is no perturbation."""
    layer = {8: (80, 1e-5), 3: (30, 0.1), 2: (20, 0.45), 1: (10, 0.36)}
    tried = {"a": layer, "b": layer, "rough": {1: (10, 0.9)}}
    for budget, expected in ((70, {8, 3}), (55, {8, 3, 2, 1}), (30, {8, 3, 2, 1})):
        found = mixed_precision.fine(tried, budget)
        assert set(found["a"]) == set(found["b"]) == expected and set(found["rough"]) == {1}
    assert mixed_precision.allot(tried, dict.fromkeys(tried, 1.0), 70) == {"a": 3, "b": 3, "rough": 1}
    with pytest.raises(InputError, match="29 bytes is out of reach.*30 bytes at least"):
        mixed_precision.allot(tried, dict.fromkeys(tried, 1.0), 29)


@pytest.fixture(scope="module")
def made(trained: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(trained)


def _choose(
    made: checkpoint.Checkpoint, target: bit_budget.BitTarget, **how: object
) -> tuple[post_training.PtqSettings, dict[str, int]]:
    settings = replace(post_training.PtqSettings("none", 8, None, "channel", {}, weight_range="mse"), **how)  # type: ignore[arg-type]
    batches = list(data.calibration(data.load("digits", spec=made.input), 64, CPU, 0))
    chosen, rows = bit_budget.choose_bits(made, settings, target, batches, CPU, 0)
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
