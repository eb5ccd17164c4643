"""BRECQ: round the weights of a block up or down together, so that the output of the block changes least.

Paper: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (2021), section 3.
The rounding is AdaRound's (`adaround.py`): h(V), its initial value, and the term that drives h to 0 or 1.

    loss = |block(x) - block_q(x^)|^2 / |block(x) - block_nearest(x^)|^2 + weight * mean(1 - |2 h(V) - 1|^beta)

x is the block's input in the float network, and x^ its input in the network whose earlier blocks are rounded already.

Where we differ from the paper:

- A block is the shortest run of operations with one input, one output and two layers, in any graph. It may be a
  residual block, or a depthwise layer with a pointwise one.
- The error is not weighted by the Fisher information, which needs labels.
- A step uses fewer images where they are large: every position is one more sample of a layer's outputs. At 240 pixels
  a step of the early blocks takes 2 images in place of 32, and the time goes into more steps. V has a high learning
  rate, because 600 steps are few: the paper takes 20,000. Blocks with few outputs for their weights have a lower one.
- The scale of each grid and each bias are learned with the rounding. At 2 bits that gains as much as the blocks do.
- Where it is asked for, activations of fewer than 8 bits are rounded by chance while a block learns (`qdrop.py`).
- The loss is relative to the error of nearest rounding. If nearest rounding is better in the end, its codes are kept.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from r2cli.graph import structure
from r2cli.graph.operators import LayerModule
from r2cli.ptq import adaround, kept_rows, layer_sweep, pace, qdrop
from r2cli.ptq.kept_rows import KeptRows
from r2cli.ptq.ptq_method import PtqMethod, Rounded
from r2cli.ptq.qdrop import Change, LearnedStep
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage.input_spec import Given, places

LEAST = 2  # a block has at least this many layers
BATCH = 64  # images at once where nothing is learned
AT_ONCE = 128 * 2**20  # bytes of all values in a block for the images that run through it at once

LayerState = dict[str, Tensor]  # a layer's weight and bias


@dataclass(frozen=True)
class BrecqSettings:
    """`lr` is the learning rate of V; `fine_lr`, which falls to 0, that of the biases and the logarithms of the scales.

    `weight` is that of the term that drives h to 0 or 1. A step uses `batch` images at most: as many as give `rows`
    outputs of the layer with the fewest (`pace.py`).
    """

    steps: int = 600
    lr: float = 0.2
    fine_lr: float = 3e-3
    weight: float = 60.0
    batch: int = 32
    rows: int = 512
    seed: int = 0
    least: int = LEAST


# --- blocks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Nodes that read only one value, `entries`, from outside; the first block reads all inputs. Only `results` are
    read outside: the value of the last node, and outputs of the network.
    """

    entries: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    layers: tuple[str, ...]
    results: tuple[fx.Node, ...]


def blocks(net: fx.GraphModule, least: int = LEAST) -> list[Block]:
    """Cut `net` into blocks. A cut is before a layer, where the rest of the network reads only one value.

    Each block has at least `least` layers, except the last one.
    What lies between a layer and the next cut (activations, sums, pooling) is in the layer's block.
    """
    own = {layer.name for layer in structure.layers(net)}
    *computing, end = net.graph.nodes
    last = {source: node for node in computing for source in node.all_input_nodes}  # the last that reads a value
    outputs = set(end.all_input_nodes)
    found: list[Block] = []
    live: set[fx.Node] = set()
    nodes: list[fx.Node] = []
    names: list[str] = []
    entries = tuple(node for node in computing if node.op == "placeholder")

    def close() -> None:
        ends = [node for node in nodes[:-1] if node in outputs]
        if live or not ends or nodes[-1] in outputs:  # the next block reads it, or nobody
            ends.insert(0, nodes[-1])
        found.append(Block(entries, tuple(nodes), tuple(dict.fromkeys(names)), tuple(ends)))

    for node in computing:
        name = str(node.target) if node.op == "call_module" and str(node.target) in own else None
        # `live` are values that are still to be read. With a skip connection open there are two, and no cut.
        if name and len(names) >= least and live == {nodes[-1]}:
            close()
            entries, nodes, names = (nodes[-1],), [], []
        if layer_sweep.reads_nothing(node):  # a parameter is available in every block
            continue
        nodes.append(node)
        names += [name] if name else []
        live = {one for one in (*live, node) if one in last and last[one] is not node}
    close()
    return found


