"""What another choice for a layer would bring: measured, by changing one thing at a time in the quantized network.

A choice is what `r2 ptq` makes of its options: 16 bits for what a layer reads are those of all values that
`placement.bits_of` widens with it, and a layer that stays float takes along the grids that it alone wants. Ranges of 16
bits are those of the float network on the samples. Where biases make up for coarse grids, they do so anew.

Bytes are those of the file. What a choice takes in time is not in them: 16-bit activations and floats have no integer
kernels in ONNX Runtime. A table of costs has it.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from r2cli.analysis.depth import Mend, Ratio, ValueLoss, energy, rows_of
from r2cli.calibration import biases
from r2cli.calibration.calibrate import activation_grid
from r2cli.calibration.deployed import FakeQuantize
from r2cli.config import layer_form
from r2cli.config.layer_form import FLOAT, MOST_BITS, WIDE_BITS, LayerForm
from r2cli.graph import edit, equivalence, left_float, placement, structure
from r2cli.graph.operators import LAYERS, module_of
from r2cli.ptq import cost_table, weight_grids
from r2cli.ptq.cost_table import CostTable
from r2cli.quantized.coded import Coded
from r2cli.quantized.packing import packed_bytes
from r2cli.storage.input_spec import Given, Shape, each, places

MEASURED_ON = 16  # samples
LEAST = 0.05  # dB: less is no mending
LEAST_COST = 1e-3  # of the cheapest of all layers: less counts as that much, for measured costs are not exact


@dataclass(frozen=True)
class _Candidate:
    """The networks as `pairing.graphs` gives them, the candidate's codes as far as known, the shapes of the inputs, and
    the least and the greatest of every value of the float network."""

    plain: fx.GraphModule
    made: fx.GraphModule
    coded: Mapping[str, Coded]
    shape: Shape
    ranges: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class _Choice:
    """What `keep` would say of layers: modules in the places of others, by their paths."""

    name: str
    bytes: int
    modules: Mapping[str, nn.Module]
    keep: Mapping[str, str]


@torch.no_grad()
def measured(
    pair: tuple[fx.GraphModule, fx.GraphModule],
    rows: Sequence[ValueLoss],
    inputs: Given,
    coded: Mapping[str, Coded],
    costs: CostTable | None = None,
) -> list[Mend]:
    """The choices that mend the layers of `rows`, those first that win most for a byte, or for what `costs` says.

    `pair` is as `pairing.graphs` gives it, `inputs` are a batch, `coded` the candidate's codes, as far as known.
    Raises InputError for `costs` with holes, and for a row of it that means no layer.
    """
    plain, made = pair
    shown = places(each(inputs, lambda one: one[:MEASURED_ON]))
    values = _Values(plain)
    expected = list(equivalence.tensors(values.run(*shown)))
    of = _Candidate(plain, made, coded, tuple(tuple(one.shape[1:]) for one in shown), values.ranges)
    kinds = {layer.name: cost_table.kind(module) for layer, module in structure.named_layers(made)}
    known = None if costs is None else cost_table.of_layers(costs, kinds)

    def arrives() -> float:
        ratios = []
        for wanted, found in zip(expected, equivalence.tensors(made(*shown)), strict=True):
            ratios.append(Ratio())
            ratios[-1].add(energy(wanted), found - wanted)
        return min(ratio.in_db for ratio in ratios)

    grids = {name: of.made.get_submodule(path) for name, path in _grids(made).items()}
    means = biases.means(made, {name: one.grid for name, one in grids.items() if isinstance(one, FakeQuantize)}, shown)
    before, found = arrives(), list[Mend]()
    tried: list[Mapping[str, str]] = []
    for row in rows:
        for choice in _choices(of, row):
            if choice.keep in tried:  # 16 bits for one value are those of the values before it too
                continue
            tried.append(choice.keep)
            kept = {path: made.get_submodule(path) for path in choice.modules}
            _put(made, choice.modules)
            with biases.brought_to(made, means, shown):
                with_it = arrives()
            _put(made, kept)
            if with_it - before >= LEAST:
                cost = None if known is None else _cost(of, choice, known)
                won = with_it - before
                found.append(Mend(row.name, choice.name, with_it, won, choice.bytes, cost, choice.keep))
    if known is None:
        return sorted(found, key=lambda mend: -mend.won / max(mend.bytes, 1))
    least = LEAST_COST * sum(min(own.values()) for own in known.values())
    return sorted(found, key=lambda mend: -mend.won / max(math.inf if mend.cost is None else mend.cost, least, 1e-30))


def _put(net: fx.GraphModule, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        net.set_submodule(path, module)


def _cost(of: _Candidate, choice: _Choice, known: Mapping[str, Mapping[int | str, float]]) -> float | None:
    """What a choice costs more than the candidate does; None where a width is not in the table."""
    total = 0.0
    for name, word in choice.keep.items():
        form = _form(of, name)
        now, then = (cost_table.at(known[name], own) for own in (form, form.then(layer_form.of(word))))
        if now is None or then is None:
            return None
        total += then - now
    return total


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


def _choices(of: _Candidate, row: ValueLoss) -> Iterator[_Choice]:
    for node, name in rows_of(of.made).items():
        if name == row.name and edit.is_grid(node):
            yield from _wider(of, node)
        elif name == row.name and isinstance(module_of(of.made, node), LAYERS):
            yield from _of_weight(of, name)


def _of_weight(of: _Candidate, name: str) -> Iterator[_Choice]:
    plain = structure.layer_module(of.plain, name)
    (bits, channels), weight = _grid_of(of, name), plain.weight
    count, rows = weight.numel(), len(weight)
    size = packed_bytes(count, bits)
    if not _is_float(of, name):
        ways = [(f"{bits} bits, mse range", "mse", 0, bits, channels, "mse")]
        if not channels:
            ways.append(("a grid per channel", "channel", 4 * (rows - 1), bits, True, "minmax"))
        # One bit more, and all: where codes of so many bits take no fewer bytes than those of all, only these.
        wider = [more for more in (bits + 1, MOST_BITS) if packed_bytes(count, more) > size]
        for more in {packed_bytes(count, more): more for more in wider}.values():
            ways.append((f"{more} bits", str(more), packed_bytes(count, more) - size, more, channels, "minmax"))
        for told, word, added, own, per_channel, rule in ways:
            rounded = weight_grids.nearest(weight, own, per_channel=per_channel, rule=rule, symmetric=True)
            modules = {name: _with(of, name, rounded.decode())}
            yield _Choice(told, added, modules, {name: word})
    modules = {name: _with(of, name, weight, plain.bias), **_without_grids_of(of, name)}
    yield _Choice(FLOAT, 4 * count - size, modules, {name: FLOAT})


def _with(of: _Candidate, name: str, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """The candidate's layer with another weight, and another bias where there is one."""
    made = copy.deepcopy(structure.layer_module(of.made, name))
    made.weight = nn.Parameter(weight.reshape(made.weight.shape), requires_grad=False)
    if bias is not None and made.bias is not None:
        made.bias = nn.Parameter(bias.reshape(made.bias.shape), requires_grad=False)
    return made


