"""What another choice for a layer would bring: measured, by changing one thing at a time in the quantized network.

Bytes are those of the file. What a choice takes in time is not in them: 16-bit activations and floats have no integer
kernels in ONNX Runtime, and `r2 evaluate` says what a file takes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from r2cli.analysis.depth import Mend, Ratio, ValueLoss, energy, rows_of
from r2cli.calibration.calibrate import activation_grid
from r2cli.calibration.deployed import FakeQuantize
from r2cli.config.layer_form import WIDE_BITS
from r2cli.graph import edit, equivalence, structure
from r2cli.graph.operators import LAYERS, module_of
from r2cli.ptq import weight_grids
from r2cli.quantized.coded import Coded
from r2cli.storage.input_spec import Given, each, places

MEASURED_ON = 16  # samples
LEAST = 0.05  # dB: less is no mending


@dataclass(frozen=True)
class _Choice:
    """What is put in the place of a module's weight (and bias), or of a grid."""

    name: str
    options: str
    bytes: int
    target: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    grid: FakeQuantize | None = None


@torch.no_grad()
def measured(
    pair: tuple[fx.GraphModule, fx.GraphModule],
    rows: Sequence[ValueLoss],
    inputs: Given,
    coded: Mapping[str, Coded],
) -> list[Mend]:
    """The choices that mend the layers of `rows`, those first that win most for a byte.

    `pair` is as `pairing.graphs` gives it, `inputs` are a batch, `coded` the candidate's codes, as far as known.
    """
    plain, made = pair
    shown = places(each(inputs, lambda one: one[:MEASURED_ON]))
    values = _Values(plain)
    expected = list(equivalence.tensors(values.run(*shown)))

    def arrives() -> float:
        ratios = []
        for wanted, found in zip(expected, equivalence.tensors(made(*shown)), strict=True):
            ratios.append(Ratio())
            ratios[-1].add(energy(wanted), found - wanted)
        return min(ratio.in_db for ratio in ratios)

    before, found = arrives(), []
    for row in rows:
        for choice in _choices(plain, made, row, coded, values.ranges):
            with_it = _tried(made, choice, arrives)
            if with_it - before >= LEAST:
                found.append(Mend(row.name, choice.name, with_it, with_it - before, choice.bytes, choice.options))
    return sorted(found, key=lambda mend: -mend.won / max(mend.bytes, 1))


class _Values(fx.Interpreter):
    """Runs a network, and keeps the least and the greatest of every value."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.ranges: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            self.ranges[n.name] = float(value.min()), float(value.max())
        return value


def _choices(
    plain: fx.GraphModule,
    made: fx.GraphModule,
    row: ValueLoss,
    coded: Mapping[str, Coded],
    ranges: Mapping[str, tuple[float, float]],
) -> Iterator[_Choice]:
    for node, name in rows_of(made).items():
        if name != row.name:
            continue
        if edit.is_grid(node):
            yield from _wider(made, node, ranges)
        elif isinstance(module_of(made, node), LAYERS):
            yield from _of_weight(
                name, plain.get_submodule(name), made.get_submodule(name), coded.get(f"{name}.weight")
            )


def _of_weight(name: str, plain: Any, made: Any, coded: Coded | None) -> Iterator[_Choice]:
    (bits, channels), weight, bias = _form(made.weight, coded), plain.weight, getattr(plain, "bias", None)
    count, rows = weight.numel(), len(weight)
    if not torch.equal(made.weight, weight):
        ways = [(f"{bits} bits, mse range", "--weight-range mse", 0, bits, channels, "mse")]
        if not channels:
            ways.append(("a grid per channel", f"--keep '{name}=channel'", 4 * (rows - 1), bits, True, "minmax"))
        for more in sorted({bits + 1, 8}) if bits < 8 else ():
            ways.append(
                (f"{more} bits", f"--keep '{name}={more}'", count * (more - bits) // 8, more, channels, "minmax")
            )
        for told, options, size, own, per_channel, rule in ways:
            rounded = weight_grids.nearest(weight, own, per_channel=per_channel, rule=rule, symmetric=True)
            yield _Choice(told, options, size, name, rounded.decode())
    yield _Choice("float", f"--keep '{name}=float'", count * (32 - bits) // 8, name, weight, bias)


def _form(weight: Tensor, coded: Coded | None) -> tuple[int, bool]:
    """The bits of a weight, and whether its channels have grids of their own: of its codes, or as its levels look."""
    if coded is not None:
        return math.ceil(coded.codec.bits), getattr(coded.codec, "axis", 0) is not None
    steps, most = [], 1
    for channel in weight.flatten(1):
        levels = channel.unique()
        gaps = levels.diff()
        gaps = gaps[gaps > float(channel.abs().max()) * 1e-4]
        if len(gaps):
            steps.append(float(gaps.min()))
            most = max(most, round(float(levels[-1] - levels[0]) / steps[-1]))
    alike = len(steps) > 1 and max(steps) <= 1.01 * min(steps)
    return min(8, max(1, math.ceil(math.log2(most + 1)))), not alike


def _wider(made: fx.GraphModule, node: fx.Node, ranges: Mapping[str, tuple[float, float]]) -> Iterator[_Choice]:
    """16 bits for the grid at `node`, over the range that the float network has there, where a layer reads it."""
    value = node.all_input_nodes[0].name
    readers = [
        layer.name
        for layer, _ in structure.named_layers(made)
        if edit.source(made, structure.node_of(made, layer)) == value
    ]
    if readers and value in ranges:
        options = " ".join(f"--keep '{reader}=A{WIDE_BITS}'" for reader in readers)
        grid = FakeQuantize(activation_grid(*ranges[value], WIDE_BITS))
        yield _Choice(f"{WIDE_BITS}-bit activations", options, 0, str(node.target), grid=grid)


def _tried(made: fx.GraphModule, choice: _Choice, measure: Any) -> float:
    """What `measure` gives with a choice; the network is as it was afterwards."""
    module: Any = made.get_submodule(choice.target)
    if choice.grid is not None:
        made.set_submodule(choice.target, choice.grid)
        found: float = measure()
        made.set_submodule(choice.target, module)
        return found
    kept = {name: getattr(module, name, None) for name in ("weight", "bias")}
    for name, there in kept.items():
        own = getattr(choice, name)
        if own is not None and there is not None:
            setattr(module, name, torch.nn.Parameter(own.reshape(there.shape), requires_grad=False))
    found = measure()
    for name, own in kept.items():
        if own is not None:
            setattr(module, name, own)
    return found
