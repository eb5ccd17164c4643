"""DKM: cases worked by hand, gradients against the unrolled iterations in float64, learners against their codes."""

import pytest
import torch

from r2cli import registry
from r2cli.palettes import dkm, learners, tables
from r2cli.palettes.tables import PaletteForm
from r2cli.quantized.coded import Coded
from r2cli.quantized.palette import from_vectors, to_vectors
from r2cli.registry import DkmOptions

# w, first centroids and incoming gradient, worked by hand.
W = [-0.9, -0.7, 0.1, 0.2, 0.8, 1.0]
START = [-0.5, 0.5]
G = [1.0, -1.0, 0.5, 0.5, -0.5, 1.0]
CASES = [
    (
        *(0.1, 1, [-0.74138610, 0.53962812]),
        [-0.74138608, -0.74138504, 0.38692749, 0.51658753, 0.53962798, 0.53962812],
        [0.03209629, 0.03206738, 1.27640230, 0.53560292, 0.37055894, 0.37056037],
    ),
    (
        *(0.1, 5, [-0.79908919, 0.52521038]),
        [-0.79908918, -0.79908874, 0.52272308, 0.52503409, 0.52521038, 0.52521038],
        [-0.00884163, -0.00885727, 0.39746754, 0.37466879, 0.37278147, 0.37278147],
    ),
    (
        *(0.1, 200, [-0.79908920, 0.52521037]),
        [-0.79908919, -0.79908876, 0.52272311, 0.52503409, 0.52521037, 0.52521037],
        [-0.00884122, -0.00885685, 0.39746615, 0.37466875, 0.37278158, 0.37278158],
    ),
    (
        *(0.5, 5, [-0.51131983, 0.58853493]),
        [-0.49387624, -0.47017954, 0.11315084, 0.22671802, 0.55137420, 0.57281272],
        [-0.04337378, -0.31490108, 0.62587567, 0.65305233, 0.23057259, 0.37538596],
    ),
]


@pytest.mark.parametrize("form", ["scalar", "vector"])
@pytest.mark.parametrize(("tau", "iterations", "centroids", "out", "gradient"), CASES)
def test_cases_worked_by_hand(
    form: str, tau: float, iterations: int, centroids: list[float], out: list[float], gradient: list[float]
) -> None:
    w = torch.tensor(W, dtype=torch.float64, requires_grad=True)
    start, g = torch.tensor(START, dtype=torch.float64), torch.tensor(G, dtype=torch.float64)
    if form == "scalar":
        found, after = dkm.scalar(w, start, tau, iterations)
    else:
        found, after = (t.flatten() for t in dkm.vector(w.reshape(2, 1, 3), start[:, None], tau, iterations))
    (dw,) = torch.autograd.grad(found, w, g)
    assert after.tolist() == pytest.approx(centroids, abs=1e-8)
    assert found.tolist() == pytest.approx(out, abs=1e-8)
    assert dw.tolist() == pytest.approx(gradient, abs=1e-8)


@pytest.mark.parametrize(("k", "tau"), [(2, 1e-4), (4, 1e-4), (4, 2e-5), (16, 1e-5), (16, 2e-6)])
def test_a_large_layers_scalars_are_the_naive_ones_to_the_interpolation(k: int, tau: float) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(30_000, generator=generator) * 0.02
    w[:5] *= 4
    start, g = torch.linspace(-0.04, 0.04, k), torch.randn(30_000, generator=generator)
    one, other = w.clone().requires_grad_(), w.double()[:, None].requires_grad_()
    found, after = dkm.scalar(one, start, tau, 3)
    expected, centroids = dkm.reference(other, start.double()[:, None], tau, 3)
    (dw,) = torch.autograd.grad(found, one, g)
    (exact,) = torch.autograd.grad(expected, other, g.double()[:, None])
    found, expected = found.detach(), expected.detach()
    # A node is a quarter as wide as the step between two clusters' attention; the error falls with its square.
    assert float((dw - exact[:, 0]).norm() / exact.norm()) < 1e-2
    assert float((found - expected[:, 0]).norm() / expected.norm()) < 3e-4
    assert after.tolist() == pytest.approx(centroids[:, 0].tolist(), abs=1e-6)


