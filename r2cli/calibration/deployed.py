"""What sits on a network's edges, and the network that a checkpoint stands for.

`observe` watches values while calibration images pass; `OnGrid` rounds a value to its grid. `Method` is what learners
on the layers ask of training. `network` rebuilds a checkpoint's model, float or coded, ready to run.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from r2cli import models
from r2cli.calibration.observers import Observer
from r2cli.errors import InputError
from r2cli.graph import batchnorm, channel_clip, edit
from r2cli.graph.read import trace
from r2cli.quantized.grid import Grid
from r2cli.storage.checkpoint import Checkpoint


class OnGrid(nn.Module):
    """x rounded to its grid: what a QuantizeLinear and a DequantizeLinear make of it, any shape."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("scale", grid.scale, persistent=False)
        self.register_buffer("zero_point", grid.zero_point.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        zero = self.zero_point
        codes = torch.round(x / self.scale).add_(zero).clamp_(self.grid.lowest, self.grid.highest)
        return codes.sub_(zero).mul_(self.scale)


@torch.inference_mode()
def observe(
    net: fx.GraphModule, nodes: Iterable[str], batches: Iterable[Tensor], make: Callable[[], Observer] = Observer
) -> dict[str, Observer]:
    """What watched each node over `batches` of images, one of `make`'s each; they stay until grids replace them.

    Raises InputError where there is no image.
    """
    watching = {name: make() for name in nodes}
    edit.insert(net, watching)
    seen = 0
    for images in batches:
        net(images)
        seen += len(images)
    if not seen:
        raise InputError("the ranges of activations need calibration images, and there are none: give --act-bits none")
    return watching


def insert_grids(net: fx.GraphModule, grids: Mapping[str, Grid]) -> None:
    """Round the values of the named nodes to their grids from now on; in place."""
    edit.insert(net, {node: OnGrid(grid) for node, grid in grids.items()})


def network(checkpoint: Checkpoint) -> nn.Module:
    """The model of `checkpoint` with its weights, in evaluation mode; coded weights as their decoded values.

    Raises InputError where the tensors are not those of the model that the checkpoint names.
    """
    model = models.build(checkpoint.model)
    if checkpoint.folded or checkpoint.activations:
        model = trace(model, checkpoint.input.blank(2))
        batchnorm.remove_norms(model)
        channel_clip.put(model, channel_clip.stored(checkpoint.floats))
    state = {**checkpoint.floats, **{name: coded.decode() for name, coded in checkpoint.coded.items()}}
    load_state(model, state, f"{checkpoint.origin} ({checkpoint.model.name})")
    if checkpoint.activations:
        assert isinstance(model, fx.GraphModule)
        insert_grids(model, checkpoint.activations)
    return model.eval()


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load every tensor or none: raises InputError naming the first that is missing, unknown or of another shape."""
    own = model.state_dict()
    for name in sorted({*own, *state}):
        if name not in state:
            raise InputError(f"{what} lacks the tensor '{name}': it is of another architecture")
        if name not in own:
            raise InputError(f"{what} has an extra tensor '{name}': it is of another architecture")
        if own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, not {tuple(own[name].shape)}"
            raise InputError(f"{what} has '{name}' of shape {shapes}: it is of another architecture or width")
    model.load_state_dict(dict(state))
