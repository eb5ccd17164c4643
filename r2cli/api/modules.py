"""A torch module of the user's: its spec, which makes copies of it, and its checkpoint."""

import copy

from torch import Tensor, nn

from r2cli import data as datasets
from r2cli.data import Data
from r2cli.models import require_fit
from r2cli.storage import finite
from r2cli.storage.checkpoint import Checkpoint, ModelSpec


def spec_of(network: nn.Module, source: Data) -> ModelSpec:
    """A spec that makes copies of `network`; its name is the class's."""
    template = copied(network)
    kind = type(network)
    name = f"{kind.__module__}:{kind.__qualname__}"
    return ModelSpec(name, source.classes, source.input.channels, factory=lambda: copy.deepcopy(template))


def checkpoint_of(network: nn.Module, source: Data) -> Checkpoint:
    """The float checkpoint of a module. Raises InputError where it does not take the inputs of `source`, and for
    weights that are NaN or infinite."""
    spec = spec_of(network, source)
    given, outputs = require_fit(copied(network), spec, source.input, decides=source.task.decides)
    floats = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    finite.require(floats, spec.name, finite.OTHERS)
    made = Checkpoint(spec, given, source.class_names, floats, origin=spec.name, outputs=outputs)
    return made.then("import", {"data": datasets.recorded(source.name), "model": spec.described()}, {})


def copied(network: nn.Module) -> nn.Module:
    """A copy of `network`. torch refuses to copy weights that a hook computed (pruning, weight norm), so those are
    taken without their gradient: the hook computes them anew."""
    held = [value for module in network.modules() for value in vars(module).values()]
    computed = {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}
    return copy.deepcopy(network, computed)
