"""Range regularizers against tables of numbers, and against autograd of the formulas as they are written."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from r2cli import registry
from r2cli.errors import InputError
from r2cli.graph.read import trace
from r2cli.quantized.palette import from_vectors, to_vectors
from r2cli.train import loop, range_penalties, regularizers
from r2cli.train.range_penalties import RangePenalty
from r2cli.train.regularizers import Regularizer, RegularizerSpec, penalty

W = [0.5, -1.25, 0.25, 1.0]
V = [[0.5, -1.25], [0.25, 1.0], [-0.75, 0.1]]  # three vectors of two channels
NAMES = tuple(name for name in registry.REGULARIZERS if name != "clip")


def of(name: str) -> RangePenalty:
    found = registry.load(registry.REGULARIZERS, name)
    assert isinstance(found, RangePenalty)
    return found


def apply(
    name: str,
    w: Tensor,
    parameter: float | Tensor | None = None,
    *,
    strength: float = 1.0,
    stable: bool = False,
    dim: int = 1,
    margin_k: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """R, what was added to the weight's gradient, and dR/dparameter."""
    grad = torch.zeros_like(w)
    own = None if parameter is None else torch.as_tensor(parameter, dtype=w.dtype).reshape(-1)
    setting = RegularizerSpec(name, strength, stable=stable, dim=dim, margin_k=margin_k)
    value, slope = penalty(w, own, grad, strength, setting)
    return value, grad, slope


def close(actual: Tensor, expected: object, *, rtol: float, atol: float) -> None:
    want = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), want.reshape(actual.shape), rtol=rtol, atol=atol)


def float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype) * 0.1


def start(name: str, dim: int) -> Tensor | None:
    """A parameter at which about a quarter of `random`'s weights are outside the margin."""
    columns = {"margin": [0.11, -0.08, 0.13, 0.1][:dim], "soft-minmax": [3.0]}
    return float64(columns[name]) if name in columns else None


# --- tables --------------------------------------------------------------------------------------------------------

# name, weight, parameter, k, R, dR/dw, dR/dparameter. Where a parameter's column is None, the term has none.
TABLE: list[tuple[str, list[float], float | None, int, float, list[float], float | None]] = [
    ("linf", W, None, 1, 1.25, [0, -1, 0, 0], None),
    ("linf", [1, -1, 0.5, 0], None, 1, 1.0, [0.5, -0.5, 0, 0], None),  # a tie is shared
    ("linf", [0, 0, 0], None, 1, 0.0, [0, 0, 0], None),
    ("margin", W, 0.75, 1, 1.5, [0, -1, 0, 1], -1),
    ("margin", W, 1.1, 1, 1.25, [0, -1, 0, 0], 0),
    ("margin", W, 1.5, 1, 1.5, [0, 0, 0, 0], 1),
    ("margin", W, -0.75, 1, 1.5, [0, -1, 0, 1], 1),  # only |M| counts
    ("margin", W, 0.75, 2, 1.125, [0, -0.5, 0, 0.5], 0),  # the hinge over k
    (
        "soft-minmax",
        W,
        0.1,
        1,
        1.0453162590,
        [0.0374097615, -0.1372426183, 0.0125679580, 0.0872648987],
        0.4970245907,
    ),
    ("soft-minmax", W, 1, 1, 1.6252092002, [0.2718849068, -1.0943137952, 0.1303043340, 0.6921245543], 0.6033261350),
    ("soft-minmax", W, 4, 1, 2.1739134280, [-0.0681797258, -1.0195042452, -0.0567905802, 1.1444745512], 0.0354267513),
    ("kure", W, None, 1, 0.0986425240, [-0.0456609419, -0.1105127145, 0.3619787716, -0.2058051151], None),
]


@pytest.mark.parametrize(("name", "weight", "parameter", "k", "value", "dw", "slope"), TABLE)
def test_table(
    name: str,
    weight: list[float],
    parameter: float | None,
    k: int,
    value: float,
    dw: list[float],
    slope: float | None,
) -> None:
    own_value, own_dw, own_slope = apply(name, float64(weight), parameter, margin_k=k)
    # The table prints ten decimals.
    close(own_value, value, rtol=1e-6, atol=1e-10)
    close(own_dw, dw, rtol=1e-6, atol=1e-10)
    if slope is not None:
        close(own_slope, [slope], rtol=1e-6, atol=1e-10)