def _without_grids_of(of: _Candidate, name: str) -> dict[str, nn.Module]:
    """What takes the place of the candidate's grids that no other layer wants, where this one is float."""
    floats = [layer.name for layer in structure.layers(of.made) if _is_float(of, layer.name)]
    wanted = []
    for hidden in ({*floats} - {name}, {*floats, name}):
        with left_float.hidden(of.plain, hidden):
            wanted.append({*placement.values(of.plain, of.shape)})
    return {path: nn.Identity() for value, path in _grids(of.made).items() if value in wanted[0] - wanted[1]}


def _grids(net: fx.GraphModule) -> dict[str, str]:
    """The paths of the grids by the names of the values that they are on."""
    return {node.all_input_nodes[0].name: str(node.target) for node in net.graph.nodes if edit.is_grid(node)}


def _is_float(of: _Candidate, name: str) -> bool:
    return torch.equal(structure.layer_module(of.plain, name).weight, structure.layer_module(of.made, name).weight)


def _form(of: _Candidate, name: str) -> LayerForm:
    """The widths that a layer has: of its weight, and of what it reads."""
    grid = edit.source(of.made, next(node for node in of.made.graph.nodes if str(node.target) == name))
    module = None if grid is None else of.made.get_submodule(_grids(of.made)[grid])
    act_bits = module.grid.bits if isinstance(module, FakeQuantize) else None
    return LayerForm(_grid_of(of, name)[0], act_bits, is_float=_is_float(of, name))


def _grid_of(of: _Candidate, name: str) -> tuple[int, bool]:
    """The bits of a weight, and whether its channels have grids of their own: of its codes, or as its levels look."""
    coded, weight = of.coded.get(f"{name}.weight"), structure.layer_module(of.made, name).weight
    if coded is not None:
        return math.ceil(coded.codec.bits), getattr(coded.codec, "axis", 0) is not None
    steps = None if len(weight) == 1 else _steps(weight)
    if steps is not None:
        return _bits_of(steps), False
    of_each = [(_steps(channel), len(torch.unique(channel)) - 1) for channel in weight]
    return max(_bits_of(levels if steps is None else steps) for steps, levels in of_each), True


def _bits_of(steps: int) -> int:
    return min(MOST_BITS, max(1, math.ceil(math.log2(steps + 1))))


def _steps(values: Tensor) -> int | None:
    """Over how many steps of one grid the values spread; None where they are on no grid of 8 bits."""
    levels: Tensor = torch.unique(values)
    gaps = levels.diff()
    gaps = gaps[gaps > float(values.abs().max()) * 1e-4]
    places = (levels - levels[0]) / gaps.min() if len(gaps) else torch.zeros(1)
    on_grid = float((places - places.round()).abs().max()) < 0.02 and float(places[-1]) < 2**MOST_BITS
    return round(float(places[-1])) if on_grid else None


def _wider(of: _Candidate, node: fx.Node) -> Iterator[_Choice]:
    """16 bits for the grid at `node`, where a layer reads it or a function of it, and for all that widens with it."""
    value, grids = node.all_input_nodes[0].name, _grids(of.made)
    reads = {layer.name: edit.source(of.made, structure.node_of(of.made, layer)) for layer in structure.layers(of.made)}

    def widens(layer: str) -> bool:
        return placement.bits_of(of.made, [value], MOST_BITS, {layer: WIDE_BITS})[value] == WIDE_BITS

    wanted = {name: WIDE_BITS for name in reads if widens(name)}
    bits = placement.bits_of(of.made, of.ranges.keys() & grids.keys(), MOST_BITS, wanted)
    wide = [name for name, own in bits.items() if own == WIDE_BITS]
    if value in wide:
        modules = {grids[name]: FakeQuantize(activation_grid(*of.ranges[name], WIDE_BITS)) for name in wide}
        keep = {name: f"A{WIDE_BITS}" for name, source in reads.items() if source in wide}
        yield _Choice(f"{WIDE_BITS}-bit activations", 0, modules, keep)
