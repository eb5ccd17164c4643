"""Round the biases to int32, in units of scale_x * scale_w, as runtimes do.

Where activations have few bits their scale is large, and so is that unit: on a MobileNet at W4A4 rounding moves the
biases of depthwise layers by 2 to 4 %, and costs a point of accuracy. A wrong bias moves the mean of a channel, and the
bias of the next layer can move it back. So, where there are images, the layers are rounded in their order, and each
bias first makes up for what the rounding of those before it did to the mean of its channel.

So it does for sums with numbers. The codes of such a sum are those of the value that it adds to, shifted, and the part
of a level by which the shift is not whole is lost to all of them alike, whatever the number of bits. A recogniser of
text with 28 such sums lost more by them than by all else (12.3 dB from its float network; 14.5 with this).
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from r2cli.calibration.apart import shifted
from r2cli.graph import edit, structure
from r2cli.graph.operators import LayerModule
from r2cli.quantized.channels import per_channel
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.quantized.palette import Palette
from r2cli.storage.input_spec import Given, each, places

MOST_BIAS = 2.0**30  # of a bias in int32 sums: the other half of the range is for the products that are added to it
FINE = 8  # bits of activations whose unit is so small that rounding a bias to it changes next to nothing


@torch.no_grad()
def round_biases(
    net: fx.GraphModule,
    coded: Mapping[str, Coded],
    activations: Mapping[str, Grid],
    images: Iterable[Given] | None = None,
    *,
    learned: bool = False,
) -> dict[str, Coded]:
    """Round every bias to a multiple of scale_x * scale_w, the unit of the layer's int32 sums; in place.

    Runtimes do so silently. We do it here, so that the accuracy that we print is the one that is deployed. `net` rounds
    its values to `activations` and is on the CPU. Where some of these have fewer than 8 bits, or are sums with numbers
    that nothing was `learned` with, the biases are corrected on the first batch (n, ...) of `images`, if there are any.
    Where a bias does not fit int32, the scale of its channel is raised: the weights are next to nothing beside such a
    bias. Returns the weights with raised scales, by name.
    """
    raised: dict[str, Coded] = {}

    def to_grid(layer: structure.Layer, module: LayerModule) -> None:
        """Round the bias of a layer, if it has one and its sums have a grid."""
        where = edit.source(net, structure.node_of(net, layer))
        bias = module.bias
        if where is None or bias is None or layer.weight not in coded:
            return
        one, given = coded[layer.weight], activations[where].scale
        unit = given * (one.codec.scale / one.codec.integer_factor)
        over = (bias.double() / unit.double()).abs() / MOST_BIAS
        if float(over.max()) > 1:
            raised[layer.weight] = one = with_raised_scale(one, over if unit.ndim else over.amax())
            module.weight.copy_(one.decode())
            unit = given * (one.codec.scale / one.codec.integer_factor)
        codes = torch.round(bias.double() / unit.double())
        bias.copy_((codes * unit.double()).float())

    sums = set() if learned else shifted(net, activations)
    shown = next(iter(images), None) if images is not None and (sums or _coarse(activations)) else None
    if shown is None:
        for layer, module in structure.named_layers(net):
            to_grid(layer, module)
        return raised

    inputs = places(each(shown, lambda one: one.cpu()))
    wanted = _means(net, inputs, unrounded=sums)

    def correct(layer: structure.Layer, module: LayerModule, outputs: Tensor, read: Tensor) -> Tensor:
        if module.bias is None:
            return outputs
        module.bias.sub_(channel_means(module, outputs) - wanted[layer.name])
        to_grid(layer, module)
        found: Tensor = module(read)
        return found

    _Layers(net, correct).run(*inputs)
    return raised


def _coarse(activations: Mapping[str, Grid]) -> bool:
    return any(grid.bits < FINE for grid in activations.values())


@torch.no_grad()
def means(net: fx.GraphModule, activations: Mapping[str, Grid], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The channels' means, (channels,), of the layers with a bias, by name; none where `round_biases` corrects none."""
    return _means(net, inputs) if shifted(net, activations) or _coarse(activations) else {}


