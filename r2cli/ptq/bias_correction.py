"""Bias correction: rounding the weights shifts the mean of a layer's output, and a new bias undoes the shift.

Paper: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2.2,
equations 15 to 17, and appendices C and D. With eps = W_q - W:

    analytic     b -= eps E[x]                      E[x] from the BatchNorms (batchnorm_statistics.py), without data
    empirical    b -= E[W_q x^] - E[W x]            over images and positions; x^ from layers that are corrected already

Where we differ: the layer runs over an image that has the value E[x] everywhere. So the zeros of padding count as well.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from r2cli.calibration.biases import channel_means
from r2cli.graph import structure
from r2cli.graph.operators import LayerModule
from r2cli.ptq.batchnorm_statistics import ValueStatistics
from r2cli.ptq.layer_sweep import LayerSample
from r2cli.quantized.channels import per_channel
from r2cli.quantized.coded import Coded

BATCH = 64  # images at once


@torch.no_grad()
def analytic(net: fx.GraphModule, coded: Mapping[str, Coded], known: Mapping[str, ValueStatistics]) -> dict[str, str]:
    """Correct the biases of the float `net`, in place, for the codes of its weights. `known` are statistics of values.

    Returns a note for each layer, by name.
    """
    notes = {}
    for layer, module in structure.named_layers(net):
        node = structure.node_of(net, layer)
        if module.bias is None:
            notes[layer.name] = "not corrected: it has no bias"
            continue
        read = node.all_input_nodes[0]
        value = known.get(read.name)
        # A layer that runs twice has two inputs, whose means differ, and one bias for both.
        if value is None or sum(other.target == layer.name for other in net.graph.nodes) > 1:
            notes[layer.name] = "not corrected: its input's mean is not known without data"
        else:
            shape = read.meta["tensor_meta"].shape[1:]
            shift = mean_shift(module, coded[layer.weight], value.mean.float().to(module.bias.device), shape)
            module.bias -= shift
            notes[layer.name] = "bias corrected" if bool(shift.any()) else "not corrected: its input has mean 0"
    return notes


def mean_shift(module: LayerModule, coded: Coded, mean: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return how far rounding moves the mean of the outputs of `module`, (outputs,), for inputs of mean (channels,).

    `shape` is that of an input without the batch. Rounding adds eps to the weight, and the layer is linear, so a layer
    with the weight eps and no bias gives the shift.
    """
    weight = module.weight
    image = per_channel(mean, len(shape)).expand(1, *shape)
    # The bias must be 0 and not the layer's own: only what rounding adds counts.
    error = {"weight": coded.decode() - weight, "bias": torch.zeros_like(mean[:1]).expand(weight.shape[0])}
    return channel_means(module, torch.func.functional_call(module, error, (image,)))


def empirical(seen: LayerSample, coded: Coded) -> Tensor | None:
    """Return a bias (outputs,) corrected for the codes and the changed input of a layer; None without a bias."""
    module = seen.module
    if module.bias is None:
        return None
    state = {"weight": coded.decode()}
    shift = torch.zeros_like(module.bias)
    for plain, rounded in zip(*(torch.split(x, BATCH) for x in (seen.inputs, seen.rounded_inputs)), strict=True):
        difference = torch.func.functional_call(module, state, (rounded,)) - module(plain)
        shift += channel_means(module, difference) * len(plain) / len(seen.inputs)  # the last batch may be smaller
    return module.bias - shift
