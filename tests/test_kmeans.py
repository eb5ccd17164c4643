"""k-means: the optimum in one dimension against every partition, points against the values, vectors against centres."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r2cli.palettes import kmeans, tables
from r2cli.palettes.kmeans import Points


def _least_error(points: Points, k: int) -> float:
    """Over every way to cut the points into `k` runs."""
    m, least = len(points.value), np.inf
    for cuts in itertools.combinations(range(1, m), k - 1):
        error = 0.0
        for start, stop in itertools.pairwise([0, *cuts, m]):
            v, w = points.value[start:stop], points.weight[start:stop]
            error += float((w * (v - np.average(v, weights=w)) ** 2).sum())
        least = min(least, error)
    return least


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(0.1, 5)), min_size=2, max_size=9, unique_by=lambda pair: pair[0]),
    st.integers(1, 5),
)
def test_no_partition_is_better(pairs: list[tuple[float, float]], k: int) -> None:
    value, weight = (np.array(column) for column in zip(*sorted(pairs), strict=True))
    points = Points(value, weight)
    k = min(k, len(value))
    centroids = kmeans.scalar(points, k)
    assert len(centroids) == k and (np.diff(centroids) > 0).all()
    assert kmeans.error(points, centroids) <= _least_error(points, k) + 1e-9


def test_the_fact_sheets_six_weights() -> None:
    points = kmeans.points(torch.tensor([-0.9, -0.7, 0.1, 0.2, 0.8, 1.0], dtype=torch.float64))
    centroids = kmeans.scalar(points, 2)
    assert centroids == pytest.approx([-0.8, 0.525])
    assert kmeans.error(points, centroids) == pytest.approx(0.6075)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bins_of_a_large_tensor_cost_next_to_nothing(bits: int) -> None:
    w = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.02
    w[::2000] *= 6
    exact = Points(np.unique(w.double().numpy()), np.ones(len(np.unique(w.numpy()))))
    binned = kmeans.scalar(kmeans.points(w), 2**bits)
    # Lloyd's iterations from the binned optimum, on the values themselves, find nothing better than by this share.
    better = binned
    for _ in range(300):
        near = np.searchsorted((better[1:] + better[:-1]) / 2, exact.value)
        sums, counts = (np.bincount(near, each, 2**bits) for each in (exact.value, exact.weight))
        better = np.where(counts > 0, sums / np.maximum(counts, 1), better)
    assert kmeans.error(exact, binned) <= kmeans.error(exact, better) * (1 + (1e-4 if bits < 8 else 2e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_tensors_are_counted_exactly(dtype: torch.dtype) -> None:
    w = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[:2] = torch.tensor([0.0, -0.0])
    counted, direct = kmeans.points(w), kmeans.points(w[:30_000].float())
    assert counted.weight.sum() == 50_000 and (np.diff(counted.value) > 0).all()
    assert set(direct.value) <= set(counted.value)
    assert float((counted.weight * counted.value).sum()) == pytest.approx(float(w.double().sum()))


def test_importance_moves_centroids_to_what_matters() -> None:
    w = torch.tensor([0.0, 0.1, 1.0, 1.1, 2.0])
    importance = torch.tensor([1.0, 1.0, 1.0, 1.0, 1000.0])
    plain, weighed = (kmeans.scalar(kmeans.points(w, each), 2) for each in (None, importance))
    assert plain == pytest.approx([0.05, 4.1 / 3]) and weighed[1] == pytest.approx(2.0, abs=1e-3)


def test_vectors_find_the_centres_that_are_there() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 4, generator=generator)
    v = centres.repeat(500, 1) + 0.01 * torch.randn(4000, 4, generator=generator)
    found = kmeans.vector(v, torch.ones_like(v), 8, generator)
    assert float(torch.cdist(centres, found).amin(1).max()) < 0.01


def test_vectors_with_fewer_values_than_centroids_are_their_own() -> None:
    v = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(50, 1)
    found = kmeans.vector(v, torch.ones_like(v), 4, torch.Generator().manual_seed(0))
    assert torch.equal(found, v[:2])


def test_what_fills_the_last_block_pulls_no_centroid() -> None:
    w = torch.full((3, 40), 5.0) + 0.1 * torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    v, weights = kmeans.vectors(w, None, 2)
    assert v.shape == weights.shape == (80, 2) and int((weights == 0).sum()) == 40
    found = kmeans.vector(v, weights, 4, torch.Generator().manual_seed(0))
    assert float((found - 5).abs().max()) < 1


def test_lloyds_iterations_only_gain_and_end_where_they_stay() -> None:
    value = np.sort(np.random.default_rng(0).normal(size=2000))
    points, start = Points(value, np.ones(len(value))), np.array([-0.1, 0.0, 0.1, 0.2])
    found = kmeans.refined(points, start)
    assert kmeans.error(points, found) < 0.5 * kmeans.error(points, start)
    assert (kmeans.refined(points, found) == found).all()
    assert kmeans.error(points, kmeans.scalar(points, 4)) <= kmeans.error(points, found)


NEAR = [[[1e30], [1.0000001e30]], [[3.4e38]], [[-3e38], [3e38]], [[0.0], [1e-45]], [[-1e-45]], [[0.0]], [[1.0], [2.0]]]


@pytest.mark.parametrize("rows", [4, 256])
@pytest.mark.parametrize("centroids", [*NEAR, [[1e30, 0.0], [1e30, 1e-45]]])
def test_a_table_is_filled_with_other_numbers_however_near_its_own_are(centroids: list[list[float]], rows: int) -> None:
    own = tables.distinct(torch.tensor(centroids))
    filled = tables.filled(own, rows)
    assert filled.shape == (rows, own.shape[1]) and bool(filled.isfinite().all())
    assert len(tables.distinct(filled)) == rows
    assert bool((filled[:, None] == own).all(2).any(0).all())
