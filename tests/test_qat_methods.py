"""The quantizers alone: the numbers of their papers, gradients at the bounds, and codes that are what training saw."""

from typing import Any

import pytest
import torch
from torch import Tensor

from r2cli import registry
from r2cli.qat import dorefa, ewgs, lsq, pact, quantizers, seq
from r2cli.qat.quantizers import ActivationQuantizer, TwoGrids, WideQuantizer
from r2cli.quantized import fake_quant
from r2cli.quantized.grid import Grid

W = [0.5, -1.25, 0.25, 1.0]
X = [-0.3, 0.4, 0.9, 1.7]
G = [1.0, -2.0, 0.5, 3.0]


def vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grads(out: Tensor, *inputs: Tensor) -> list[list[float]]:
    """The gradients of `inputs` for the upstream gradient G, or what of it there is."""
    found = torch.autograd.grad(out, inputs, vector(G[: len(out)]))
    return [each.reshape(-1).tolist() for each in found]


def exactly(values: list[float]) -> object:
    return pytest.approx(values, rel=1e-6, abs=1e-9)


def learner_of(kind: type[ActivationQuantizer], bits: int, parameter: float) -> ActivationQuantizer:
    learner = kind(bits).double()
    learner.parameter.data.fill_(parameter)
    return learner


