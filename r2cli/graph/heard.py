"""Between which ends a value is heard: beyond them nothing that reads it changes, so that a grid need not reach there.

A hard swish gives 0 for all below -3, a hard sigmoid is the same beyond -3 and 3, a clip beyond its ends. The
convolution before may well reach to -100, and 8 bits over all of that would leave few levels for what counts.
"""

import math

import torch
import torch.nn.functional as F
from torch import fx

from r2cli.graph import edit
from r2cli.graph.operators import is_a

EVERYTHING = (-math.inf, math.inf)
HARD = 3.0  # F.hardsigmoid is 0 below -3 and 1 above 3


def ends(net: fx.GraphModule, node: fx.Node) -> tuple[float, float]:
    """The least and the greatest value of `node` that is heard; infinite where there is no end. Grids are looked
    through."""
    found = [_ends_of(net, node, user) for user in node.users] or [EVERYTHING]
    return min(low for low, _ in found), max(high for _, high in found)


def _ends_of(net: fx.GraphModule, node: fx.Node, user: fx.Node) -> tuple[float, float]:
    """Between which ends `user`, which reads `node`, hears it."""
    if edit.is_grid(user):
        return ends(net, user)
    if is_a(net, user, (F.hardsigmoid,)):
        return -HARD, HARD
    if is_a(net, user, (torch.clamp,)) and all(one is None or isinstance(one, int | float) for one in user.args[1:]):
        least, greatest = (*user.args[1:], None, None)[:2]
        return (-math.inf if least is None else least), (math.inf if greatest is None else greatest)  # type: ignore[return-value]
    if is_a(net, user, (torch.mul,)) and any(_is_gate(net, node, other) for other in user.all_input_nodes):
        return -HARD, math.inf  # x * hardsigmoid(x)
    return EVERYTHING


def _is_gate(net: fx.GraphModule, node: fx.Node, other: fx.Node) -> bool:
    """Whether `other` is the hard sigmoid of `node`."""
    while edit.is_grid(other):
        other = other.all_input_nodes[0]
    return is_a(net, other, (F.hardsigmoid,)) and other.all_input_nodes[0] is node
