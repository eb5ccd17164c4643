"""k-means: the centroids that a palette starts from. With `--method kmeans` they are the result.

Scalars get the optimum, up to the fineness of points, in three steps:

1. Values are counted into points: the bit patterns of a 16-bit tensor, all values of a small tensor, or fine bins of a
   large one, each with the exact mean of its values.
2. A dynamic programme finds the best cuts between at most a few thousand points. Sources: Wang and Song,
   "Ckmeans.1d.dp" (2011), and Gronlund et al., "Fast exact k-means in 1D" (2017). We run the recursion over the cuts
   level by level, as operations on arrays.
3. Lloyd's iterations on the finest points improve what coarser points left.

Vectors get k-means++ and Lloyd's iterations on a sample, and then a few iterations on all. Each element of a vector has
its own weight in the error.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r2cli.quantized.palette import to_vectors
from r2cli.quantized.value_counts import SIXTEEN_BIT, Count

EXACT = 1 << 15  # up to so many values, each is a point of its own
BINS = 1 << 15  # for a larger tensor; the narrowest is a few hundred-thousandths of mean |w| wide
PROGRAMME = 4096  # points of the dynamic programme; Lloyd's iterations then use all points
LLOYD = 300  # iterations at most
CHUNK = 1 << 16  # elements, or vectors, at once
SAMPLE = 1 << 16  # vectors that k-means++ and most iterations use
RESTARTS = 4  # starts by k-means++: its seeds are random, and Lloyd's iterations end in the nearest minimum
VECTOR_ITERATIONS, LAST_ITERATIONS = 40, 3

Array = NDArray[np.float64]
Pieces = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Points:
    """A distribution of scalars: ascending values (m,), and the weight of each, (m,) and > 0."""

    value: Array
    weight: Array


# --- points --------------------------------------------------------------------------------------------------------


def points(w: Tensor, importance: Tensor | None = None) -> Points:
    """Return the values of `w` (any shape, float32 or 16 bits) as points, weighted by `importance` (the same shape)."""
    flat = w.detach().reshape(-1)
    if flat.dtype in SIXTEEN_BIT and importance is None:
        return points_of_pieces(lambda: [flat], flat.dtype)
    weights = None if importance is None else _positive(importance.detach().reshape(-1))
    if flat.numel() <= EXACT:
        value, place = np.unique(flat.double().cpu().numpy(), return_inverse=True)
        number = np.bincount(place, None if weights is None else weights.double().cpu().numpy())
        return Points(value, number.astype(np.float64))
    total = _Bins(float(flat.abs().mean(dtype=torch.float64)))
    for start in range(0, flat.numel(), CHUNK):
        total.add(flat[start : start + CHUNK].float(), None if weights is None else weights[start : start + CHUNK])
    return total.points()


def points_of_pieces(pieces: Pieces, dtype: torch.dtype) -> Points:
    """Return the values of a tensor as points, read in 1-D pieces of finite values.

    The pieces are read twice for float32, first for mean |w|, and once for 16 bits.
    """
    if dtype in SIXTEEN_BIT:
        table = Count(dtype)
        for piece in pieces():
            table.add(piece)
        counts = table.counts()
        # -0 and 0 are one value.
        value, place = np.unique(counts.low.numpy() + 0.0, return_inverse=True)
        return Points(value, np.bincount(place, counts.number.double().numpy()).astype(np.float64))
    size, sum_ = 0, 0.0
    for piece in pieces():
        size, sum_ = size + piece.numel(), sum_ + float(piece.abs().sum(dtype=torch.float64))
    total = _Bins(sum_ / max(1, size))
    for piece in pieces():
        for start in range(0, piece.numel(), CHUNK):
            total.add(piece[start : start + CHUNK].float(), None)
    return total.points()


class _Bins:
    """Bins of equal width in w / (|w| + mean |w|), which is between -1 and 1.

    They are narrow near 0, where most weights are. Bins of equal width in w would be as wide as one outlier makes them.
    """

    def __init__(self, mean_abs: float) -> None:
        self.unit = mean_abs or 1.0
        self.weight = torch.zeros(BINS, dtype=torch.float64)
        self.sum = torch.zeros(BINS, dtype=torch.float64)

    def add(self, piece: Tensor, weights: Tensor | None) -> None:
        t = piece / (piece.abs() + self.unit)
        index = t.add_(1).mul_(BINS / 2).to(torch.int32).clamp_(0, BINS - 1)  # a huge weight rounds to t = 1
        self.weight += torch.bincount(index, weights, minlength=BINS).cpu()
        self.sum += torch.bincount(index, piece if weights is None else piece * weights, minlength=BINS).cpu()

    def points(self) -> Points:
        there = self.weight > 0
        value = (self.sum[there] / self.weight[there]).numpy()
        order = np.argsort(value, kind="stable")  # the means ascend, except where rounding swaps two neighbours
        return Points(value[order], self.weight[there].numpy()[order])


def _positive(importance: Tensor) -> Tensor:
    """Return importance with a mean of about 1 and a floor; all ones if it is 0 everywhere.

    Without the floor, weights of importance 0 could end far from every centroid.
    """
    mean = float(importance.mean(dtype=torch.float64))
    return importance.float() / mean + 1e-3 if mean > 0 else torch.ones_like(importance, dtype=torch.float32)


# --- scalars -------------------------------------------------------------------------------------------------------


def scalar(given: Points, k: int) -> Array:
    """Return the `k` centroids (k,), ascending, of least weighted squared error; fewer if there are fewer points."""
    if len(given.value) <= k:
        return given.value.copy()
    coarse = _merged(given, max(PROGRAMME, 4 * k))
    cuts = _cuts(coarse, k)
    runs = np.add.reduceat(coarse.weight, cuts), np.add.reduceat(coarse.weight * coarse.value, cuts)
    centroids: Array = runs[1] / runs[0]
    return centroids if len(coarse.value) == len(given.value) else refined(given, centroids)


def error(given: Points, centroids: Array) -> float:
    """Return the weighted squared distance of all points to their nearest centroid."""
    near = centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, given.value)]
    return float((given.weight * (given.value - near) ** 2).sum())


def _merged(given: Points, most: int) -> Points:
    """Return at most `most` points: neighbours in the list are replaced by their mean."""
    if len(given.value) <= most:
        return given
    starts = np.unique(np.arange(most, dtype=np.int64) * len(given.value) // most)
    weight = np.add.reduceat(given.weight, starts)
    return Points(np.add.reduceat(given.weight * given.value, starts) / weight, weight)


def _cuts(given: Points, k: int) -> NDArray[np.int64]:
    """Return where each of the `k` runs of points begins, (k,), for the least sum of the runs' squared errors.

    The error of a run is its sum of squares minus its gain, sum(w)**2 / weight. The sums of squares add up to the same
    for all cuts, so the gains decide. best[j] is the greatest gain of the first j points.
    """
    m = len(given.value)
    # About the mean, so that the squares of sums are not huge numbers with a small difference.
    offset = given.value - np.average(given.value, weights=given.weight)
    weight = np.concatenate([[0.0], given.weight.cumsum()])
    moment = np.concatenate([[0.0], (given.weight * offset).cumsum()])
    best = np.concatenate([[0.0], moment[1:] ** 2 / weight[1:]])
    begins = np.zeros((k, m + 1), dtype=np.int32)
    for run in range(1, k):
        best, begins[run] = _one_more_run(best, weight, moment, run)
    ends = [m]
    for run in range(k - 1, 0, -1):
        ends.append(int(begins[run, ends[-1]]))
    return np.array([0, *ends[:0:-1]], dtype=np.int64)


def _one_more_run(best: Array, weight: Array, moment: Array, run: int) -> tuple[Array, NDArray[np.int32]]:
    """Return `best` with one more run, and where that run begins, for every number of points j > run.

    The best last run begins later, the later it ends. So the ends are halved level by level: an end needs to try only
    the begins between those of its neighbours on the level before.
    """
    m = len(best) - 1
    new, begin = np.full(m + 1, -np.inf), np.zeros(m + 1, dtype=np.int32)
    stride = 1 << max(0, (m - run).bit_length() - 1)
    begin[run] = run  # not an end that is asked for, but the lower bound of those above it
    while stride:
        ends = np.arange(run + stride, m + 1, 2 * stride)
        if len(ends):
            # The ends on both sides are known from the levels before, and bound where this one's last run begins.
            low, above = begin[ends - stride], ends + stride
            high = np.minimum(np.where(above <= m, begin[np.minimum(above, m)], m), ends - 1)
            length = high - low + 1
            start = np.concatenate([[0], length.cumsum()[:-1]])
            tried = np.arange(length.sum()) + np.repeat(low - start, length)
            end = np.repeat(ends, length)
            gain = best[tried] + (moment[end] - moment[tried]) ** 2 / (weight[end] - weight[tried])
            top = np.maximum.reduceat(gain, start)
            hit = np.flatnonzero(gain == np.repeat(top, length))
            first = hit[np.searchsorted(hit, start)]
            new[ends], begin[ends] = top, tried[first]
        stride //= 2
    return new, begin


def refined(given: Points, centroids: Array) -> Array:
    """Run Lloyd's iterations on all points from `centroids` (k,), at most LLOYD: the squared error only falls.

    Returns the centroids, ascending. The points ascend, so the points of a centroid are a run, and two cumulative sums
    give every mean.
    """
    weight = np.concatenate([[0.0], given.weight.cumsum()])
    moment = np.concatenate([[0.0], (given.weight * given.value).cumsum()])
    cuts = None
    for _ in range(LLOYD):
        # The nearest centroid changes in the middle between two, so the middles are the cuts between the runs.
        middle = np.searchsorted(given.value, (centroids[1:] + centroids[:-1]) / 2)
        if cuts is not None and np.array_equal(middle, cuts):
            break
        cuts = middle
        edges = np.concatenate([[0], cuts, [len(given.value)]])
        size = np.diff(weight[edges])
        centroids = np.where(size > 0, np.diff(moment[edges]) / np.where(size > 0, size, 1), centroids)
    return centroids


# --- vectors -------------------------------------------------------------------------------------------------------


def vectors(w: Tensor, importance: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Return the vectors of a weight (channels, ...) and the weight of each element, both float32 (n, dim).

    Elements that only fill up the last block have the weight 0.
    """
    weights = torch.ones_like(w, dtype=torch.float32) if importance is None else _positive(importance).reshape(w.shape)
    return to_vectors(w.detach().float(), dim), to_vectors(weights, dim)