# --- where all begin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["images with a dark border", "kernels with a large centre"])
def test_the_best_range_is_that_of_all_places_of_images_and_kernels(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    if kind == "images with a dark border":
        x, zero = torch.zeros(64, 16, 32, 32), 0
        x[:, :, 4:28, 4:28] = torch.randn(64, 16, 24, 24, generator=generator).relu()
    else:
        x, zero = torch.randn(256, 256, 3, 3, generator=generator), 8
        x[:, :, 1, 1] *= 3
    before = torch.get_rng_state()
    found = float(quantizers.best_range(x, 4, zero))

    def error(width: float) -> float:
        codes = (x / (width / 15)).round().clamp(-zero, 15 - zero)
        return float((codes * (width / 15) - x).square().sum())

    widest = float(x.amax()) * 15 / (15 - zero)
    assert error(found) < 1.05 * min(error(widest * share / 64) for share in range(8, 65, 2))
    assert found == float(quantizers.best_range(x, 4, zero)) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", [lsq.LsqActivation, pact.PactActivation, dorefa.DorefaActivation, ewgs.EwgsActivation])
@pytest.mark.parametrize(("mean", "codes"), [(0.5, (0, 1)), (-0.5, (-1, 0)), (9.0, (0, 1))])
def test_one_bit_has_its_level_on_the_side_of_most_values(
    kind: type[ActivationQuantizer], mean: float, codes: tuple[int, int]
) -> None:
    learner = kind(1)
    learner.start(torch.randn(2000, generator=torch.Generator().manual_seed(0)) + mean)
    assert learner.codes == codes


def test_a_weight_of_one_value_has_a_range() -> None:
    w = torch.tensor([[0.7]])
    assert float(ewgs.EwgsWeight(w, 2)(w).detach()) == pytest.approx(0.7, rel=1e-4)


# --- LSQ: equations 1 to 3 -----------------------------------------------------------------------------------------


def test_lsq_weights() -> None:
    w = vector(W).requires_grad_()
    learner = lsq.LsqWeight(w, 2)
    assert learner.step.item() == pytest.approx(1.5)
    learner.step.data.fill_(0.6)
    out = learner(w)
    assert out.tolist() == exactly([0.6, -1.2, 0, 0.6])
    gw, gs = grads(out, w, learner.step)
    assert gw == exactly([1, 0, 0.5, 0]) and gs == exactly([3.4791666667])


def test_lsq_activations() -> None:
    x, learner = vector(X).requires_grad_(), learner_of(lsq.LsqActivation, 2, 0.4)
    out = learner(x.unsqueeze(0))  # one sample of four features
    assert out.flatten().tolist() == exactly([0, 0.4, 0.8, 1.2])
    gx, gs = torch.autograd.grad(out, (x, learner.parameter), vector(G).unsqueeze(0))
    assert gx.tolist() == exactly([0, -2, 0.5, 0]) and gs.item() == pytest.approx(2.5619918195)


@pytest.mark.parametrize(("bits", "step"), [(2, 1.5), (3, 0.8660254038), (4, 0.5669467095), (8, 0.1331034764)], ids=str)
def test_lsq_starts_where_the_paper_does(bits: int, step: float) -> None:
    assert lsq.LsqWeight(vector(W), bits).step.item() == pytest.approx(step)


# --- PACT: equation 3 ----------------------------------------------------------------------------------------------


def test_pact_has_its_own_gradient_and_not_lsqs() -> None:
    x, learner = vector(X).requires_grad_(), learner_of(pact.PactActivation, 2, 1.0)
    out = learner(x)
    assert out.tolist() == exactly([0, 1 / 3, 1, 1])
    gx, ga = grads(out, x, learner.parameter)
    assert gx == exactly([0, -2, 0.5, 0]) and ga == exactly([3.0])


def test_pact_with_something_negative_has_a_bound_on_both_sides() -> None:
    learner = learner_of(pact.PactActivation, 2, 3.0)  # levels -1, 0, 1, 2
    learner.zero = 1
    x = vector([-1.7, -0.4, 1.2, 2.5]).requires_grad_()
    out = learner(x)
    assert out.tolist() == exactly([-1, 0, 1, 2])
    gx, ga = grads(out, x, learner.parameter)
    assert gx == exactly([0, -2, 0.5, 0]) and ga == exactly([3 * 2 / 3 - 1 / 3])


# --- DoReFa: equations 5 to 10 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "values"), [(2, [1 / 3, -1, 1 / 3, 1]), (4, [0.6, -1, 1 / 3, 0.8666666667])], ids=str)
def test_dorefa_weights(bits: int, values: list[float]) -> None:
    w = vector(W).requires_grad_()
    out = dorefa.quantized(w, bits, torch.ones((), dtype=torch.float64))
    assert out.tolist() == exactly(values)
    assert grads(out, w)[0] == exactly([0.9271046805, -0.6611346794, 0.5540687127, 1.4852614921])


def test_dorefa_at_one_bit_is_the_sign_times_the_mean() -> None:
    w = vector(W).requires_grad_()
    out = dorefa.quantized(w, 1, torch.ones((), dtype=torch.float64))
    assert out.tolist() == exactly([0.75, -0.75, 0.75, 0.75]) and grads(out, w)[0] == exactly(G)


def test_dorefa_activations_are_clipped_at_a_constant() -> None:
    x, learner = vector(X).requires_grad_(), learner_of(dorefa.DorefaActivation, 2, 1.0)
    out = learner(x)
    assert out.tolist() == exactly([0, 1 / 3, 1, 1]) and grads(out, x)[0] == exactly([0, -2, 0.5, 0])
    assert not list(learner.parameters())


def test_dorefas_factor_is_the_least_squares_one() -> None:
    w = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 0.02
    learner = dorefa.DorefaWeight(w, 2)
    learner.keep_scale(w)
    errors = [float((w - learner(w) * s).square().sum()) for s in (0.99, 1.0, 1.01)]
    assert min(errors) == errors[1]


# --- SEQ: the formulas at the top of its file ----------------------------------------------------------------------


def test_seq_has_as_many_levels_above_zero_as_below() -> None:
    w = vector(W).requires_grad_()
    learner = seq.SeqWeight(w, 2)
    assert learner.step.item() == pytest.approx(0.625)  # the range of two steps to each side holds max|w|
    learner.step.data.fill_(0.6)
    out = learner(w)
    assert out.tolist() == exactly([0.3, -0.9, 0.3, 0.9])
    gw, gs = grads(out, w, learner.step)
    assert gw == exactly([1, 0, 0.5, 3]) and gs == exactly([1.1041666667])  # (4.95 - 3.625) / 0.6 / sqrt(4)
    assert learner.freeze(w).decode().tolist() == exactly(out.tolist())


def test_seq_at_one_bit_is_the_sign_times_a_learned_size() -> None:
    w = vector(W).requires_grad_()
    learner = seq.SeqWeight(w, 1)
    assert learner.step.item() == pytest.approx(1.5)  # 2 * mean|w|
    assert learner(w).tolist() == exactly([0.75, -0.75, 0.75, 0.75])


def test_seq_starts_at_the_step_that_loses_least_where_it_is_fitted() -> None:
    w = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # The best uniform quantizer of a normal distribution with four levels: Max, "Quantizing for minimum distortion".
    assert seq.SeqWeight(w, 2, fitted=True).step.item() == pytest.approx(0.9957, abs=0.03)


def test_seq_with_more_bits_is_lsq() -> None:
    w = vector(W)
    assert seq.SeqWeight(w, 4)(w).tolist() == lsq.LsqWeight(w, 4)(w).tolist()


# --- EWGS: equations 1 to 5 ----------------------------------------------------------------------------------------

EWGS = [
    (1.4, 0.0, [0.7142857143, -1.4285714286, 0.3571428571, 2.1428571429], 0.6696428571, -2.4553571429),
    (1.4, 0.2, [0.7159863946, -1.4132653061, 0.3516156463, 2.0816326531], 0.6656265185, -2.4015959062),
    (0.9, 0.0, [1.1111111111, 0, 0.5555555556, 0], -0.4475308642, -1.2191358025),
]


@pytest.mark.parametrize(("end", "delta", "dw", "dl", "du"), EWGS, ids=str)
def test_ewgs_weights(end: float, delta: float, dw: list[float], dl: float, du: float) -> None:
    w = vector(W).requires_grad_()
    learner = ewgs.EwgsWeight(w, 2)
    for parameter, value in ((learner.low, -end), (learner.high, end), (learner.output, 1.0), (learner.delta, delta)):
        parameter.data.fill_(value)
    both = learner(w), learner.written_out(w)[1]
    for out in both:
        assert out.tolist() == exactly([1 / 3, -1, 1 / 3, 1])
        gw, gl, gu, go = grads(out, w, learner.low, learner.high, learner.output)
        assert gw == exactly(dw) and gl == exactly([dl]) and gu == exactly([du])
        assert go == exactly([1 / 3 + 2 + 0.5 / 3 + 3])


def test_ewgs_layer_is_one_of_integers() -> None:
    x, learner = vector([0.1, 0.8, 2.3, 0.45]), learner_of(ewgs.EwgsActivation, 2, 2.0)
    w = vector(W)
    weight = ewgs.EwgsWeight(w, 2)
    weight.reads = (learner,)
    for parameter, value in ((weight.low, -1.4), (weight.high, 1.4), (weight.output, 0.7)):
        parameter.data.fill_(value)
    frozen, grid = weight.freeze(w), learner.grid()
    assert isinstance(frozen.codec, Grid)
    assert grid.encode(x).tolist() == [0, 1, 3, 1] and frozen.codec.integers(frozen.codes).tolist() == [1, -3, 1, 3]
    assert frozen.codec.scale.item() == pytest.approx(0.1166666667) and grid.scale.item() == pytest.approx(0.6666666667)
    assert (learner(x) @ weight(w)).item() == pytest.approx(0.2333333333)


def test_ewgs_activations_start_and_step_as_the_authors_have_it() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double().clamp_min(0)
    learner = ewgs.EwgsActivation(2).double()
    learner.start(x)
    assert learner.parameter.item() == pytest.approx(4.9766902 * x.std().item(), rel=1e-6) and learner.zero == 0
    # The gradient of u - l, through the operations of the paper.
    learner.delta.fill_(0.2)
    g = torch.randn(4000, generator=torch.Generator().manual_seed(1)).double()
    x = (x + 0.01).requires_grad_()
    found = [torch.autograd.grad(out, (x, learner.parameter), g) for out in (learner(x), learner.written_out(x)[1])]
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


# --- the kernels are the formulas ----------------------------------------------------------------------------------

# Float64: sums of 600 terms in another order, and divisions where the formula multiplies.
SAME: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def require_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), **SAME)