def _means(net: fx.GraphModule, inputs: Sequence[Tensor], *, unrounded: Container[str] = ()) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def record(layer: structure.Layer, module: LayerModule, outputs: Tensor, read: Tensor) -> Tensor:
        if module.bias is not None:
            found[layer.name] = channel_means(module, outputs)
        return outputs

    _Layers(net, record, unrounded=unrounded).run(*inputs)
    return found


@contextmanager
def brought_to(net: fx.GraphModule, wanted: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Iterator[None]:
    """Within the block the biases of `net` are those with which its layers have the means `wanted` by name, as
    `round_biases` would set them, but not rounded."""
    held: list[tuple[Tensor, Tensor]] = []

    def correct(layer: structure.Layer, module: LayerModule, outputs: Tensor, read: Tensor) -> Tensor:
        if module.bias is None or layer.name not in wanted:
            return outputs
        held.append((module.bias.data, module.bias.data.clone()))
        module.bias.data.sub_(channel_means(module, outputs) - wanted[layer.name])
        again: Tensor = module(read)
        return again

    try:
        if wanted:
            with torch.no_grad():
                _Layers(net, correct).run(*inputs)
        yield
    finally:
        for bias, before in held:
            bias.copy_(before)  # also where the run was stopped


LayerVisit = Callable[[structure.Layer, LayerModule, Tensor, Tensor], Tensor]


class _Layers(fx.Interpreter):
    """Runs a network. `visit` gets each layer with its outputs and what it read, and returns the outputs to go on with.

    A layer that runs twice is visited at its first run. A recurrent layer's weight is no layer here. The values that
    `unrounded` names are not put on their grids.
    """

    def __init__(self, net: fx.GraphModule, visit: LayerVisit, *, unrounded: Container[str] = ()) -> None:
        super().__init__(net)
        self.visit, self.unrounded = visit, unrounded
        self.layers = {layer.node: layer for layer in structure.layers(net)}

    def run_node(self, node: fx.Node) -> Tensor:
        if edit.is_grid(node) and str(node.target).removeprefix(edit.GRIDS) in self.unrounded:
            given: Tensor = self.env[node.all_input_nodes[0]]
            return given
        outputs: Tensor = super().run_node(node)
        if node.name not in self.layers or not node.all_input_nodes:
            return outputs
        layer = self.layers[node.name]
        module = structure.layer_module(self.module, layer.name)
        return self.visit(layer, module, outputs, self.env[node.all_input_nodes[0]])


def channel_means(module: LayerModule, outputs: Tensor) -> Tensor:
    """Return the mean of `outputs` for each channel, (channels,).

    They are (n, channels, ...), or (n, ..., channels) for a linear layer.
    """
    return (
        outputs.flatten(0, -2).mean(0) if isinstance(module, nn.Linear) else outputs.transpose(0, 1).flatten(1).mean(1)
    )


def with_raised_scale(coded: Coded, by: Tensor) -> Coded:
    """Return a weight whose scale, () or (channels,), is `by` times as large where that is more than 1.

    The codes of those channels are the nearest ones on the new scale, and all others are as they were.
    """
    codec, raises = coded.codec, by > 1
    codec = replace(codec, scale=torch.where(raises, codec.scale.double() * by, codec.scale.double()).float())
    codes = codec.encode(coded.decode())
    if isinstance(codec, Palette):  # a code belongs to `dim` channels at once
        channels = raises.expand(codec.shape[0])
        blocks = [bool(part.any()) for part in torch.split(channels, codec.dim)]
        moved = torch.tensor(blocks).repeat_interleave(codec.positions).reshape(codes.shape)
    else:
        moved = per_channel(raises, codes.ndim, codec.axis)
    return Coded(codec, torch.where(moved, codes, coded.codes))


def raised_note(before: Coded, after: Coded | None) -> str:
    """Return what is said of a layer whose scales `round_biases` raised; an empty text for another."""
    if after is None:
        return ""
    count = int((after.codec.scale != before.codec.scale).sum())
    return f"scale of {count} channels raised for their bias" if after.codec.scale.ndim else "scale raised for the bias"
