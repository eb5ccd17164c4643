"""The rows of the layer table: what became of each layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx

from r2cli.calibration import biases
from r2cli.graph import edit, operators, structure
from r2cli.quantized.coded import Coded
from r2cli.quantized.decibels import sqnr
from r2cli.quantized.grid import Grid


@dataclass(frozen=True)
class QuantizedLayer:
    """What became of one layer. `sqnr` is in dB, of the deployed weight against the float one.

    `act_bits` are the bits of what it reads, None for float.
    """

    layer: str
    shape: tuple[int, ...]
    bits: int
    grid: str
    sqnr: float
    note: str = ""
    act_bits: int | None = None


def of(name: str, coded: Coded, weight: Tensor, grid: str, note: str) -> QuantizedLayer:
    return QuantizedLayer(name, tuple(weight.shape), coded.codec.bits, grid, sqnr(coded.decode(), weight), note)


def of_float(name: str, weight: Tensor) -> QuantizedLayer:
    return QuantizedLayer(name, tuple(weight.shape), 32, "float", math.inf, operators.ASKED)


def tell_grids(
    net: fx.GraphModule,
    rows: dict[str, QuantizedLayer],
    coded: Mapping[str, Coded],
    raised: Mapping[str, Coded],
    activations: Mapping[str, Grid],
) -> None:
    """Put the bits of what each layer reads into its row, and what became of its scales."""
    for layer in structure.layers(net):
        read = edit.source(net, structure.node_of(net, layer))
        row = with_note(rows[layer.name], biases.raised_note(coded[layer.weight], raised.get(layer.weight)))
        rows[layer.name] = replace(row, act_bits=None if read is None else activations[read].bits)


def with_note(row: QuantizedLayer, note: str) -> QuantizedLayer:
    return replace(row, note="; ".join(filter(None, (row.note, note))))