def run(
    net: fx.GraphModule, block: Block, x: Given, states: Mapping[str, LayerState], change: Change = qdrop.unchanged
) -> Given:
    """Run `block` on `x` (n, ...). A layer in `states` uses the weight and bias there instead of its own.

    `change` is applied to every value that the block computes, and to the inputs of the network.
    """
    values: dict[fx.Node, Any] = dict(zip(block.entries, places(x), strict=True))
    for node in block.nodes:
        if node in values:
            values[node] = change(node, values[node])
            continue
        # Parameters that no layer holds, such as a position table, are nodes of their own, and in no block.
        for source in node.all_input_nodes:
            if layer_sweep.reads_nothing(source):
                own = states.get(str(source.target))
                values[source] = layer_sweep.run(net, source, values) if own is None else own["weight"]
        name = str(node.target)
        if node.op == "call_module" and name in states:
            module = net.get_submodule(name)
            found = torch.func.functional_call(module, states[name], (values[node.all_input_nodes[0]],))
        else:
            found = layer_sweep.run(net, node, values)
        values[node] = change(node, found)
    results = tuple(values[node] for node in block.results)
    return results if len(results) > 1 else results[0]


def _run_all(
    net: fx.GraphModule, block: Block, x: KeptRows, states: Mapping[str, LayerState], change: Change = qdrop.unchanged
) -> KeptRows:
    """Run `block` on all images x (n, ...), a few at once."""
    batches = kept_rows.parts(x, min(BATCH, _at_once(block)))
    return kept_rows.gathered((run(net, block, part, states, change) for part in batches), len(x[0]))


