"""Where a quantized network loses: what arrives at each of its values, what each layer adds, and what that costs.

Both networks run side by side on the same inputs, node by node of one graph. The reference is the float network as the
candidate's method began with it: without BatchNorms, and equalized where the method does that, so that values of one
name mean the same.

What a layer adds of its own is found by giving the candidate's layer what the reference's layer reads. What that costs
is its part in the noise of the outputs, to first order: noise e at a value changes the outputs by J e. For a random v
of mean 0 and variance 1 the mean of (v J e)^2 is |J e|^2, and one backward pass gives v J for every value at once. Both
are found on a quarter of each batch, and with four directions for each sample: one misses by 2 dB, and names the wrong
layer where two are that near. The whole takes three times as long as one evaluation.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from r2cli.calibration.deployed import FakeQuantize
from r2cli.config import layer_form
from r2cli.data.metrics import Measured
from r2cli.graph import edit, equivalence, heard, structure
from r2cli.graph.operators import ACTIVATIONS, LAYERS, NORMS, is_a, module_of
from r2cli.quantized.decibels import decibels
from r2cli.storage.input_spec import Given, each, places

# Of a row: its name, its last node, and there what the float network has, what the row gives alone, what arrives.
Watch = Callable[[str, fx.Node, Tensor, Tensor, Tensor], None]
PARTS = ("weights", "bias", "clipping", "rounding")
LOOKED_AT, LOOKED_SHARE = 16, 4  # of a batch: the least samples, and the share, that are looked at more closely
DIRECTIONS = 4  # for each of those samples


@dataclass(frozen=True)
class ValueLoss:
    """One value of the graph, all in dB, infinite where nothing is lost.

    `name` is the path of the layer that computes it, or the name of the value. `arriving` is the candidate's value
    beside the reference's. `own` is what the layer adds by itself, and `parts` are the shares of that: `weights` and
    `bias` at the layer's result, `clipping` and `rounding` at the grid behind it. `cost` is the outputs' signal to
    noise if this were all that is lost.
    """

    name: str
    arriving: float
    own: float
    cost: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Depth:
    """The values of a network in the order in which they are computed, and what arrives at each output, in dB."""

    values: tuple[ValueLoss, ...]
    outputs: tuple[float, ...]

    @property
    def begins(self) -> str | None:
        """The first value at which no more arrives than at the worst output."""
        return next((value.name for value in self.values if value.arriving <= min(self.outputs)), None)

    def worst(self, share: float = 0.5) -> list[ValueLoss]:
        """The fewest values whose costs are that share of all costs."""
        noise = [10 ** (-value.cost / 10) for value in self.values]
        found, left = list[ValueLoss](), share * sum(noise)
        for own, value in sorted(zip(noise, self.values, strict=True), key=lambda pair: -pair[0]):
            if left > 0:
                found.append(value)
            left -= own
        return found


@dataclass(frozen=True)
class Comparison:
    """Two networks on the same samples: value by value, and by the task's metric, where there is one; and what would
    mend the candidate, the most for a byte first, or for its cost."""

    depth: Depth
    samples: int
    before: Measured | None = None
    after: Measured | None = None
    mends: tuple["Mend", ...] = ()
    pictures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # what the page draws, by row


@dataclass(frozen=True)
class Mend:
    """A choice for one layer: the outputs' dB with it, how many more that is, and the bytes that it adds to the file.

    `cost` is what it adds in a table of costs, None without one, and where a width is not in it. `keep` is what --keep
    of `r2 ptq` says of layers, and `options` is how.
    """

    layer: str
    choice: str
    outputs: float
    won: float
    bytes: int
    cost: float | None
    keep: Mapping[str, str]

    @property
    def options(self) -> str:
        return " ".join(layer_form.shown(self.keep))

    def told(self) -> dict[str, object]:
        """The numbers and the options, for a reader that is a program."""
        return {**{name: value for name, value in self.__dict__.items() if name != "keep"}, "options": self.options}


@dataclass
class Ratio:
    """Signal and noise, summed over batches."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, signal: float, difference: Tensor) -> None:
        """Add noise to a signal of that energy, as `energy` gives it."""
        self.signal += signal
        self.noise += energy(difference)

    @property
    def in_db(self) -> float:
        return decibels(self.signal, self.noise)


def energy(values: Tensor) -> float:
    """The sum of squares."""
    return float(torch.linalg.vector_norm(values)) ** 2