@pytest.mark.parametrize(("k", "dim", "tau"), [(4, 2, 2e-5), (16, 4, 4e-5), (2, 8, 1e-3)])
def test_vectors_in_chunks_have_the_naive_gradient(
    k: int, dim: int, tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dkm, "CELLS", 100 * k)
    generator = torch.Generator().manual_seed(0)
    w = (0.02 * torch.randn(90 * dim, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    start = 0.02 * torch.randn(k, dim, generator=generator, dtype=torch.float64)
    into = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((90 * dim, 5), (k, dim))]
    soft, after = dkm.vector(w.reshape(90, dim, 5), start, tau, 3)
    vectors, expected = dkm.reference(to_vectors(w, dim), start, tau, 3)
    found, naive = (soft.reshape(w.shape), after), (from_vectors(vectors, tuple(w.shape)), expected)
    for one, other in zip(found, naive, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-14)
    (dw,), (exact,) = torch.autograd.grad(found, w, into), torch.autograd.grad(naive, w, into)
    assert float((dw - exact).norm() / exact.norm()) < 1e-11


def test_attention_is_none_before_it_is_too_small_for_a_normal_number() -> None:
    centroids = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    away = torch.tensor([50.0, 58.0, 65.0, 90.0, 200.0])  # logits between the two, tau 1
    # The sixth vector is the second centroid's alone and takes it to a height of 1: each other vector's height is its
    # attention to that centroid.
    v = torch.stack([torch.cat([(1 - away) / 2, torch.tensor([200.0])]), torch.tensor([0.0, 0, 0, 0, 0, 1])])
    found, after = dkm.vector(v.reshape(1, 2, 6), centroids, 1.0, 1)
    assert after[:, 1].tolist() == [0, 1]
    height = found[0, 1]
    assert height[2:5].equal(torch.zeros(3)) and height[5] == 1
    torch.testing.assert_close(height[:2], (-away[:2]).exp(), rtol=1e-4, atol=0)


def test_a_centroid_that_nothing_is_near_stays_and_is_finite() -> None:
    w = torch.randn(6000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, after = dkm.scalar(w, torch.tensor([-1.0, 1.0, 500.0]), 0.1, 3)
    (dw,) = torch.autograd.grad(found.sum(), w)
    assert after[2] == 500 and bool(torch.isfinite(dw).all())


def test_a_constant_layer_stays_what_it_is() -> None:
    w = torch.full((5000,), 0.25).requires_grad_()
    found, _ = dkm.scalar(w, torch.tensor([0.25, 1.0]), 1e-3, 3)
    (dw,) = torch.autograd.grad(found.sum(), w)
    assert torch.allclose(found, w) and bool(torch.isfinite(dw).all())


SHAPES = [(6, 5, 3, 3), (10, 70), (8, 1, 3, 3), (96, 64, 1, 1)]
FORMS = [
    PaletteForm(2, 1, None, 8),
    PaletteForm(2, 2, None, 8),
    PaletteForm(4, 4, None, 32),
    PaletteForm(1, 1, 2, 8),
    PaletteForm(3, 2, 2, 32),
]


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, entry in registry.PALETTE_METHODS.items() if entry.trains])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_hard_weight_is_what_is_frozen(method: str, form: PaletteForm, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator)
    if len(shape) == 4:
        w = w.to(memory_format=torch.channels_last)
    learner = learners.learner_of(method)(w, form, DkmOptions(), generator)
    for share in (0.5, None):
        learner.train().before_epoch(w, share)
        trained = w.clone(memory_format=torch.preserve_format).requires_grad_()
        soft = learner(trained)
        assert soft.shape == w.shape and soft.dtype == w.dtype
        if method == "dkm":
            (dw,) = torch.autograd.grad(soft.square().sum(), trained)
            assert bool(torch.isfinite(dw).all()) and float(dw.abs().max()) > 0
        frozen: Coded = learner.freeze(w)
        assert torch.equal(learner.eval()(w), frozen.decode())
        assert torch.equal(frozen.codec.encode(frozen.decode()), frozen.codes)
        assert len({tuple(v) for v in to_vectors(frozen.decode()[: form.dim], form.dim).tolist()}) <= 2**form.bits