def _at_once(block: Block) -> int:
    """Return how many images run through `block` at once."""
    return max(1, AT_ONCE // max(1, sum(map(layer_sweep.bytes_of, block.nodes))))


# --- what is learned -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearnedWeight:
    """The parameters of a layer: codes `low` + h(`v`) in the shape of its weight, scales times exp(`size`), and bias.

    The logarithm keeps the scales positive, and makes one learning rate fit scales of all sizes.
    """

    grid: Grid
    low: Tensor
    v: Tensor
    size: Tensor  # the shape of the grid's scale
    bias: Tensor | None

    def soft(self) -> LayerState:
        """Return weight and bias while the codes are still between two integers."""
        return self._state(adaround.stretched(self.v)[1].clamp(0, 1))

    def hard(self) -> Coded:
        """Return the codes that were learned, on the grid with the learned scales."""
        scale = (self.grid.scale * self.size.detach().exp()).float()
        codes = (self.low + (self.v.detach() >= 0)).clamp(self.grid.lowest, self.grid.highest)
        return Coded(replace(self.grid, scale=scale), codes.to(self.grid.dtype))

    def _state(self, up: Tensor) -> LayerState:
        """Return weight and bias for codes that are `up` above `low`; `up` is 0 to 1, in the shape of the weight."""
        grid, codes = self.grid, (self.low + up).clamp(self.grid.lowest, self.grid.highest)
        return state(grid.integers(codes) * grid.along(grid.scale * self.size.exp(), codes.ndim), self.bias)


def learned(module: LayerModule, coded: Coded) -> LearnedWeight:
    """Return parameters that start at the float weight and bias of `module`, on the grid of `coded`."""
    grid, bias = coded.codec, module.bias
    assert isinstance(grid, Grid)
    real = grid.unrounded(module.weight.detach())
    low = real.floor().clamp(grid.lowest, grid.highest)
    # A weight beyond the grid is more than 1 above `low`, where V would be the logarithm of a negative number.
    v = adaround.start((real - low).clamp(0, 1 - 1e-6)).requires_grad_()
    own = None if bias is None else bias.detach().clone().requires_grad_()
    return LearnedWeight(grid, low, v, torch.zeros_like(grid.scale).requires_grad_(), own)


def state(weight: Tensor, bias: Tensor | None) -> LayerState:
    """Return a layer's tensors by the names that its module has for them."""
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


# --- the network ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def round_network(
    net: fx.GraphModule,
    images: Given,
    nearest: Mapping[str, Coded],
    advance: Callable[[], None] = lambda: None,
    grids: Mapping[str, Grid] = {},
    settings: BrecqSettings = BrecqSettings(),
) -> Rounded:
    """Round the weights of `net`. Returns codes by the weight's name, biases by the layer's, and grids by node.

    The grids of weights are those of `nearest`, with learned scales. `grids` are those of activations; if there are
    any, QDrop is done, and they are returned with learned steps.
    The float `net` is not changed. `images` are inputs, each (n, ...), on its device. `advance` is called for each
    layer.
    """
    own = {layer.name: layer for layer in structure.layers(net)}
    coded, biases, grids = dict(nearest), dict[str, Tensor](), dict(grids)
    # A recurrent layer's weights have the nearest codes.
    alone = [layer for layer in own.values() if layer_sweep.reads_nothing(structure.node_of(net, layer))]
    states = {layer.name: state(nearest[layer.weight].decode(), None) for layer in alone}
    plain: KeptRows = places(images)  # of the first block; then its first result
    rounded = plain
    structure.propagate(net, tuple(tuple(one.shape[1:]) for one in places(images)))
    for block in blocks(net):
        # A layer of an earlier block that runs here again has its codes.
        fresh = {name: structure.layer_module(net, name) for name in block.layers if name not in states}
        found = {name: nearest[own[name].weight] for name in fresh}
        states |= {name: state(found[name].decode(), _bias(module)) for name, module in fresh.items()}
        # The target is the float network's, from the float input. So a block makes up for errors of those before it.
        seen = _Seen(net, block, plain, rounded, _run_all(net, block, plain, {}), states)
        before = _error(seen, states, grids)
        if fresh and before > 0:
            parts = {name: learned(module, found[name]) for name, module in fresh.items()}
            steps = qdrop.start({node.name: grids[node.name] for node in block.nodes if node.name in grids})
            own_settings = _paced(settings, seen, parts)
            _learn(_descent(seen, parts, steps, before, own_settings), seen.count, parts, steps, own_settings)
            better = {name: part.hard() for name, part in parts.items()}
            tried = {
                name: state(better[name].decode(), None if part.bias is None else part.bias.detach())
                for name, part in parts.items()
            }
            moved = {**grids, **{name: one.hard() for name, one in steps.items()}}
            # Over all images, with hard codes: the minibatches saw soft ones.
            if _error(seen, {**states, **tried}, moved) <= before:
                found, states, grids = better, {**states, **tried}, moved
        for name, one in found.items():
            coded[own[name].weight] = one
            biases |= {name: states[name]["bias"]} if "bias" in states[name] else {}
            advance()
        plain = seen.targets[:1]
        rounded = _run_all(net, block, rounded, states, qdrop.on_grids(grids))[:1]
    return coded, biases, grids


@dataclass(frozen=True)
class _Seen:
    """A block, its inputs in the float and in the quantized network, and its outputs in the float one, each (n, ...).

    `states` are of layers that are not learned here.
    """

    net: fx.GraphModule
    block: Block
    plain: KeptRows
    rounded: KeptRows
    targets: KeptRows
    states: Mapping[str, LayerState]

    @property
    def count(self) -> int:
        return len(self.targets[0])


def _paced(settings: BrecqSettings, seen: _Seen, parts: Mapping[str, LearnedWeight]) -> BrecqSettings:
    """Return `settings` with the images of a step and the learning rate that fit the block."""
    layers = [node for node in seen.block.nodes if str(node.target) in seen.block.layers]
    batch = pace.images_of_a_step(seen.net, layers, settings.batch, settings.rows)
    share = pace.share_of_rate(_numbers(seen.targets), sum(part.v.numel() for part in parts.values()))
    return replace(settings, batch=batch, lr=settings.lr * share)