def test_table_of_a_sharp_soft_minmax() -> None:
    value, dw, slope = apply("soft-minmax", float64(W), 50.0)
    close(value, 2.2499999999931, rtol=0, atol=5e-14)  # thirteen decimals are printed
    # The first entry is printed to two digits, the last to ten decimals: half a unit of each.
    close(dw[:3], [-3.3e-10, -1.0, -1.9e-15], rtol=0, atol=5e-12)
    close(dw[3], 1.0000000003, rtol=0, atol=5e-11)
    close(slope, [3.47e-12], rtol=2e-3, atol=0)  # three digits are printed


def test_a_soft_minmax_sharper_than_float32_can_write_naively() -> None:
    value, dw, slope = apply("soft-minmax", torch.tensor(W), 200.0)
    # exp(200) overflows float32. What is left beside max - min is below exp(-50), so the value is exact.
    assert float(value) == 2.25
    close(dw, [0, -1, 0, 1], rtol=0, atol=1e-6)  # float32's own rounding of 1 + alpha * 0
    assert bool(torch.isfinite(slope).all())


def test_a_soft_minmax_of_a_negative_alpha_is_its_formula_and_does_not_overflow() -> None:
    w, alpha = 100 * random(6, 9, dtype=torch.float32), torch.tensor([-6.0])
    value, dw, slope = apply("soft-minmax", w, alpha)
    own, number = w.double().requires_grad_(), alpha.double().requires_grad_()
    wanted = range_penalties.soft_minmax_reference(own, number, RegularizerSpec("soft-minmax", 1.0, stable=False))
    wanted.backward()
    value = value - float(torch.exp(-alpha.double()))  # which is added per layer
    assert own.grad is not None
    close(value, wanted.detach(), rtol=1e-4, atol=1e-4)
    close(dw, own.grad, rtol=1e-3, atol=1e-4)
    assert bool(torch.isfinite(slope).all())


VECTOR_TABLE = [
    ("linf", None, 2.0, [[0, -1], [0, 0], [-1, 0]], None),
    (
        "soft-minmax",
        4.0,
        3.3886478920,
        [[0.9656008479, -1.0215959351], [0.1299208118, 1.0684979762], [-1.0955216597, -0.0469020411]],
        0.0585324385,
    ),
]


@pytest.mark.parametrize(("name", "parameter", "value", "dv", "slope"), VECTOR_TABLE)
def test_table_of_vectors(
    name: str, parameter: float | None, value: float, dv: list[list[float]], slope: float | None
) -> None:
    weight = from_vectors(float64(V), (2, 3))
    own_value, own_dw, own_slope = apply(name, weight, parameter, dim=2)
    # The table prints ten decimals.
    close(own_value, value, rtol=1e-6, atol=1e-10)
    close(to_vectors(own_dw, 2), dv, rtol=1e-6, atol=1e-10)
    if slope is not None:
        close(own_slope, [slope], rtol=1e-6, atol=1e-10)


# --- the formulas as they are written ------------------------------------------------------------------------------


