"""Whether a network can be calibrated on inputs of other sizes than its file's: the graph is read for the file's."""

from r2cli.calibration import deployed
from r2cli.data import Split
from r2cli.data.own_splits import MixedSplit, OwnSplit
from r2cli.errors import InputError, R2Error
from r2cli.graph import equivalence
from r2cli.graph.read import trace
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import forms


def require_takes(made: Checkpoint, shown: Split) -> None:
    """Raise InputError for the first size of `shown`, which calibrates, that is another than the one of `made` and that
    its graph, as it is read for that one, does not take as the network does."""
    if not isinstance(shown, OwnSplit):
        return
    found = shown.sizes if isinstance(shown, MixedSplit) else [shown.spec]
    others = [one for one in found if forms(one) != forms(made.input)]
    if not others:
        return
    model = deployed.network(made)
    net = trace(model, made.input.blank(2), deployed.architecture(made))
    for one in others:
        try:
            equivalence.require_same(net, model, one)
        except (R2Error, RuntimeError, ValueError, TypeError) as error:
            raise InputError(
                f"{made.origin} was read for {made.input}, and is another network for {one}: calibrate on inputs of "
                "the size that it was read for"
            ) from error