def _learn(
    descend: Callable[[Tensor], None],
    number_of: int,
    parts: Mapping[str, LearnedWeight],
    acts: Mapping[str, LearnedStep],
    settings: BrecqSettings,
) -> None:
    """Train `parts` and `acts` in place. `descend` sets the gradients of the error on images, by their numbers."""
    own = list(parts.values())
    rounding = [part.v for part in own]
    # V moves by whole units, and scales and biases by fractions of themselves, so they have a rate of their own.
    fine = [part.size for part in own] + [part.bias for part in own if part.bias is not None]
    fine += [one.size for one in acts.values()]
    adam = torch.optim.Adam([{"params": rounding, "lr": settings.lr}, {"params": fine, "lr": settings.fine_lr}])
    weight = settings.weight / sum(v.numel() for v in rounding)
    draw = torch.Generator().manual_seed(settings.seed)
    steps, warm = settings.steps, int(adaround.WARM_UP * settings.steps)
    for number in range(1, steps + 1):
        adam.zero_grad()
        descend(torch.randint(number_of, (min(settings.batch, number_of),), generator=draw))
        if number > warm:
            # The gradient of the rounding term is written out, so autograd need not run through it.
            beta, whole = adaround.beta_at((number - warm) / (steps - warm)), True
            for v in rounding:
                sigmoid, raw = adaround.stretched(v)
                assert v.grad is not None
                v.grad += weight * adaround.push(sigmoid, raw, beta)
                whole = whole and number % 50 == 0 and bool(((raw <= 0) | (raw >= 1)).all())
            if whole:
                break
        # To 0, so that the scales stand still when the last roundings are decided.
        adam.param_groups[1]["lr"] = settings.fine_lr * (1 - number / steps)
        adam.step()


def _descent(
    seen: _Seen,
    parts: Mapping[str, LearnedWeight],
    acts: Mapping[str, LearnedStep],
    before: float,
    settings: BrecqSettings,
) -> Callable[[Tensor], None]:
    """Return a function that adds the gradients of the block's squared error on the images at an index.

    `before` is the squared error of nearest rounding: so one `weight` of the rounding term fits blocks whose outputs
    have different sizes.
    """
    device = next(iter(parts.values())).v.device
    draw = torch.Generator(device).manual_seed(settings.seed)
    change = qdrop.by_chance(acts, draw)

    @torch.enable_grad()
    def descend(index: Tensor) -> None:
        numbers = _numbers(seen.targets) // seen.count * len(index)
        for few in torch.split(index, _at_once(seen.block)):
            x, wanted = kept_rows.at(seen.rounded, few), kept_rows.at(seen.targets, few)
            if acts:
                x = tuple(
                    qdrop.mixed(one, own, draw) for one, own in zip(x, kept_rows.at(seen.plain, few), strict=True)
                )
            soft = {name: part.soft() for name, part in parts.items()}
            outputs = run(seen.net, seen.block, x, {**seen.states, **soft}, change)
            torch.autograd.backward(_squared(outputs, wanted) / numbers / before)

    return descend


def _error(seen: _Seen, states: Mapping[str, LayerState], grids: Mapping[str, Grid]) -> float:
    """Return the mean squared error of the block's output over all images."""
    size = min(BATCH, _at_once(seen.block))
    change = qdrop.on_grids(grids)
    total = sum(
        float((one - other).double().square().sum())
        for part, target in zip(kept_rows.parts(seen.rounded, size), kept_rows.parts(seen.targets, size), strict=True)
        for one, other in zip(places(run(seen.net, seen.block, part, states, change)), target, strict=True)
    )
    return total / _numbers(seen.targets)


def _squared(found: Given, wanted: Sequence[Tensor]) -> Tensor:
    """The sum of squared differences of all results, ()."""
    pairs = zip(places(found), wanted, strict=True)
    return torch.stack([(one - other).square().sum() for one, other in pairs]).sum()


def _numbers(given: KeptRows) -> int:
    return sum(one.numel() for one in given)


def _bias(module: LayerModule) -> Tensor | None:
    return None if module.bias is None else module.bias.detach()


def with_steps(steps: int) -> PtqMethod:
    """Return BRECQ with so many steps for a block."""
    return PtqMethod(whole=functools.partial(round_network, settings=BrecqSettings(steps=steps)), with_steps=with_steps)


METHOD = PtqMethod(whole=round_network, with_steps=with_steps)
