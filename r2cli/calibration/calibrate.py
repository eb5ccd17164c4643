"""Quantize activations: find their ranges on calibration images, and round values and biases to their grids.

All methods that give integer networks use this. The codes of activations are unsigned, with a zero point. It is 0 where
no value is negative.
"""

from collections.abc import Iterable, Mapping, Set

import torch
from torch import fx

from r2cli.calibration import biases, deployed, observers
from r2cli.calibration.apart import apart
from r2cli.config.targets import DEFAULT, TARGETS, Target
from r2cli.errors import InputError, R2Error
from r2cli.graph import heard, operators, placement
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage.input_spec import Given, Shape

NO_BITS: Mapping[str, int] = {}
PIXEL_BITS = 8
IN_THE_MIDDLE = 1e-3  # of a step: nearer to the middle of two levels than float32 tells apart from it


def activation_grid(low: float, high: float, bits: int, *, symmetric: bool = False) -> Grid:
    """Make an unsigned grid over [low, high] in which 0 is a level. If both ends are 0, the range is [0, 1].

    In a `symmetric` one the middle code stands for 0, so that as signed codes it has the zero point 0.
    """
    # Zero must be exact: zero padding and ReLU give many zeros, and an error in each would add up.
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        high = 1.0
    if symmetric:
        middle = 1 << (bits - 1)
        scale = torch.tensor(max(-low, high) / (middle - 1))
        return Grid(scale, torch.tensor(middle, dtype=torch.int32), bits, signed=False)
    levels = 2**bits - 1
    scale = (high - low) / levels
    zero = max(0, min(levels, round(-low / scale)))
    if bits == PIXEL_BITS and abs(-low / scale % 1 - 0.5) < IN_THE_MIDDLE:
        # The 256 values of a pixel from -1 to 1 would each lie in the middle of two levels, as 0 does of their range:
        # half a level away from both, and each runtime would round them as it likes. A step that holds both ends has
        # no such pattern. Both ends need a level beyond 0 for it.
        zero = max(1, min(levels - 1, zero))
        scale = max(-low / zero, high / (levels - zero))
    return Grid(torch.tensor(scale), torch.tensor(zero, dtype=torch.int32), bits, signed=False)


def calibrate_and_round(
    net: fx.GraphModule,
    coded: Mapping[str, Coded],
    shape: Shape,
    bits: int,
    images: Iterable[Given],
    rule: str = "minmax",
    target: Target = TARGETS[DEFAULT],
    own: Mapping[str, int] = NO_BITS,
) -> tuple[dict[str, Grid], dict[str, Coded]]:
    """Find the grids of all values on `images`, and make `net` round its values and biases to their grids, in place.

    `own` are the bits that layers want of what they read, by their names, where those are not `bits`. `images` are
    batches of inputs (n, *shape) on the device of `net`; afterwards `net` is on the CPU. Returns the grids by value,
    and what `biases.round_biases` does. Raises R2Error for a value that is not finite.
    """
    grids = calibrate(net, shape, bits, images, rule, target, own)
    return grids, round_to_grids(net, coded, grids, images)


def round_to_grids(
    net: fx.GraphModule,
    coded: Mapping[str, Coded],
    grids: Mapping[str, Grid],
    images: Iterable[Given] | None = None,
    *,
    learned: bool = False,
) -> dict[str, Coded]:
    """Make `net` round its values and its biases to their grids, in place. Moves `net` to the CPU.

    `images` and `learned` are as for `biases.round_biases`. Returns what that does.
    """
    deployed.insert_grids(net, grids)
    net.cpu()  # the codes and grids are there
    return biases.round_biases(net, coded, grids, images, learned=learned)


def calibrate(
    net: fx.GraphModule,
    shape: Shape,
    bits: int,
    images: Iterable[Given],
    rule: str = "minmax",
    target: Target = TARGETS[DEFAULT],
    own: Mapping[str, int] = NO_BITS,
) -> dict[str, Grid]:
    """Find the grid of every value that needs one, on all `images` (n, *shape). Returns the grids by node.

    The observers stay in `net` until `round_to_grids` replaces them. Raises InputError where there is no image, and
    R2Error for a value that is empty, or not finite.
    """
    values = placement.values(net, shape, result=target.codes_of_result)
    bounds = {node.name: heard.ends(net, node) for node in net.graph.nodes if node.name in values}
    observed = deployed.observe(net, values, images, observers.observer(rule))
    _require_numbers(observed, {node.name for node in net.graph.nodes if node.op == "placeholder"})
    widths = placement.bits_of(net, values, bits, own)
    ranges = {
        name: _within(observer.range(widths[name]), bounds[name], widths[name]) for name, observer in observed.items()
    }
    if target.codes_of_result:  # TensorFlow Lite's sigmoid gives this grid alone
        of_sigmoids = {node.name for node in net.graph.nodes if operators.is_a(net, node, (torch.sigmoid,))}
        ranges |= dict.fromkeys(ranges.keys() & of_sigmoids, (0.0, 1 - 2.0**-bits))
    return grids_of(net, ranges, widths, target)


def _require_numbers(observed: Mapping[str, observers.Observer], given: Set[str]) -> None:
    for name, observer in observed.items():
        if not observer.finite and name in given:
            raise InputError(f"the calibration data holds NaN or infinite values in '{name}': give --data without")
        if not observer.finite:
            raise R2Error(
                f"the network computes NaN or infinity as '{name}' on the calibration images, and no grid holds that: "
                "train it again with a lower --lr, or write that value another way"
            )
        if observer.low > observer.high:
            raise R2Error(
                f"the value '{name}' has no numbers, as one of its sizes is 0: give other data, or take it out of the "
                "network's code"
            )


def grids_of(
    net: fx.GraphModule, ranges: Mapping[str, tuple[float, float]], widths: Mapping[str, int], target: Target
) -> dict[str, Grid]:
    """The grids over `ranges` by node of `net`, with `widths` bits, which runtimes tell apart."""
    symmetric = target.symmetric
    found = {name: activation_grid(*ends, widths[name], symmetric=symmetric) for name, ends in ranges.items()}
    return apart(net, found, symmetric=symmetric)


def _within(found: tuple[float, float], bounds: tuple[float, float], bits: int) -> tuple[float, float]:
    """A range without what nothing hears.

    Where an end is cut, a level stands at the bound or beyond it, so that it gives what was cut off gives.
    """
    low, high = (min(max(end, bounds[0]), bounds[1]) for end in found)
    step = (high - low) / max(1, 2**bits - 3)
    return low - step * (low > found[0]), high + step * (high < found[1])
