"""Post-training k-means of a large tensor: ours against kmeans1d (exact) and scikit-learn, time and error in one run.

Weights are normal with 0.05 % outliers six times as wide. Time is CPU time on one thread; the error is over the least
that any row reached, or that Lloyd's iterations on all weights reach from ours.

    python benchmarks/kmeans.py --output benchmarks/kmeans.md      # with kmeans1d installed it takes minutes more
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from r2cli import __version__
from r2cli.palettes import kmeans

Array = NDArray[np.float64]


def weights(count: int) -> torch.Tensor:
    w = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02
    w[::2000] *= 6
    return w


def ours(w: torch.Tensor, k: int) -> Array:
    return kmeans.scalar(kmeans.points(w), k)


def scikit_learn(w: torch.Tensor, k: int) -> Array:
    from sklearn.cluster import KMeans

    found = KMeans(k, n_init=1, random_state=0).fit(w.numpy().reshape(-1, 1)).cluster_centers_
    return np.sort(found.astype(np.float64).ravel())


def exact(w: torch.Tensor, k: int) -> Array:
    import kmeans1d  # type: ignore[import-not-found]

    return np.sort(np.array(kmeans1d.cluster(w.numpy(), k).centroids))


def error(w: Array, centroids: Array) -> float:
    near = centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, w)]
    return float(np.square(w - near).sum())


def row(count: int, bits: int, methods: dict[str, Callable[[torch.Tensor, int], Array]]) -> list[str]:
    w = weights(count)
    every = np.sort(w.double().numpy())
    found: dict[str, tuple[float, float]] = {}
    for name, method in methods.items():
        start = process_time()
        centroids = method(w, 2**bits)
        found[name] = process_time() - start, error(every, centroids)
        if name == "ours":
            all_ = kmeans.Points(every, np.ones(len(every)))
            refined = error(every, kmeans.refined(all_, centroids))
    least = min([refined, *(lost for _, lost in found.values())])
    cells = [f"{seconds:.2f} s, {lost / least - 1:.0e}" for seconds, lost in found.values()]
    return [f"{count / 1e6:.1f} M, {bits} bit", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description="k-means of a large tensor.")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods: dict[str, Any] = {"ours": ours, "scikit-learn, one start": scikit_learn}
    if importlib.util.find_spec("kmeans1d"):
        methods["kmeans1d"] = exact
    ours(weights(100_000), 4)  # warm
    cells = [row(2_359_296, 2, methods), row(2_359_296, 4, methods), row(11_000_000, 4, {"ours": ours})]
    columns = ["weights", *methods]
    lines = [columns, ["---"] * len(columns), *(own + ["-"] * (len(columns) - len(own)) for own in cells)]
    text = "\n\n".join(
        [
            "# k-means without training",
            "CPU seconds on one thread, and squared error above the least; "
            f"r2cli {__version__}, torch {torch.__version__}.",
            "\n".join(f"| {' | '.join(line)} |" for line in lines),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
