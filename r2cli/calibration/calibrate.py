"""Quantize activations: find their ranges on calibration images, and round the biases to int32.

All methods that give integer networks use this. The codes of activations are unsigned, with a zero point. It is 0 where
no value is negative.
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
    """Make an unsigned grid over [low, high] in which 0 is a level. If both ends are 0, the range is [0, 1]."""
    # Zero must be exact: zero padding and ReLU give many zeros, and an error in each would add up.
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
    """Find the grids of all values on `images`, and make `net` round its values and biases to their grids, in place.

    `images` are float32 (n, *shape) on the device of `net`; afterwards `net` is on the CPU. Raises R2Error for a value
    that is not finite and for a bias that does not fit int32.
    """
    grids = calibrate(net, shape, bits, images, rule)
    round_to_grids(net, coded, grids)
    return grids


def round_to_grids(net: fx.GraphModule, coded: Mapping[str, Coded], grids: Mapping[str, Grid]) -> None:
    """Make `net` round its values and its biases to their grids, in place. Moves `net` to the CPU."""
    deployed.insert_grids(net, grids)
    net.cpu()  # the codes and grids are there
    round_biases(net, coded, grids)


def calibrate(
    net: fx.GraphModule, shape: tuple[int, ...], bits: int, images: Iterable[Tensor], rule: str = "minmax"
) -> dict[str, Grid]:
    """Find the grid of every value that needs one, on all `images` (n, *shape). Returns the grids by node.

    The observers stay in `net` until `round_to_grids` replaces them. Raises InputError where there is no image, and
    R2Error for a value that is not finite.
    """
    observed = deployed.observe(net, placement.values(net, shape), images, observers.observer(rule))
    for name, observer in observed.items():
        if not observer.finite:
            raise R2Error(
                f"the value '{name}' is NaN or infinite on the calibration images: the checkpoint is damaged, so train "
                "it again with a lower --lr"
            )
    return {name: activation_grid(*observer.range(bits), bits) for name, observer in observed.items()}


def round_biases(net: fx.GraphModule, coded: Mapping[str, Coded], activations: Mapping[str, Grid]) -> None:
    """Round every bias to a multiple of scale_x * scale_w, the unit of the layer's int32 sums; in place.

    Runtimes do so silently. We do it here, so that the accuracy that we print is the one that is deployed. Raises
    R2Error where a bias does not fit int32.
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
