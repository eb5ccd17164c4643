"""Checkpoints of r2 0.1, whose graph torch.fx's own tracer read: their grids are on values that had other names."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from r2cli import __version__, models
from r2cli.calibration import deployed
from r2cli.errors import InputError
from r2cli.graph.edit import FOR_LAYERS
from r2cli.graph.operators import NORMS
from r2cli.graph.read import trace
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import places
from r2cli.storage.keywords import is_own


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node gives, as it was before anything was written into it."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        given = super().run_node(n)
        if isinstance(given, Tensor):
            self.found[n.name] = given.clone()
        return given


def by_todays_names(made: Checkpoint) -> Checkpoint:
    """`made` with each grid on the value of today's graph that has the numbers of the one it was on.

    Raises InputError where no value has them, or where two different grids would be on one.
    """
    if not made.activations:
        return made
    net = None if is_own(made.model.name) and made.model.factory is None else deployed.graph(made)
    names = {node.name for node in net.graph.nodes} if net is not None else set()
    unknown = [name for name in made.activations if name.removesuffix(FOR_LAYERS) not in names]
    if net is None or not unknown:
        return made
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.build(made.model)
        inputs = [torch.rand(one.shape).to(one.dtype) for one in places(made.input.blank(8))]
        _normalise(model, inputs)
    before = _values(fx.symbolic_trace(model.eval()), inputs)
    now = {name: value for name, value in _values(trace(model, made.input.blank(2)), inputs).items() if name in names}
    grids = {name: grid for name, grid in made.activations.items() if name not in unknown}
    for name in unknown:
        place = _equal(before.get(name), now)
        if place is None or grids.setdefault(place, made.activations[name]) != made.activations[name]:
            raise InputError(
                f"{made.origin}: its grid on '{name}' has no place in the graph that r2 {__version__} reads of "
                f"{made.model.name}: quantize the float checkpoint again"
            )
    return replace(made, activations=grids)


@torch.no_grad()
def _normalise(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Give every BatchNorm the statistics of `inputs`: with random weights deep values may vanish, and all be alike."""
    for norm in model.modules():
        if isinstance(norm, NORMS):
            norm.momentum = 1.0
    model.train()(*inputs)


@torch.inference_mode()
def _values(net: fx.GraphModule, inputs: Sequence[Tensor]) -> Mapping[str, Tensor]:
    recorder = _Recorder(net)
    recorder.run(*inputs)
    return recorder.found


def _equal(value: Tensor | None, among: Mapping[str, Tensor]) -> str | None:
    """The first of `among` that has the numbers of `value` in its order, in whatever shape."""
    for name, other in among.items():
        if value is not None and other.numel() == value.numel() and value.any():
            if (other.flatten() - value.flatten()).abs().max() <= 1e-4 * value.abs().max():
                return name
    return None
