"""k-means: the centroids that a palette starts from, and for `--method kmeans` ends with.

Scalars: the optimum. Values are counted into points (a 16-bit tensor's patterns, all values of a small tensor, fine
bins with exact means of a large one), a dynamic programme finds the best cuts between points, and Lloyd's iterations on
the finest points finish what coarser ones left. Following Wang and Song, "Ckmeans.1d.dp" (2011), and Gronlund et al.,
"Fast exact k-means in 1D" (2017), with the recursion over cuts run level by level as array operations.

Vectors: k-means++ on a sample, Lloyd's iterations on it and then on all, elements weighted one by one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r2cli.quantized.palette import to_vectors
from r2cli.quantized.value_counts import SIXTEEN_BIT, Count

EXACT = 1 << 15  # up to so many values each is a point of its own
BINS = 1 << 15  # of a larger tensor; the narrowest is a few hundred-thousandths of mean |w| wide
PROGRAMME = 4096  # points of the dynamic programme; Lloyd's iterations then see all
LLOYD = 300  # iterations at most
CHUNK = 1 << 16  # elements, or vectors, at once
SAMPLE = 1 << 16  # vectors that k-means++ and most iterations look at
RESTARTS = 4
VECTOR_ITERATIONS, LAST_ITERATIONS = 40, 3

Array = NDArray[np.float64]
Pieces = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Points:
    """A distribution of scalars: ascending values (m,) and how much each weighs, > 0 (m,)."""

    value: Array
    weight: Array


# --- points --------------------------------------------------------------------------------------------------------


def points(w: Tensor, importance: Tensor | None = None) -> Points:
    """The values of `w`, any shape, float32 or 16 bits, as points; `importance` of the same shape weighs them."""
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
    """The same of a tensor that is read piece by piece: 1-D, finite. Twice for float32, once for 16 bits."""
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
    """Bins of equal width in w / (|w| + mean |w|): narrow where weights are many, and no outlier widens them."""

    def __init__(self, mean_abs: float) -> None:
        self.unit = mean_abs or 1.0
        self.weight = torch.zeros(BINS, dtype=torch.float64)
        self.sum = torch.zeros(BINS, dtype=torch.float64)

    def add(self, piece: Tensor, weights: Tensor | None) -> None:
        t = piece / (piece.abs() + self.unit)
        index = t.add_(1).mul_(BINS / 2).to(torch.int32).clamp_(0, BINS - 1)
        self.weight += torch.bincount(index, weights, minlength=BINS).cpu()
        self.sum += torch.bincount(index, piece if weights is None else piece * weights, minlength=BINS).cpu()

    def points(self) -> Points:
        there = self.weight > 0
        value = (self.sum[there] / self.weight[there]).numpy()
        order = np.argsort(value, kind="stable")  # means of neighbouring bins, in order but for their rounding
        return Points(value[order], self.weight[there].numpy()[order])


def _positive(importance: Tensor) -> Tensor:
    """Importance with a floor, so that every weight is near some centroid; all ones where nothing matters."""
    mean = float(importance.mean(dtype=torch.float64))
    return importance.float() / mean + 1e-3 if mean > 0 else torch.ones_like(importance, dtype=torch.float32)


# --- scalars -------------------------------------------------------------------------------------------------------


def scalar(given: Points, k: int) -> Array:
    """The `k` centroids (k,), ascending, of least weighted squared error; fewer where there are fewer points."""
    if len(given.value) <= k:
        return given.value.copy()
    coarse = _merged(given, max(PROGRAMME, 4 * k))
    cuts = _cuts(coarse, k)
    runs = np.add.reduceat(coarse.weight, cuts), np.add.reduceat(coarse.weight * coarse.value, cuts)
    centroids: Array = runs[1] / runs[0]
    return centroids if len(coarse.value) == len(given.value) else refined(given, centroids)


def error(given: Points, centroids: Array) -> float:
    """The weighted squared distance of all points to their nearest centroid."""
    near = centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, given.value)]
    return float((given.weight * (given.value - near) ** 2).sum())


def _merged(given: Points, most: int) -> Points:
    """At most `most` points: neighbours in the list become their mean."""
    if len(given.value) <= most:
        return given
    starts = np.unique(np.arange(most, dtype=np.int64) * len(given.value) // most)
    weight = np.add.reduceat(given.weight, starts)
    return Points(np.add.reduceat(given.weight * given.value, starts) / weight, weight)


def _cuts(given: Points, k: int) -> NDArray[np.int64]:
    """Where each of the `k` runs of points begins (k,) such that the runs' squared errors sum to the least.

    The error of a run is its sum of squares, which all cuts share, less sum(w)**2 / weight, its gain. best[j] is the
    most gain of the first j points; the best last run begins later the later it ends.
    """
    m = len(given.value)
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
    """best with one more run, and where that run begins, for every number of points j > run."""
    m = len(best) - 1
    new, begin = np.full(m + 1, -np.inf), np.zeros(m + 1, dtype=np.int32)
    stride = 1 << max(0, (m - run).bit_length() - 1)
    begin[run] = run  # no end, but the bound from below of those above it
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
    """The centroids (k,), ascending, after at most LLOYD of Lloyd's iterations: the squared error only falls."""
    weight = np.concatenate([[0.0], given.weight.cumsum()])
    moment = np.concatenate([[0.0], (given.weight * given.value).cumsum()])
    cuts = None
    for _ in range(LLOYD):
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
    """The vectors of a weight and what each element weighs, both float32 (n, dim); what fills the last block: 0."""
    weights = torch.ones_like(w, dtype=torch.float32) if importance is None else _positive(importance).reshape(w.shape)
    return to_vectors(w.detach().float(), dim), to_vectors(weights, dim)