def test_soft_scalars_of_a_learner_are_the_naive_ones_in_either_memory_format() -> None:
    w = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    made = [learners.Dkm(w, PaletteForm(2, 1, None, 8), DkmOptions(), torch.Generator()) for _ in range(2)]
    for learner in made:
        learner.train().before_epoch(w, 0.5)
    tau = float(made[0].spread) * 0.5
    expected, _ = dkm.reference(w.reshape(-1, 1), made[0].centroids[0].clone(), tau, 3)
    plain, last = made[0](w), made[1](w.to(memory_format=torch.channels_last))
    assert torch.allclose(plain, expected.reshape(w.shape), atol=1e-5)
    assert torch.allclose(plain, last, atol=1e-6)


def test_the_tails_vectors_are_near_in_what_they_have_and_do_not_vote() -> None:
    w = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    learner = learners.Dkm(w, PaletteForm(2, 2, None, 32), DkmOptions(), torch.Generator())
    learner.train().before_epoch(w, 0.5)
    tau, start = float(learner.spread) * 0.5, learner.centroids[0].clone()
    whole, centroids = dkm.reference(to_vectors(w[:4], 2), start, tau, 3)
    soft = learner(w)
    assert torch.allclose(to_vectors(soft[:4], 2), whole, atol=1e-5)
    a = torch.softmax(-(w[4][:, None] - centroids[:, 0]).square() / tau, 1)
    assert torch.allclose(soft[4], a @ centroids[:, 0], atol=1e-5)


def test_a_hard_cluster_moves_by_its_members_mean_and_a_shared_one_by_their_sum() -> None:
    v = torch.zeros(4, 1, requires_grad=True)
    codes, g = torch.tensor([0, 1, 0, 0]), torch.tensor([[1.0], [5.0], [2.0], [6.0]])
    (dv,) = torch.autograd.grad(dkm.hard(v, torch.ones(4, 1), codes, 2), v, g)
    assert dv[:, 0].tolist() == [3, 5, 3, 3]
    # Deep Compression's figure.
    indices = torch.tensor([3, 0, 2, 1, 1, 1, 0, 3, 0, 3, 1, 0, 3, 1, 2, 2])
    w = torch.tensor([-1.0, 0.0, 1.5, 2.0])[indices].reshape(4, 4)
    learner = learners.Shared(w, PaletteForm(2, 1, None, 32), None, torch.Generator())
    assert learner.codes[0].tolist() == indices.tolist()
    gradient = (torch.arange(16) / 10).reshape(4, 4)
    learner.train()(w).backward(gradient)
    assert learner.centroids.grad is not None
    assert learner.centroids.grad.flatten().tolist() == pytest.approx([2.6, 3.5, 3.1, 2.8])


def test_a_collapsed_palette_is_found_and_started_again() -> None:
    w = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    for form in (PaletteForm(2, 1, None, 8), PaletteForm(2, 2, 20, 8)):
        learner = learners.Dkm(w, form, DkmOptions(), torch.Generator())
        learner.centroids[0, 1] = learner.centroids[0, 0]
        assert tables.coinciding(learner.centroids).tolist() == [True, *[False] * (len(learner.centroids) - 1)]
        learner.train().before_epoch(w, 0.5)
        assert learner.reseeded == 1 and not bool(tables.coinciding(learner.centroids).any())