def with_gradients(out: Tensor, g: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return out, *torch.autograd.grad(out, inputs, g)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_lsq_is_its_formula(bits: int) -> None:
    x, g = draw(20, 30, seed=0).requires_grad_(), draw(20, 30, seed=1)
    weight = lsq.LsqWeight(x.detach(), bits)
    wanted = lsq.reference(x, weight.step, weight.codes, x.numel(), g)
    require_same(with_gradients(weight(x), g, x, weight.step), wanted)
    activation = lsq.LsqActivation(bits).double()
    activation.start(x.detach())  # on both sides of 0
    wanted = lsq.reference(x, activation.parameter, activation.codes, 30, g)
    require_same(with_gradients(activation(x), g, x, activation.parameter), wanted)


@pytest.mark.parametrize("bits", [1, 2])
def test_seq_is_its_formula(bits: int) -> None:
    w, g = draw(20, 30, seed=6).requires_grad_(), draw(20, 30, seed=7)
    weight = seq.SeqWeight(w.detach(), bits)
    weight.step.data.mul_(0.7)  # some of both sides is clipped
    wanted = seq.reference(w, weight.step, bits, g)
    for one, other in zip(with_gradients(weight(w), g, w, weight.step), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # the levels are float32


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_ewgs_is_its_formula(bits: int) -> None:
    x, g = draw(20, 30, seed=2).requires_grad_(), draw(20, 30, seed=3)
    weight = ewgs.EwgsWeight(x.detach(), bits)
    weight.delta.fill_(0.3)
    weight.high.data.mul_(0.5)  # some of both sides is clipped, and the range is off its centre
    weight.low.data.mul_(0.4)
    size = weight.output.abs()
    x_q, *slopes = ewgs.reference(x, weight.low, weight.high, bits, weight.delta, 2 * size * g)
    y = (2 * x_q - 1) * size
    found = with_gradients(weight(x), g, x, weight.low, weight.high, weight.output)
    require_same(found, (y, *slopes, (g * y).sum() / weight.output))


@pytest.mark.parametrize("signed", [False, True], ids=["rectified", "signed"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_ewgs_activations_are_its_formula(bits: int, signed: bool) -> None:
    x, g = draw(20, 30, seed=4), draw(20, 30, seed=5)
    x = (x if signed else x.abs()).requires_grad_()
    learner = ewgs.EwgsActivation(bits).double()
    learner.start(x.detach())
    learner.delta.fill_(0.3)
    width, share = learner.parameter.detach() * 0.4, learner.zero / (2**bits - 1)
    learner.parameter.data.copy_(width)
    low, high = -share * width, (1 - share) * width
    x_q, gx, g_low, g_high = ewgs.reference(x, low, high, bits, learner.delta, width * g)
    found = with_gradients(learner(x), g, x, learner.parameter)
    require_same(found, ((x_q - share) * width, gx, (1 - share) * g_high - share * g_low))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_pact_is_its_formula(bits: int) -> None:
    x, g, learner = (
        draw(20, 30, seed=6).requires_grad_(),
        draw(20, 30, seed=7),
        learner_of(pact.PactActivation, bits, 0.9),
    )
    wanted = pact.reference(x, learner.parameter, bits, g)
    require_same(with_gradients(learner(x), g, x, learner.parameter), wanted)


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_dorefa_is_its_formula(bits: int) -> None:
    w, g = draw(20, 30, seed=8).requires_grad_(), draw(20, 30, seed=9)
    found = with_gradients(dorefa.quantized(w, bits, torch.ones((), dtype=torch.float64)), g, w)
    require_same(found, dorefa.reference(w, bits, g))


# --- what holds for all --------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "lsq": lsq.LsqActivation,
    "pact": pact.PactActivation,
    "dorefa": dorefa.DorefaActivation,
    "ewgs": ewgs.EwgsActivation,
}
WEIGHTS = {"lsq": lsq.LsqWeight, "dorefa": dorefa.DorefaWeight, "ewgs": ewgs.EwgsWeight}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bits", [8, 7, 4, 3, 2, 1])
@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_training_computes_with_what_the_codes_decode_to(name: str, bits: int, layout: torch.memory_format) -> None:
    kind = WEIGHTS[name]
    least, most = registry.QAT_METHODS[name].bits
    if not least <= bits <= most:
        return
    w = torch.randn(20, 30, 9, 8, generator=torch.Generator().manual_seed(bits)).mul(0.1).to(memory_format=layout)
    learner = kind(w, bits)
    frozen = learner.freeze(w)
    assert torch.equal(learner(w.requires_grad_()), frozen.decode()) and learner(w).stride() == w.stride()
    assert torch.equal(frozen.codec.encode(frozen.decode()), frozen.codes)
    assert 2**bits / 7 < len(frozen.codes.unique()) <= 2**bits


@pytest.mark.parametrize("signed", [False, True], ids=["rectified", "signed"])
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_what_their_grid_makes_of_them(name: str, bits: int, signed: bool) -> None:
    x = torch.randn(16, 30, 12, 12, generator=torch.Generator().manual_seed(bits))
    x = x if signed else x.relu()
    learner = ACTIVATIONS[name](bits)
    learner.start(x)
    grid = learner.grid()
    assert torch.equal(learner(x), grid.decode(grid.encode(x))) and (int(grid.zero_point) > 0) == signed
    assert learner(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_gradients_at_the_bounds_are_written_out(name: str) -> None:
    """At 0 and at the highest level, which half of all rectified values are on: clamp's own changed with torch."""
    learner = learner_of(ACTIVATIONS[name], 2, 0.75 if name == "lsq" else 2.25)
    if name == "ewgs":
        learner.get_buffer("delta").fill_(0)
    x = vector([0.0, 2.25, 1.0, -0.0]).requires_grad_()
    gx = grads(learner(x), x)[0]
    inclusive = name in ("pact", "dorefa")  # 0 <= x < a; the others: 0 < x < the highest level
    assert gx == [1.0 if inclusive else 0.0, 0.0, 0.5, 3.0 if inclusive else 0.0]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_a_range_that_left_the_positive_side_is_held(name: str) -> None:
    learner = learner_of(ACTIVATIONS[name], 2, -1.0)
    assert learner.grid().scale.item() > 0 and bool(torch.isfinite(learner(vector(X))).all())


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_low_levels_behind_a_wide_grid_are_the_two_one_after_the_other(name: str) -> None:
    x = torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    wide, low = WideQuantizer().double(), ACTIVATIONS[name](2).double()
    wide.watching = wide.rectifies = True
    low.start(wide(x.detach()))
    wide.settle()
    first, second = TwoGrids(wide, low)(x)
    one = fake_quant.quantize_straight(x.relu(), wide.size, wide.codes)
    other = low(one)
    assert torch.equal(first, one) and torch.equal(second, other)
    g, own = (torch.randn_like(x) for _ in range(2))
    inputs = (x, *low.parameters())
    found = torch.autograd.grad((first, second), inputs, (g, own), retain_graph=True)
    wanted = torch.autograd.grad((one, other), inputs, (g, own))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_rounding_passes_a_gradient_scaled_by_what_it_took_away() -> None:
    x = vector([0.2, 0.7, -1.4, 2.5]).requires_grad_()
    assert grads(fake_quant.round_with_gradient(x), x)[0] == G
    out = fake_quant.round_with_gradient(x, 0.5)
    assert out.tolist() == [0, 1, -1, 2]
    assert grads(out, x)[0] == exactly([1 + 0.5 * 0.2, -2 - 0.5 * 2 * 0.3, 0.5 - 0.5 * 0.5 * 0.4, 3 + 0.5 * 3 * 0.5])