def vector(v: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """`k` centroids (k, dim) of the vectors `v` (n, dim), each element of which weighs as `weights` (n, dim) says.

    The best of several k-means++ starts on a sample, then a few iterations on all. `generator` makes it repeatable.
    Fewer than `k` rows where there are fewer different vectors.
    """
    some: Tensor = torch.unique(v[: 4 * k * k + SAMPLE], dim=0)
    if len(some) <= k and len(v) <= 4 * k * k + SAMPLE:
        return some
    chosen = v, weights
    if len(v) > SAMPLE:
        pick = torch.randperm(len(v), generator=generator)[:SAMPLE].to(v.device)
        chosen = v[pick], weights[pick]
    best, least = None, float("inf")
    for _ in range(RESTARTS if k <= 64 else 1):
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
    """The index (n,) of every vector's nearest centroid, and its weighted squared distance (n,), a chunk at a time."""
    index, distance = [], []
    for start in range(0, len(v), CHUNK):
        part, own = v[start : start + CHUNK], weights[start : start + CHUNK]
        lost = own @ centroids.square().T - 2 * (own * part) @ centroids.T
        least, where = lost.min(1)
        index.append(where)
        distance.append((least + (own * part.square()).sum(1)).clamp_min_(0))
    return torch.cat(index), torch.cat(distance)


def _plus_plus(v: Tensor, weights: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeds (Arthur and Vassilvitskii 2007): each next one with a chance that grows with its distance."""
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
    """One iteration of Lloyd's, and the error before it; a centroid without vectors moves to the furthest vector."""
    index, distance = nearest(v, weights, centroids)
    total = torch.zeros_like(centroids, dtype=torch.float64).index_add_(0, index, weights.double())
    sums = torch.zeros_like(total).index_add_(0, index, (weights * v).double())
    new = torch.where(total > 0, sums / total.clamp_min(1e-30), centroids.double()).to(v.dtype)
    empty = torch.bincount(index, minlength=len(centroids)) == 0
    if bool(empty.any()):
        furthest = distance.topk(min(int(empty.sum()), len(v))).indices
        new[empty.nonzero().squeeze(1)[: len(furthest)]] = v[furthest]
    return new, float(distance.sum(dtype=torch.float64))
