"""What a method of post-training quantization consists of: how it rounds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from r2cli import registry
from r2cli.errors import InputError
from r2cli.ptq.layer_sweep import LayerSample
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.storage.input_spec import Given

# Codes by the weight's name, biases by the layer's, and grids of activations by the node.
Rounded = tuple[dict[str, Coded], dict[str, Tensor], dict[str, Grid]]


Whole = Callable[[fx.GraphModule, Given, Mapping[str, Coded], Callable[[], None], Mapping[str, Grid]], Rounded]


@dataclass(frozen=True)
class PtqMethod:
    """How a method rounds. One that has neither function keeps the nearest codes.

    `rounds` rounds one layer, given the layer with its inputs, and its nearest codes. `whole` rounds the network, given
    the graph, inputs (n, ...), the nearest codes by the weight's name, a function to call after each layer, and the
    grids of activations where they have fewer bits than 8; it returns them, changed or not. `with_steps` gives the same
    method with another number of steps of learning.
    """

    rounds: Callable[[LayerSample, Coded], Coded] | None = None
    whole: Whole | None = None
    with_steps: Callable[[int], "PtqMethod"] | None = None


NEAREST = PtqMethod()


def method(name: str, steps: int | None = None) -> PtqMethod:
    """Return the method of that name, with so many `steps` where it learns; None: as many as it takes by itself.

    Raises InputError for an unknown name, and for an entry that is no PtqMethod or does not say what the method needs.
    """
    found = registry.load(registry.PTQ_METHODS, name)
    if not isinstance(found, PtqMethod):
        raise InputError(
            f"the method '{name}' is a {type(found).__name__} and no PtqMethod: correct the package that it comes from"
        )
    looks = found.rounds is not None or found.whole is not None
    if looks != registry.get(registry.PTQ_METHODS, name).looks:
        raise InputError(f"the entry of the method '{name}' must say looks={looks}, as its PtqMethod does")
    learns = found.with_steps is not None
    if learns != registry.get(registry.PTQ_METHODS, name).learns:
        raise InputError(f"the entry of the method '{name}' must say learns={learns}, as its PtqMethod does")
    return found if steps is None or found.with_steps is None else found.with_steps(steps)
