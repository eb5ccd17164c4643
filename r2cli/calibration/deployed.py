"""The network of a checkpoint, ready to run, and the modules that observe or round its values.

`network` rebuilds the model of a checkpoint, float or quantized. `observe` records the ranges of values while
calibration images pass. `FakeQuantize` rounds a value to its grid.
"""

import copy
import functools
import json
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from r2cli import models
from r2cli.calibration.observers import Observer
from r2cli.errors import InputError
from r2cli.graph import batchnorm, channel_clip, edit, lone_norms
from r2cli.graph.read import trace
from r2cli.quantized.grid import Grid
from r2cli.storage.checkpoint import Checkpoint, into
from r2cli.storage.input_spec import Given, TensorsSpec, count, places


class FakeQuantize(nn.Module):
    """Round x (of any shape) to its grid, as a QuantizeLinear followed by a DequantizeLinear does in ONNX."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        # Not persistent: a checkpoint stores grids in its metadata, and its tensors are the network's own only.
        self.register_buffer("scale", grid.scale, persistent=False)
        self.register_buffer("zero_point", grid.zero_point.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        zero = self.zero_point
        # In place, because activations are large: one new tensor instead of five.
        codes = torch.round(x / self.scale).add_(zero).clamp_(self.grid.lowest, self.grid.highest)
        return codes.sub_(zero).mul_(self.scale)


@torch.inference_mode()
def observe(
    net: fx.GraphModule, nodes: Iterable[str], batches: Iterable[Given], make: Callable[[], Observer] = Observer
) -> dict[str, Observer]:
    """Run `net` on `batches` of inputs with an observer on each of `nodes`; returns the observers by node.

    `make` makes one observer. The observers stay in `net` until grids replace them. Raises InputError where there is
    no image.
    """
    observed = {name: make() for name in nodes}
    edit.insert(net, observed)
    seen = 0
    for images in batches:
        net(*places(images))
        seen += count(images)
    if not seen:
        raise InputError(
            "the ranges of activations need calibration images, and there are none: give --data, and --calibration a "
            "number above 0, or --act-bits none"
        )
    return observed


def insert_grids(net: fx.GraphModule, grids: Mapping[str, Grid]) -> None:
    """Make `net` round the outputs of the named nodes to their grids, in place."""
    edit.insert(net, {node: FakeQuantize(grid) for node, grid in grids.items()})


def architecture(checkpoint: Checkpoint) -> Hashable:
    """What the graph of the checkpoint's float network depends on: its model and input, and not its weights."""
    factory = checkpoint.model.factory
    # Weak, because a factory may hold the user's whole network.
    return _described(checkpoint), None if factory is None else weakref.ref(factory)


def network(checkpoint: Checkpoint) -> nn.Module:
    """Build the model of `checkpoint` with its weights, in evaluation mode. Quantized weights are decoded to float32.

    Raises InputError where the tensors are not those of the model that the checkpoint names.
    """
    # Grids and bounds belong to nodes of the graph, so the model must become that graph before the weights are loaded.
    model: nn.Module
    if checkpoint.folded or checkpoint.activations:
        model = copy.deepcopy(graph(checkpoint)).to_empty(device="cpu")
        assert isinstance(model, fx.GraphModule)
        channel_clip.put(model, channel_clip.stored(checkpoint.floats))
    else:
        model = models.called(models.build(checkpoint.model, _room(checkpoint)), checkpoint.model, checkpoint.input)
    state = {**checkpoint.floats, **{name: coded.decode() for name, coded in checkpoint.coded.items()}}
    load_state(model, state, f"{checkpoint.origin} ({checkpoint.model.name})")
    if checkpoint.activations:
        assert isinstance(model, fx.GraphModule)
        insert_grids(model, checkpoint.activations)
    return model.eval()


def canonical(checkpoint: Checkpoint) -> fx.GraphModule:
    """`network` as a canonical graph: also where the user's own network is a graph, of other functions."""
    net = network(checkpoint)
    if checkpoint.folded or checkpoint.activations:
        assert isinstance(net, fx.GraphModule)
        return net
    return trace(net, checkpoint.input.blank(2), architecture(checkpoint))


def graph(checkpoint: Checkpoint) -> fx.GraphModule:
    """The graph of the network of `checkpoint` without BatchNorms and weights, as its grids and codes are on it."""
    return _graph(_Architecture.of(checkpoint))


@dataclass(frozen=True)
class _Architecture:
    """What a graph without its weights depends on."""

    described: str
    factory: Any
    on_grids: bool
    checkpoint: Checkpoint = field(compare=False)
    room: int = field(compare=False)  # parameters

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "_Architecture":
        given = replace(checkpoint, floats={}, coded={}, activations={})
        # The layers stay where the grids are left out, as for the float file of the same network.
        on_grids = bool(checkpoint.activations) or lone_norms.are_in([*checkpoint.floats, *checkpoint.coded])
        return cls(_described(checkpoint), checkpoint.model.factory, on_grids, given, _room(checkpoint))


def _room(checkpoint: Checkpoint) -> int:
    """How many parameters the network of a checkpoint may have: folded BatchNorms and tied weights are not in it."""
    held = sum(tensor.numel() for tensor in checkpoint.floats.values())
    held += sum(coded.codes.numel() * getattr(coded.codec, "dim", 1) for coded in checkpoint.coded.values())
    return 4 * held + 10_000


def _described(checkpoint: Checkpoint) -> str:
    given = checkpoint.input
    inputs = given.described() if isinstance(given, TensorsSpec) else given.shape
    return json.dumps([checkpoint.model.described(), inputs, given.is_text], sort_keys=True)


@torch.inference_mode(False)  # whose tensors have no versions, by which reading tells what was written to
@functools.lru_cache(maxsize=2)  # a command asks for the same network several times
def _graph(of: _Architecture) -> fx.GraphModule:
    """The graph of a network without BatchNorms, on the meta device: without its weights."""
    made = of.checkpoint
    model = models.called(models.build(made.model, of.room), made.model, made.input)
    net = trace(model, made.input.blank(2), architecture(made))
    lone_norms.into_layers(net, on_grids=of.on_grids)
    batchnorm.remove_norms(net)
    return net.to("meta")


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load all tensors of `state` into `model`, or none of them.

    Raises InputError with the name of the first tensor that is missing, unknown or of another shape. PyTorch's own
    message lists hundreds of names, and does not say which file they are from.
    """
    own = model.state_dict()
    for name in sorted({*own, *state}):
        if name not in state:
            raise InputError(f"{what} lacks the tensor '{name}': it is of another architecture")
        if name not in own:
            raise InputError(f"{what} has an extra tensor '{name}': it is of another architecture")
        if own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, not {tuple(own[name].shape)}"
            raise InputError(f"{what} has '{name}' of shape {shapes}: it is of another architecture or width")
    into(model, state)
