"""Read a network: its graph over its own modules, in evaluation mode."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from r2cli.errors import InputError
from r2cli.graph import exported, in_place
from r2cli.graph.attention import REWRITTEN
from r2cli.graph.edit import as_product, bypass
from r2cli.graph.operators import NOTHING, is_a


class _Proxy(fx.Proxy):
    """A value of a graph. torch.fx's own takes `x += y` for `x = x + y`, which leaves what else reads x as it was."""


def _augmented(kind: Callable[..., Any], plain: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def write(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", kind, (self, other), {}, name=plain.__name__)

    return write


for _kind, _plain in in_place.AUGMENTED.items():
    setattr(_Proxy, f"__{_kind.__name__}__", _augmented(_kind, _plain))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in REWRITTEN or super().is_leaf_module(m, module_qualified_name)


WEIGHTS_ALONE = "or quantize the weights alone: --act-bits none, and for r2 ptq --method none"


class Unreadable(InputError):
    """A network whose graph torch.fx cannot trace, nor torch.export read where that was tried; `why` is without a
    way out."""

    def __init__(self, why: str, way_out: str = "take out what depends on the values of tensors") -> None:
        super().__init__(f"{why}: {way_out}, {WEIGHTS_ALONE}")
        self.why = why


def trace(model: nn.Module, example: Tensor | None = None) -> fx.GraphModule:
    """`model` as a graph over the same modules, in evaluation mode.

    Where torch.fx cannot trace it, torch.export reads it with an `example` of its inputs (n, ...), n > 1, if there is
    one. Raises Unreadable naming what cannot be traced.
    """
    try:
        net = _traced(model)
    except Unreadable as unreadable:
        if example is None:
            raise
        try:
            net = exported.read(model, example)
        except Exception as error:  # torch.export passes on whatever the network raises
            first = next(iter(str(error).strip().splitlines()), "")
            raise Unreadable(f"{unreadable.why}, and torch.export cannot either ({first})") from error
    return _simplified(net)


def by_export(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """What `trace` gives of `model`, read by torch.export alone over an `example` of its inputs (n, ...), n > 1."""
    return _simplified(exported.read(model, example))


def _simplified(net: fx.GraphModule) -> fx.GraphModule:
    """`net` without operations that do nothing in evaluation, and SiLU and Hardswish as the products they are."""
    for node in list(net.graph.nodes):
        if is_a(net, node, NOTHING):
            bypass(net, node)
        elif is_a(net, node, (nn.SiLU, F.silu)):
            as_product(net, node, torch.sigmoid)
        elif is_a(net, node, (nn.Hardswish, F.hardswish)):
            as_product(net, node, F.hardsigmoid)
    net.recompile()
    return net


def _traced(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    try:
        net = _out_of_place(fx.GraphModule(model.eval(), tracer.trace(model)))
        rewritten = {name: REWRITTEN[type(m)](m, name) for name, m in net.named_modules() if type(m) in REWRITTEN}
        for name, module in rewritten.items():
            net.set_submodule(name, module.eval())
        return _out_of_place(fx.GraphModule(net, _Tracer().trace(net))) if rewritten else net
    except in_place.AliasLost as shared:
        raise Unreadable(str(shared), "write it out of place in the network's code") from shared
    except Exception as error:
        last = next(reversed(tracer.graph.nodes), None) if hasattr(tracer, "graph") else None
        raise Unreadable(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}"
            f"{f', at the node {last.name!r}' if last is not None else ''})"
        ) from error


def _out_of_place(net: fx.GraphModule) -> fx.GraphModule:
    in_place.remove(net)
    net.recompile()
    return net