def by_autograd(
    name: str, w: Tensor, parameter: Tensor | None, *, dim: int, k: int, stable: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = w.clone().requires_grad_()
    own = None if parameter is None else parameter.clone().requires_grad_()
    whole = weight[: w.shape[0] // dim * dim]
    value = torch.zeros((), dtype=w.dtype)
    for index, column in enumerate(to_vectors(whole, dim).unbind(1)):
        mine = None if own is None else own[index if len(own) > 1 else 0]
        spec = RegularizerSpec(name, 1.0, stable=stable, margin_k=k)
        reference = of(name).reference
        assert reference is not None
        value = value + reference(column, torch.zeros(()) if mine is None else mine, spec)
    if name == "soft-minmax":
        assert own is not None
        value = value + torch.exp(-own[0])
    value.backward()
    assert weight.grad is not None
    return value.detach(), weight.grad, None if own is None else own.grad


@pytest.mark.parametrize("stable", [False, True], ids=["paper", "stable"])
@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (9, 7), (6, 1, 3, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_closed_form_is_the_gradient(name: str, shape: tuple[int, ...], dim: int, stable: bool) -> None:
    w, parameter, strength = random(*shape), start(name, dim), 0.3
    k = 3 if name == "margin" and not stable else 1
    value, dw, slope = apply(name, w, parameter, strength=strength, stable=stable, dim=dim, margin_k=k)
    want, want_dw, want_slope = by_autograd(name, w, parameter, dim=dim, k=k, stable=stable)
    # Float64 sums of at most 216 terms in another order, fourth powers included.
    close(value, want, rtol=1e-11, atol=1e-13)
    close(dw, strength * want_dw, rtol=1e-10, atol=1e-12)
    if want_slope is not None:
        if name == "margin" and stable:
            assert bool((want_slope.abs() > 1).any()), "a case that the clamp does not touch shows nothing"
            want_slope = want_slope.clamp(-1, 1)
        close(slope, want_slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_formula_without_a_kernel_is_enough(name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = of(name)
    by_kernel = apply(name, random(6, 5), start(name, dim), strength=0.3, dim=dim)
    where = registry.REGULARIZERS[name].where.partition(":")[2]
    monkeypatch.setattr(range_penalties, where, replace(own, kernel=None))
    for one, other in zip(by_kernel, apply(name, random(6, 5), start(name, dim), strength=0.3, dim=dim), strict=True):
        # Float64 sums in another order.
        close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_added_to_those_of_the_loss(name: str) -> None:
    w, before = random(5, 4), random(5, 4) + 1
    grad = before.clone()
    parameter = start(name, 1)
    penalty(w, parameter, grad, 0.3, RegularizerSpec(name, 0.3))
    _, alone, _ = apply(name, w, parameter, strength=0.3, stable=True)
    assert alone.abs().max() > 0
    close(grad, before + alone, rtol=1e-15, atol=1e-15)  # one float64 addition
    assert w.equal(random(5, 4))


# --- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_one_dimension_is_the_scalar_regularizer(name: str) -> None:
    w, parameter = random(6, 5), start(name, 1)
    value, dw, slope = apply(name, w, parameter, stable=True)
    own = torch.zeros(()) if parameter is None else parameter[0]
    scalar_dw = torch.zeros(30, dtype=torch.float64)
    scalar, scalar_slope = of(name).term(w.view(-1), own, scalar_dw, 1.0, RegularizerSpec(name, 1.0))
    extra = torch.exp(-own) if name == "soft-minmax" else torch.zeros(())
    assert value == scalar + extra
    assert dw.equal(scalar_dw.view(6, 5))
    assert slope.item() == scalar_slope - extra


@pytest.mark.parametrize("k", [1, 3])
def test_margin_at_its_best_is_the_mean_of_the_k_largest(k: int) -> None:
    w = random(4, 9)
    largest = w.abs().flatten().sort(descending=True).values
    # R is convex and piecewise linear in M with corners at the weights, so its least value is at one of them.
    values = [float(apply("margin", w, float(m), margin_k=k)[0]) for m in largest]
    # A float64 sum in another order.
    assert min(values) == pytest.approx(float(largest[:k].mean()), rel=1e-13)
    if k == 1:
        assert min(values) == pytest.approx(float(apply("linf", w)[0]), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sharp_soft_minmax_is_the_range(dtype: torch.dtype) -> None:
    w = torch.tensor(W, dtype=dtype)
    value, dw, slope = apply("soft-minmax", w, 1e4)
    # exp(-1e4 * 0.5), the weight of the second largest, is zero in either type.
    assert float(value) == 2.25
    assert dw.tolist() == [0, -1, 0, 1]
    assert slope.tolist() == [0]


@pytest.mark.parametrize("constant", [0.0, 0.25, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stable", [False, True], ids=["paper", "stable"])
@pytest.mark.parametrize("name", NAMES)
def test_a_constant_tensor_is_finite(name: str, stable: bool, dtype: torch.dtype, constant: float) -> None:
    w = torch.full((8, 4, 3, 3), constant, dtype=dtype)
    for dim in (1, 2):
        parts = apply(name, w, 0.1, stable=stable, dim=dim)
        assert all(bool(torch.isfinite(part).all()) for part in parts)


def test_kure_of_a_constant_is_nothing() -> None:
    value, dw, _ = apply("kure", torch.full((64, 64, 3, 3), 0.1))
    assert float(value) == 0
    assert not dw.any()


@pytest.mark.parametrize(
    ("name", "weight", "value"), [("kure", [-1.0, 1.0], 0.64), ("linf", [3.0], 3.0), ("kure", [3.0], 0.0)]
)
def test_smallest_tensors(name: str, weight: list[float], value: float) -> None:
    # Two points have a kurtosis of 1, and (1 - 1.8)^2 = 0.64.
    close(apply(name, float64(weight))[0], value, rtol=1e-14, atol=0)


def test_channels_that_fill_no_vector_are_left_alone() -> None:
    w = random(5, 6)
    for name in NAMES:
        value, dw, _ = apply(name, w, start(name, 2), stable=True, dim=2)
        whole, whole_dw, _ = apply(name, w[:4].clone(), start(name, 2), stable=True, dim=2)
        assert value == whole
        assert dw[:4].equal(whole_dw) and dw[:4].any()
        assert not dw[4].any()


@pytest.mark.parametrize(("weight", "parameter", "paper"), [(W, 0.1, -3.0), (W, -0.1, 3.0), (W, 0.75, -1.0)])
def test_the_stable_margin_moves_by_at_most_one(weight: list[float], parameter: float, paper: float) -> None:
    literal_parts = apply("margin", float64(weight), parameter, stable=False)
    stable_parts = apply("margin", float64(weight), parameter, stable=True)
    assert literal_parts[2].tolist() == [paper]
    assert stable_parts[2].tolist() == [max(-1.0, min(1.0, paper))]
    assert stable_parts[0] == literal_parts[0]
    assert stable_parts[1].equal(literal_parts[1])


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stable", [False, True], ids=["paper", "stable"])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing(name: str, dim: int, stable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w = random(264, 32, 3, 3)
    assert w.numel() // dim > range_penalties.CHUNK / 2 * (3 - dim), "one chunk would show nothing"
    w[3, 0, 0, 0] = w[77, 1, 1, 1] = -2.0  # a tie between chunks
    w[200, 0, 2, 0] = 2.0
    by_default = apply(name, w, start(name, dim), stable=stable, dim=dim)
    for chunk in (1000, 2**30):
        monkeypatch.setattr(range_penalties, "CHUNK", chunk)
        for default, own in zip(by_default, apply(name, w, start(name, dim), stable=stable, dim=dim), strict=True):
            # Float64 sums of 76,032 terms in another order.
            close(own, default, rtol=1e-10, atol=1e-14)


class Small(nn.Module):
    """One of each kind that is regularized: a stem, a depthwise, a pointwise and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)


def small() -> Small:
    torch.manual_seed(3)
    model = Small().double()
    for weight in regularizers.regularized(model).values():
        nn.init.normal_(weight, std=0.1)  # torch's uniform weights are all inside the margin's start
    return model


def with_gradients(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        # In the layout of rows, whatever the weight's own: autograd does not promise one.
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_channels_last_changes_nothing(name: str, dim: int) -> None:
    rows, last = with_gradients(small()), with_gradients(small())
    last.to(memory_format=torch.channels_last)
    assert not last.get_parameter("stem.weight").is_contiguous()
    before = {key: p.grad.clone() for key, p in rows.named_parameters() if p.grad is not None}
    parts = []
    for model in (rows, last):
        regularizer = Regularizer(RegularizerSpec(name, 0.2, dim=dim), model)
        parts.append((regularizer.add_gradients(), regularizer.parameters))
    # Float64 sums in another order.
    close(parts[1][0], parts[0][0], rtol=1e-12, atol=1e-14)
    for key, parameter in parts[0][1].items():
        other = parts[1][1][key]
        close(other.detach(), parameter.detach(), rtol=1e-12, atol=1e-14)
        assert parameter.grad is not None and other.grad is not None
        close(other.grad, parameter.grad, rtol=1e-12, atol=1e-14)
    for (key, parameter), other in zip(rows.named_parameters(), last.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None
        close(other.grad, parameter.grad, rtol=1e-12, atol=1e-14)
        assert parameter.grad.equal(before[key]) == (key not in regularizers.regularized(rows))


# --- a model -------------------------------------------------------------------------------------------------------


def test_which_weights_are_regularized() -> None:
    assert list(regularizers.regularized(small())) == [
        "stem.weight",
        "depthwise.weight",
        "pointwise.weight",
        "head.weight",
    ]


@pytest.mark.parametrize("name", ["linf", "margin", "clip"])
def test_a_frozen_weight_stays_and_a_shared_one_counts_once(name: str) -> None:
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    third.weight = second.weight
    model, frozen = nn.Sequential(first, second, third), first.weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    regularizer = Regularizer(RegularizerSpec(name, 1.0), model)
    assert list(regularizer.weights) == ["1.weight"]
    regularizer.add_gradients()
    regularizer.step(0.1)
    regularizer.after_step()
    assert torch.equal(frozen, before) and frozen.grad is None


def test_the_margin_of_a_weight_of_one_value_starts_above_0() -> None:
    margin = Regularizer(RegularizerSpec("margin", 0.1), nn.Sequential(nn.Linear(1, 1)))
    assert 0 < float(margin.parameters["0.weight"].detach()) < 1e-6 and bool(torch.isfinite(margin.add_gradients()))


def test_transposed_convolutions_are_regularized_in_a_module_and_in_the_graph_that_is_trained() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3))
    graph = trace(network.eval(), torch.zeros(2, 3, 8, 8))
    for one in (network, graph):
        assert list(regularizers.regularized(one)) == ["0.weight", "1.weight"]
    ranges = loop.range_ratios(network)
    assert loop.range_ratios(graph) == pytest.approx(ranges) and len(ranges) == 2


@pytest.mark.parametrize("dim", [1, 2])
def test_parameters_start_where_the_paper_starts_them(dim: int) -> None:
    model = small()
    margin = Regularizer(RegularizerSpec("margin", 0.1, dim=dim), model).parameters
    alpha = Regularizer(RegularizerSpec("soft-minmax", 0.1, dim=dim), model).parameters
    assert list(margin) == list(alpha) == list(regularizers.regularized(model))
    for name, weight in regularizers.regularized(model).items():
        columns = to_vectors(weight.detach(), dim)
        close(margin[name].detach(), 2 * columns.std(dim=0), rtol=1e-12, atol=0)  # float64 sums in another order
        assert alpha[name].tolist() == [0.1]
    assert not Regularizer(RegularizerSpec("linf", 0.1), model).parameters
    assert not Regularizer(RegularizerSpec("kure", 0.1), model).parameters


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 2])
def test_a_soft_minmax_of_large_weights_draws_the_ends_together(dim: int) -> None:
    model = nn.Conv2d(16, 16, 3)
    nn.init.normal_(model.weight, std=0.7, generator=torch.Generator().manual_seed(0))
    regularizer = Regularizer(RegularizerSpec("soft-minmax", 1.0, dim=dim), model)
    before = float(model.weight.detach().abs().max())
    values = [float(regularizer.step(0.5)) for _ in range(200)]
    # As written alpha rests below zero here: the penalty is negative, and the weights grow.
    assert min(values) > 0 and values[-1] < values[0]
    assert float(model.weight.detach().abs().max()) < before


@pytest.mark.parametrize("name", NAMES)
def test_the_model_s_penalty_is_the_layers_sum(name: str) -> None:
    model = small()  # without gradients: layers that the loss does not reach
    regularizer = Regularizer(RegularizerSpec(name, 0.2), model)
    total = regularizer.add_gradients()
    expected = 0.0
    for key, weight in regularizers.regularized(model).items():
        own = regularizer.parameters.get(key)
        value, dw, slope = apply(name, weight.detach(), own, strength=0.2, stable=True)
        expected += 0.2 * float(value)
        assert weight.grad is not None
        assert weight.grad.equal(dw)
        if own is not None:
            assert own.grad is not None and own.grad.equal(0.2 * slope)
    assert float(total) == pytest.approx(expected, rel=1e-12)  # a float64 sum in another order


def test_what_cannot_be_regularized_is_named() -> None:
    with pytest.raises(InputError, match="'soft-minmax'"):
        Regularizer(RegularizerSpec("soft-minimax", 0.1), small())
    with pytest.raises(InputError, match="'head.weight'"):
        Regularizer(RegularizerSpec("linf", 0.1, dim=5), small())


# --- a large layer -------------------------------------------------------------------------------------------------


def widest(*, stable: bool, channels: int, steps: int) -> tuple[float, float]:
    """The largest |M| over `steps` of the training loop's update without a task, and the first max |w|."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    top = float(conv.weight.detach().abs().max())
    regularizer = Regularizer(RegularizerSpec("margin", 0.1, stable=stable), nn.Sequential(conv))
    (m,) = regularizer.parameters.values()
    own: dict[str, Any] = {"params": [m], "momentum": 0.0, "nesterov": False}
    optimizer = torch.optim.SGD([{"params": [conv.weight]}, own], lr=0.4, momentum=0.9, nesterov=True)
    furthest = abs(m.item())
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        assert math.isfinite(float(regularizer.add_gradients()))
        optimizer.step()
        furthest = max(furthest, abs(m.item()))
    return furthest, top


# The widest layer of a ResNet-18 over the steps that decide, and a narrower one for as long as a short training.
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("channels", "steps"), [(512, 30), (128, 200)])
def test_the_stable_margin_stays_with_the_weights(channels: int, steps: int) -> None:
    furthest, top = widest(stable=True, channels=channels, steps=steps)
    assert furthest <= 2 * top


@pytest.mark.parametrize("channels", [512, 128])
def test_the_margin_as_written_is_thrown_out(channels: int) -> None:
    # At 512 channels 107,000 of 2.4 million weights are outside at first, and the gradient is minus their number.
    furthest, top = widest(stable=False, channels=channels, steps=1)
    assert furthest > 2 * top


# --- clip ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "clipped"),
    [  # the root mean square of W is sqrt(2.875 / 4)
        (1.0, [0.5, -(0.71875**0.5), 0.25, 0.71875**0.5]),
        (1.2, [0.5, -1.2 * 0.71875**0.5, 0.25, 1.0]),
        (2.0, W),
    ],
)
def test_clip_clamps_to_deviations(k: float, clipped: list[float]) -> None:
    w = torch.tensor(W, dtype=torch.float64).view(4, 1)
    range_penalties.clip(w, k)
    close(w, clipped, rtol=1e-12, atol=0)


@pytest.mark.parametrize("constant", [0.0, 0.3, -2.0])
def test_clip_leaves_a_constant(constant: float) -> None:
    w = torch.full((3, 3), constant)
    range_penalties.clip(w, 1.0)
    close(w, [[constant] * 3] * 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_clip_acts_after_the_step_on_every_layer_and_adds_no_gradient(memory: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))
    model.to(memory_format=memory)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    regularizer = Regularizer(RegularizerSpec("clip", 1.5), model)
    assert not regularizer.parameters and float(regularizer.add_gradients()) == 0
    assert all(p.grad is None for p in model.parameters())
    regularizer.after_step()
    for name, p in model.named_parameters():
        bound = 1.5 * before[name].square().mean().sqrt()
        wanted = before[name].clamp(-bound, bound) if p.ndim > 1 else before[name]
        torch.testing.assert_close(p.detach(), wanted)
        assert p.ndim == 1 or not torch.equal(p, before[name])


def test_clip_of_vectors_is_per_column() -> None:
    layer = nn.Linear(2, 5, bias=False)
    weight = torch.tensor([[1.0, 1], [9, 9], [1, 5], [9, 9], [7, 7]])
    layer.weight.data.copy_(weight)
    Regularizer(RegularizerSpec("clip", 1.0, dim=2), nn.Sequential(layer)).after_step()
    # Columns are channels 0, 2 and 1, 3; channel 4 fills no vector.
    close(layer.weight.detach(), [[1, 1], [9, 9], [1, 7**0.5], [9, 9], [7, 7]], rtol=1e-6, atol=0)


def test_the_others_do_nothing_after_the_step() -> None:
    for name in NAMES:
        layer = nn.Linear(4, 4)
        before = layer.weight.detach().clone()
        Regularizer(RegularizerSpec(name, 1.0), nn.Sequential(layer)).after_step()
        assert torch.equal(layer.weight, before)


def test_clip_below_one_deviation_is_refused() -> None:
    with pytest.raises(InputError, match="--reg-weight 0.5"):
        Regularizer(RegularizerSpec("clip", 0.5), nn.Sequential(nn.Linear(2, 2)))


def test_a_step_by_itself_is_the_penalty_s_gradient_and_nothing_of_the_task_s() -> None:
    """w - rate * strength * dR/dw and M - rate * strength * dR/dM, whatever is in `.grad`."""
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(W).reshape(2, 2))
    regularizer = Regularizer(RegularizerSpec("margin", 0.5), layer)
    regularizer.parameters[".weight"].data.fill_(0.75)
    layer.weight.grad = torch.full_like(layer.weight, 9.0)
    value = regularizer.step(0.1)
    # R = 0.75 + 0.5 + 0.25; two weights are outside, so dR/dM is 1 - 2.
    assert float(value) == pytest.approx(0.75)
    close(layer.weight.detach(), [0.5, -1.25 + 0.05, 0.25, 1.0 - 0.05], rtol=1e-6, atol=0)
    close(regularizer.parameters[".weight"].detach(), [0.75 + 0.05], rtol=1e-6, atol=0)
