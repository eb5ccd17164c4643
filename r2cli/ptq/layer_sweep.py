"""Run two networks node by node: the float one, and one whose layers have quantized weights as far as they are chosen.

Each node runs once in both networks, on all calibration images. A value is deleted after its last reader has run. So a
method for one layer at a time (AdaRound, bias correction) gets the input of that layer in both networks, and the
networks need not be run again for each layer.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from r2cli import registry
from r2cli.errors import InputError
from r2cli.graph import structure
from r2cli.graph.operators import LayerModule
from r2cli.quantized.coded import Coded
from r2cli.storage.input_spec import Given, NetworkInput, Shape, count, each, joined, places

MEMORY = 2 * 2**30  # bytes that the values of both networks together may take


@dataclass(frozen=True)
class LayerSample:
    """One layer for a method: `module` has the float weight; `inputs` and `rounded_inputs` are (n, ...)."""

    layer: structure.Layer
    module: LayerModule
    bound: Tensor | None  # the bound of the ReLU that follows, see `structure.bound`; None without a ReLU
    inputs: Tensor  # in the float network
    rounded_inputs: Tensor  # in the network whose earlier layers are quantized


# A method: for a layer it returns the codes, and the bias in the quantized network, (channels,) or None.
Visit = Callable[[LayerSample], tuple[Coded, Tensor | None]]


@torch.no_grad()
def sweep(
    net: fx.GraphModule, images: Given, visit: Visit, nearest: Mapping[str, Coded] | None = None
) -> tuple[dict[str, Coded], dict[str, Tensor | None]]:
    """Visit every layer of the float `net` in the order in which they run; `net` is not changed.

    Returns the codes by the weight's name, and the biases by the layer's. A layer that runs twice is visited at its
    first run. A recurrent layer's weight reads no value, so it is not visited: it has the codes in `nearest`. `images`
    are inputs, each (n, ...), on the device of `net`.
    """
    own = {layer.name: layer for layer in structure.layers(net)}
    coded: dict[str, Coded] = {}
    biases: dict[str, Tensor | None] = {}
    plain: dict[fx.Node, Any] = {}
    rounded: dict[fx.Node, Any] = {}
    last, given = structure.last_readers(net), iter(places(images))
    for node in net.graph.nodes:
        if node.op == "output":
            break
        layer = own.get(str(node.target)) if node.op == "call_module" else None
        if layer is not None and reads_nothing(node):
            assert nearest is not None, layer.name
            coded[layer.weight] = nearest[layer.weight]
            plain[node], rounded[node] = structure.layer_module(net, layer.name).weight, coded[layer.weight].decode()
        elif layer is None:
            plain[node] = next(given) if node.op == "placeholder" else run(net, node, plain)
            # Before the first layer both networks have the same values: then the node runs once.
            same = all(plain[source] is rounded[source] for source in node.all_input_nodes)
            rounded[node] = plain[node] if same else run(net, node, rounded)
        else:
            module, source = structure.layer_module(net, layer.name), node.all_input_nodes[0]
            if layer.weight not in coded:
                seen = LayerSample(layer, module, structure.bound(net, node), plain[source], rounded[source])
                coded[layer.weight], biases[layer.name] = visit(seen)
            state = {"weight": coded[layer.weight].decode()}
            bias = biases[layer.name]
            state |= {} if bias is None else {"bias": bias}
            plain[node] = module(plain[source])
            rounded[node] = torch.func.functional_call(module, state, (rounded[source],))
        for source in last.get(node, ()):
            del plain[source], rounded[source]
    return coded, biases


def reads_nothing(node: fx.Node) -> bool:
    """Return whether `node` gives a tensor of the network's own: a parameter, or a recurrent layer's weight."""
    return node.op != "placeholder" and not node.all_input_nodes


def images_that_fit(net: fx.GraphModule, shape: Shape) -> int:
    """Return for how many images of `shape` the values of both networks fit into `MEMORY`."""
    structure.propagate(net, shape)
    last, live, most = structure.last_readers(net), 0, 1
    for node in net.graph.nodes:
        live += bytes_of(node)
        most = max(most, live)
        live -= sum(bytes_of(source) for source in last.get(node, ()))
    return max(1, MEMORY // (2 * most))


def fitting(
    net: fx.GraphModule, batches: Iterable[Given], spec: NetworkInput, tell: Callable[[str], None], *, on_disk: bool
) -> Given:
    """Return as many samples, each (n, ...), as fit into `MEMORY` with what both networks compute of them.

    A method with values `on_disk` has only the samples themselves in memory, but not on a GPU. `tell` is told where
    those that fit are not all.
    """
    if not on_disk or next(net.parameters()).device.type != "cpu":
        most = images_that_fit(net, spec.shape)
    else:
        most = MEMORY // sum(one.nbytes for one in places(spec.blank(1)))
    taken = first(batches, most + 1)
    if count(taken) <= most:
        return taken
    tell(f"weights are rounded by {most} of the images: more take over {MEMORY >> 30} GiB of memory")
    return each(taken, lambda one: one[:most])


def first(batches: Iterable[Given], wanted: int) -> Given:
    """Return the first `wanted` samples of `batches`, or all, each (n, ...). Raises InputError where there is none."""
    taken: list[Given] = []
    left = wanted
    for images in batches:
        taken.append(each(images, lambda one: one[:left]))  # noqa: B023
        left -= count(taken[-1])
        if left <= 0:
            break
    if not taken:
        other = registry.PTQ_NEAREST
        raise InputError(f"this method looks at calibration images, and there are none: give --method {other}")
    return joined(taken)


def bytes_of(node: fx.Node) -> int:
    """Return the bytes of the node's value for one image."""
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)  # for a batch of two images
    return 0 if shape is None else 4 * int(shape.numel()) // 2


def run(net: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Compute the value of a node that is not a layer from the values of others."""
    args = map_arg(node.args, lambda source: values[source])
    kwargs = map_arg(node.kwargs, lambda source: values[source])
    if node.op == "call_module":
        return net.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    value: Any = net  # get_attr: a parameter or buffer of the network's own
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value
