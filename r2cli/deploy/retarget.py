"""A checkpoint for another target: what changes only the form of its file is taken on, other numbers are refused."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from r2cli.config import targets
from r2cli.config.targets import Target
from r2cli.deploy import weight_nodes
from r2cli.errors import InputError
from r2cli.quantized.grid import Grid
from r2cli.storage.checkpoint import Checkpoint


def retarget(checkpoint: Checkpoint, name: str | None = None) -> Checkpoint:
    """The same codes and grids for the target `name`, or for the checkpoint's own, checked in both cases.

    Raises InputError, with the way out, where the target cannot hold them.
    """
    row = targets.get(name or checkpoint.target)
    problem = next(_problems(checkpoint, row), None)
    if problem is not None:
        raise InputError(f"{checkpoint.origin} {problem}")
    if not row.integers:
        decoded = {name: one.decode() for name, one in checkpoint.coded.items()}
        return replace(checkpoint, floats={**checkpoint.floats, **decoded}, coded={}, target=row.name)
    return replace(checkpoint, target=row.name)


def is_symmetric(grid: Grid) -> bool:
    """Whether the middle code of an activation's grid stands for 0, so that as INT8 its zero point is 0."""
    return int(grid.zero_point) == 1 << (grid.bits - 1)


def _problems(checkpoint: Checkpoint, row: Target) -> Iterator[str]:
    """Why the target cannot hold the checkpoint, each with the way out."""
    grids, again = checkpoint.activations, f"quantize the float checkpoint again with --target {row.name}"
    if grids and not row.integers:
        yield "has activations on grids, which a float file has not: export the float checkpoint that it was made from"
    if row.container == targets.TFLITE and not checkpoint.coded:
        yield f"is float, and {row.name} wants codes: make them with `r2 ptq --target {row.name}`"
    if not row.integers or not checkpoint.coded:
        return
    if row.codes_of_result and not targets.get(checkpoint.target).codes_of_result:
        yield f"was made for {checkpoint.target}, and its result has no codes, which {row.name} wants: {again}"
    for bits in {grid.bits for grid in grids.values() if not row.least_act_bits <= grid.bits <= row.most_act_bits}:
        cannot = "clip to" if bits < 8 else "hold"
        yield f"has activations of {bits} bits, which {row.name} cannot {cannot}: {again} and --act-bits 8"
    if not grids and not row.weights_alone:
        yield f"has float activations, beside which {row.name} takes no integer weights: {again} and --act-bits 8"
    name = next((name for name, grid in grids.items() if row.symmetric and not is_symmetric(grid)), None)
    if name is not None:
        yield f"has activations with a zero point ('{name}'), which {row.name} cannot hold: {again}"
    for name, one in checkpoint.coded.items():
        if weight_nodes.is_packed(one.codec, row):
            continue
        if not one.is_integer:
            yield f"has float tables ('{name}'), and {row.name} takes INT8 weights: {again} and --lut-bits 8"
        elif not _fits_int8(weight_nodes.plain(one)):
            yield f"has a weight ('{name}') that fits INT8 only with a zero point, which {row.name} has not: {again}"


def _fits_int8(integers: torch.Tensor) -> bool:
    return bool((integers >= -128).all() and (integers <= 127).all())