@dataclass
class _Sums:
    """What is summed for one value."""

    arriving: Ratio = field(default_factory=Ratio)
    own: Ratio = field(default_factory=Ratio)
    parts: dict[str, Ratio] = field(default_factory=lambda: {part: Ratio() for part in PARTS})
    cost: float = 0.0

    def told(self, name: str, samples: int) -> ValueLoss:
        parts = {part: ratio.in_db for part, ratio in self.parts.items()}
        return ValueLoss(name, self.arriving.in_db, self.own.in_db, decibels(samples * DIRECTIONS, self.cost), parts)


def compare(
    pair: tuple[fx.GraphModule, fx.GraphModule],
    batches: Iterable[Given],
    seen: Callable[[Given, Given], None],
    watch: Watch | None = None,
) -> Depth:
    """Run a float network and what was made of it, as `pairing.graphs` gives them, on `batches`; `seen` gets the
    outputs of both, batch by batch, and `watch` the values at the end of every row. There is one batch at least.
    """
    walk = _Walk(*pair)
    walk.watch = watch
    generator = torch.Generator().manual_seed(0)
    for inputs in batches:
        seen(*walk.add(inputs, generator))
    values = tuple(sums.told(name, walk.samples) for name, sums in walk.sums.items())
    return Depth(values, tuple(ratio.in_db for ratio in walk.outputs))