def vector(v: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return `k` centroids (k, dim) of the vectors `v` (n, dim), with `weights` (n, dim) for their elements.

    They are the best of several k-means++ starts on a sample, with a few iterations on all vectors. `generator` makes
    the result repeatable. There are fewer than `k` rows if there are fewer different vectors.
    """
    # Not for very many vectors: sorting them is slow, and k-means++ finds by itself that there are few different ones.
    some: Tensor = torch.unique(v[: 4 * k * k + SAMPLE], dim=0)
    if len(some) <= k and len(v) <= 4 * k * k + SAMPLE:
        return some
    chosen = v, weights
    if len(v) > SAMPLE:
        pick = torch.randperm(len(v), generator=generator)[:SAMPLE].to(v.device)
        chosen = v[pick], weights[pick]
    best, least = None, float("inf")
    for _ in range(RESTARTS if k <= 64 else 1):  # seeding many centroids takes long
        centroids = _plus_plus(*chosen, k, generator)
        for _ in range(VECTOR_ITERATIONS):
            before = centroids
            centroids, lost = _step(*chosen, centroids)
            if torch.equal(before, centroids):
                break
        if best is None or lost < least:
            best, least = centroids, lost
    assert best is not None
    for _ in range(LAST_ITERATIONS if len(v) > SAMPLE else 0):
        best, _ = _step(v, weights, best)
    return best


def nearest(v: Tensor, weights: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index (n,) of every vector's nearest centroid, and the weighted squared distance (n,) to it."""
    index, distance = [], []
    for start in range(0, len(v), CHUNK):
        part, own = v[start : start + CHUNK], weights[start : start + CHUNK]
        # sum_d own (v - c)^2 without own v^2, which is the same for all centroids of a vector: two matrix products.
        lost = own @ centroids.square().T - 2 * (own * part) @ centroids.T
        least, where = lost.min(1)
        index.append(where)
        distance.append((least + (own * part.square()).sum(1)).clamp_min_(0))
    return torch.cat(index), torch.cat(distance)


def _plus_plus(v: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return k-means++ seeds, (k, dim) or fewer: each next vector is drawn with a chance proportional to its error.

    Source: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding" (2007).
    """
    whole = (weights > 0).all(1)  # a vector that is filled up is no seed
    first = int(torch.randint(len(v), (1,), generator=generator))
    seeds = [v[first]]
    distance = torch.full((len(v),), torch.inf, dtype=v.dtype, device=v.device)
    for _ in range(k - 1):
        distance = torch.minimum(distance, (weights * (v - seeds[-1]).square()).sum(1))
        chance = (distance * whole).double().cumsum(0)
        if not chance[-1] > 0:
            break
        draw = torch.rand(1, generator=generator, dtype=torch.float64).to(v.device) * chance[-1]
        seeds.append(v[int(torch.searchsorted(chance, draw).clamp_max_(len(v) - 1))])
    return torch.stack(seeds)


def _step(v: Tensor, weights: Tensor, centroids: Tensor) -> tuple[Tensor, float]:
    """Run one of Lloyd's iterations. Returns the new centroids (k, dim), and the error of the old ones.

    A centroid without vectors moves to the vector that is furthest from its own centroid.
    """
    index, distance = nearest(v, weights, centroids)
    total = torch.zeros_like(centroids, dtype=torch.float64).index_add_(0, index, weights.double())
    sums = torch.zeros_like(total).index_add_(0, index, (weights * v).double())
    new = torch.where(total > 0, sums / total.clamp_min(1e-30), centroids.double()).to(v.dtype)
    empty = torch.bincount(index, minlength=len(centroids)) == 0
    if bool(empty.any()):
        furthest = distance.topk(min(int(empty.sum()), len(v))).indices
        new[empty.nonzero().squeeze(1)[: len(furthest)]] = v[furthest]
    return new, float(distance.sum(dtype=torch.float64))
