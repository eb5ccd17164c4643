"""Activations on grids, for every method that ends in integers: ranges over calibration images, biases on int32.

Activations are unsigned with a zero point, 0 where nothing is negative.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from r2cli.calibration import deployed, observers
from r2cli.errors import R2Error
from r2cli.graph import edit, placement, structure
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid


def activation_grid(low: float, high: float, bits: int) -> Grid:
    """An unsigned grid over [low, high] with 0 on a level. A value that is always 0 gets the range [0, 1]."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        high = 1.0
    scale = (high - low) / (2**bits - 1)
    zero = max(0, min(2**bits - 1, round(-low / scale)))
    return Grid(torch.tensor(scale), torch.tensor(zero, dtype=torch.int32), bits, signed=False)


def calibrate_and_round(
    net: fx.GraphModule,
    coded: Mapping[str, Coded],
    shape: tuple[int, ...],
    bits: int,
    images: Iterable[Tensor],
    rule: str = "minmax",
) -> dict[str, Grid]:
    """Set the grids of all values over `images`, round to them from now on, and round the biases; in place.

    `net` is on the images' device before, and on the CPU after. Raises R2Error for what is not finite, or does not fit.
    """
    grids = calibrate(net, shape, bits, images, rule)
    round_to_grids(net, coded, grids)
    return grids


def round_to_grids(net: fx.GraphModule, coded: Mapping[str, Coded], grids: Mapping[str, Grid]) -> None:
    """Round values to their grids from now on, and the biases to theirs; in place, and on the CPU."""
    deployed.insert_grids(net, grids)
    net.cpu()
    round_biases(net, coded, grids)


def calibrate(
    net: fx.GraphModule, shape: tuple[int, ...], bits: int, images: Iterable[Tensor], rule: str = "minmax"
) -> dict[str, Grid]:
    """The grid of every value that needs one for inputs of `shape`, over all `images`; its watchers stay in `net`.

    Raises InputError where there is no image, R2Error for a value that is not finite.
    """
    seen = deployed.observe(net, placement.values(net, shape), images, observers.observer(rule))
    for name, watch in seen.items():
        if not watch.finite:
            raise R2Error(f"the value '{name}' is NaN or infinite on the calibration images: the checkpoint is damaged")
    return {name: activation_grid(*watch.range(bits), bits) for name, watch in seen.items()}


def round_biases(net: fx.GraphModule, coded: Mapping[str, Coded], activations: Mapping[str, Grid]) -> None:
    """Put every bias on the int32 grid scale_x * scale_w, where runtimes put it silently; in place.

    Done here, the accuracy that is printed is the one that is deployed. Raises R2Error where a bias does not fit int32.
    """
    for layer, module in structure.named_layers(net):
        where = edit.source(net, structure.node_of(net, layer))
        bias = module.bias
        if where is None or bias is None:
            continue
        codec = coded[layer.weight].codec
        scale = activations[where].scale * (codec.scale / codec.integer_factor)
        codes = torch.round(bias.double() / scale.double())
        if float(codes.abs().max()) >= 2**31:
            raise R2Error(f"the bias of '{layer.name}' does not fit int32 on its grid: give --keep {layer.name}=8")
        bias.copy_((codes * scale.double()).float())