class _Walk:
    """Both graphs, run side by side."""

    def __init__(self, plain: fx.GraphModule, made: fx.GraphModule) -> None:
        self.plain, self.made = fx.Interpreter(plain), fx.Interpreter(made)
        self.twins = {node.name: node for node in plain.graph.nodes}
        self.rows = rows_of(made)
        self.heard = {node: heard.ends(made, node) for node in self.rows}
        self.ends = [
            node for node in self.rows if not any(self.rows.get(user) == self.rows[node] for user in node.users)
        ]
        self.last = structure.last_readers(made)
        self.sums = {name: _Sums() for name in self.rows.values()}
        self.outputs: list[Ratio] = []
        self.samples = 0  # that are looked at
        self.looks = True
        self.watch: Watch | None = None

    def add(self, inputs: Given, generator: torch.Generator) -> tuple[Any, Any]:
        """Run a batch, and add what is lost in it. Returns the outputs of both."""
        count = len(places(inputs)[0])
        cut = max(LOOKED_AT, count // LOOKED_SHARE)
        found = self._pass(each(inputs, lambda one: one[:cut]), generator)
        if count > cut:
            more = self._pass(each(inputs, lambda one: one[cut:]), None)
            found = tree_map(lambda *parts: torch.cat(parts), found, more)
        return found

    def _pass(self, inputs: Given, generator: torch.Generator | None) -> tuple[Any, Any]:
        """Run a batch: with a generator, what each layer adds and what that costs are looked at too."""
        self.looks = generator is not None
        floats, codes, alone = dict[fx.Node, Any](), dict[fx.Node, Any](), dict[fx.Node, Any]()
        given = iter(places(inputs))
        for node in self.made.module.graph.nodes:  # type: ignore[union-attr]
            if node.op == "output":
                break
            if node.op == "placeholder":
                codes[node] = next(given)
                floats[node] = _followed(codes[node].clone()) if self.looks else codes[node]
            else:
                self._run(node, floats, codes, alone)
            self._measure(node, floats, codes, alone)
            for done in self.last.get(node, ()):
                for values in (floats, codes, alone):
                    values.pop(done, None)
        outputs = fx.node.map_arg(node.args[0], floats.__getitem__), fx.node.map_arg(node.args[0], codes.__getitem__)
        self._end([list(equivalence.tensors(one)) for one in outputs], generator)
        self.samples += len(places(inputs)[0]) if self.looks else 0
        return fx.node.map_aggregate(outputs[0], _detached), outputs[1]

    def _run(
        self, node: fx.Node, floats: dict[fx.Node, Any], codes: dict[fx.Node, Any], alone: dict[fx.Node, Any]
    ) -> None:
        """Compute the value of `node` in both networks, and what its row gives alone."""
        with torch.no_grad():
            codes[node] = _value(self.made, node, codes)
        if edit.is_grid(node):
            before = node.all_input_nodes[0]
            floats[node] = floats[before]
            with torch.no_grad():
                if self.looks:
                    alone[node] = _value(self.made, node, {before: alone.get(before, floats[before])})
            return
        with torch.set_grad_enabled(self.looks):
            value = _value(self.plain, node, floats)
            floats[node] = _followed(value) if self.looks else value
        if self.looks and node in self.rows:
            with torch.no_grad():
                alone[node] = _value(self.made, node, floats if _is_layer(self.made, node) else floats | alone)

    def _measure(
        self, node: fx.Node, floats: Mapping[fx.Node, Any], codes: Mapping[fx.Node, Any], alone: Mapping[fx.Node, Any]
    ) -> None:
        if node not in self.rows:
            return
        sums, reference, ends = self.sums[self.rows[node]], floats[node], self.heard[node]
        if ends != heard.EVERYTHING:  # what a grid leaves out on purpose is no loss
            kept = ({**one, node: one[node].clamp(*ends)} if node in one else one for one in (floats, codes, alone))
            floats, codes, alone = kept
        plain = floats[node].detach()
        signal = energy(plain)
        if node in self.ends:
            sums.arriving.add(signal, codes[node] - plain)
        if not self.looks:
            return
        with torch.no_grad():
            for part, difference in self._parts(node, floats, alone):
                sums.parts[part].add(signal, difference)
        if node not in self.ends:
            return
        if self.watch is not None:
            self.watch(self.rows[node], node, plain, alone[node], codes[node])
        noise = alone[node] - plain
        before = sums.own.noise
        sums.own.add(signal, noise)
        if sums.own.noise > before and reference.requires_grad:

            def add(gradient: Tensor) -> None:
                sums.cost += float(torch.linalg.vecdot(gradient.flatten(1), noise.flatten(1)).double().square().sum())

            reference.register_hook(add)

    def _parts(
        self, node: fx.Node, floats: Mapping[fx.Node, Any], alone: Mapping[fx.Node, Any]
    ) -> Iterator[tuple[str, Tensor]]:
        """The shares of what is lost at a node: of a layer by its weights and bias, of a grid by both its sides."""
        module, reference = module_of(self.made.module, node), floats[node]  # type: ignore[arg-type]
        if isinstance(module, FakeQuantize):
            ends = (torch.tensor([module.grid.lowest, module.grid.highest]) - module.zero_point) * module.scale
            inside = reference.clamp(float(ends[0]), float(ends[1]))
            yield "clipping", inside - reference
            yield "rounding", module(reference) - inside
        elif module is not None and _is_layer(self.made, node):
            twin = self.plain.module.get_submodule(str(self.twins[node.name].target))
            difference = alone[node] - reference
            bias, own = getattr(twin, "bias", None), getattr(module, "bias", None)
            if isinstance(bias, Tensor) and isinstance(own, Tensor):
                moved = own - bias
                spread = moved if isinstance(module, nn.Linear) else moved.view(-1, *[1] * (reference.ndim - 2))
                yield "bias", spread.expand_as(reference)
                difference = difference - spread
            yield "weights", difference

    def _end(self, outputs: list[list[Tensor]], generator: torch.Generator | None) -> None:
        """Add what arrives at the outputs, and send random directions back through the float network."""
        if not self.outputs:
            self.outputs = [Ratio() for _ in outputs[0]]
        followed, sizes = [], []
        for ratio, expected, found in zip(self.outputs, *outputs, strict=True):
            signal = energy(expected.detach())
            ratio.add(signal, found - expected.detach())
            if expected.requires_grad:
                followed.append(expected)
                sizes.append((signal / len(expected) or 1.0) ** 0.5)
        for _ in range(DIRECTIONS if followed else 0):
            drawn = [torch.randn(one.shape, generator=generator).to(one.device) for one in followed]
            directions = [one / size for one, size in zip(drawn, sizes, strict=True)]
            torch.autograd.backward(followed, directions, retain_graph=True)


def rows_of(net: fx.GraphModule) -> dict[fx.Node, str]:
    """The nodes at which something is lost, and the name of what they belong to: layers with the activation and the
    grid behind them, and grids on other values."""
    found: dict[fx.Node, str] = {}
    for node in net.graph.nodes:
        before = node.all_input_nodes[0] if node.all_input_nodes else None
        if isinstance(module_of(net, node), LAYERS):
            found[node] = str(node.target)
        elif edit.is_grid(node) and before is not None:
            found[node] = found.get(before, before.name)
        elif _follows(net, node) and before in found and len(before.users) == 1 and not edit.is_grid(before):
            found[node] = found[before]
    return found


def _follows(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` belongs to a layer right before it: a BatchNorm that is not folded, or the activation."""
    return is_a(net, node, ACTIVATIONS) or isinstance(module_of(net, node), NORMS)


def _is_layer(interpreter: fx.Interpreter, node: fx.Node) -> bool:
    return isinstance(module_of(interpreter.module, node), LAYERS)  # type: ignore[arg-type]


def _value(interpreter: fx.Interpreter, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return getattr(interpreter, node.op)(node.target, args, kwargs)


def _followed(value: Any) -> Any:
    """`value`, with its gradient followed where it is a tensor of floats that has none yet."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
