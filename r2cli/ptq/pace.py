"""How fast a block of BRECQ is learned: the images of a step, and the rate, by what the block computes."""

import math

from torch import fx

from r2cli.graph.operators import MATRICES

FEWEST_IMAGES = 2  # of a step, however large they are: positions of one image resemble each other
ENOUGH = 3  # numbers in the outputs of all images, for each weight of a block: with fewer, V learns more slowly
SLOWEST = 0.1  # share of the learning rate of V


def images_of_a_step(net: fx.GraphModule, layers: list[fx.Node], most: int, rows: int) -> int:
    """Return how many images a step uses: as many as give `rows` outputs of the layer with the fewest, `most` at most
    and FEWEST_IMAGES at least. `net` is propagated, and `layers` are nodes in it."""
    fewest = min(_positions(net, node) for node in layers)
    return min(most, max(FEWEST_IMAGES, math.ceil(rows / fewest)))


def _positions(net: fx.GraphModule, layer: fx.Node) -> int:
    """Return at how many positions of one image `layer` gives its channels."""
    shape: tuple[int, ...] = tuple(layer.meta["tensor_meta"].shape[1:])
    channels = shape[-1 if isinstance(net.get_submodule(str(layer.target)), MATRICES) else 0]
    return math.prod(shape) // max(1, channels)


def share_of_rate(numbers: int, weights: int) -> float:
    """Return the share of the learning rate with which V learns `weights` from so many `numbers` in the outputs.

    The last blocks of a network for many classes have fewer numbers than weights, since theirs are averages over
    positions. At the whole rate they learn the images by heart.
    """
    return max(SLOWEST, min(1.0, numbers / weights / ENOUGH))
