"""The audit of an ONNX file as it was written: what its weights are made of, what it computes in float, and its size.

Nothing is asked of the exporter: types, sizes and operators are read from the file.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto

from r2cli.deploy import float_nodes, onnx_export, onnx_text
from r2cli.graph import placement
from r2cli.quantized.coded import Coded
from r2cli.quantized.packing import packed_bytes
from r2cli.quantized.palette import Palette

INTEGERS = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)
INDICES = (TensorProto.INT32, TensorProto.INT64)  # shapes, and where a group's table begins


@dataclass(frozen=True)
class Check:
    """One tick: what was checked, whether it holds, and the numbers."""

    name: str
    passed: bool
    detail: str


def all_integer(file: onnx.ModelProto, coded: Mapping[str, Coded]) -> Check:
    """Every coded weight comes from integers, a float table of centroids at most, and no layer reads a float one."""
    made_from = sources(file)
    initializers = {i.name: i for i in file.graph.initializer}
    for name, one in coded.items():
        if not codes(name, made_from, initializers):
            return Check("integer weights", False, f"{name} has no codes in the file")
        floats = {"s": one.codec.scale.numel()}
        if isinstance(one.codec, Palette) and has_float_table(one):
            floats["t"] = one.codec.lut.numel()
        for part in (p for p in made_from[name] if p in initializers):
            is_integer = initializers[part].data_type in (*INTEGERS, *INDICES)
            if not is_integer and floats.get(onnx_text.letter(part)) != prod(initializers[part].dims):
                return Check("integer weights", False, f"{name} is made from the float initializer {part}")
    for node in file.graph.node:
        for used in node.input:
            if node.op_type in ("Conv", "Gemm", "MatMul") and used in initializers and len(initializers[used].dims) > 1:
                if initializers[used].data_type == TensorProto.FLOAT and coded:
                    return Check("integer weights", False, f"{used} is float32")
    held_codes = [part for name in coded for part in codes(name, made_from, initializers)]
    kinds = Counter(TensorProto.DataType.Name(part.data_type) for part in held_codes)
    held = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "float network"
    if any(has_float_table(one) for one in coded.values()):
        held += " of codes, float tables"
    return Check("integer weights", True, f"{len(coded)} layers ({held})")


def announced(file: onnx.ModelProto, weights: Check, left: Sequence[placement.FloatOperation] | None) -> Check:
    """`weights`, and that between grids the file computes in float only what the network says that it leaves there."""
    if left is None or not weights.passed:
        return weights
    found = float_nodes.operators(file)
    foreign = any(not each.operators for each in left)  # what r2 does not know may be any operator, but no layer
    allowed = {operator for each in left for operator in each.operators}
    unsaid = {op: n for op, n in found.items() if op not in allowed and (not foreign or op.startswith("layer"))}
    if unsaid:
        told = ", ".join(f"{count} {op}" for op, count in sorted(unsaid.items()))
        return replace(weights, passed=False, detail=f"{told} in float that the network does not leave there")
    told = f"; {len(left)} operations stay float, as announced" if left else "; nothing stays float"
    return replace(weights, detail=weights.detail + told)


def has_float_table(coded: Coded) -> bool:
    """Whether the weight is a palette of float centroids: its codes are integers, what they stand for is not."""
    return isinstance(coded.codec, Palette) and coded.codec.lut.is_floating_point()


def size(file: onnx.ModelProto, path: Path, coded: Mapping[str, Coded]) -> Check:
    """Bytes of every layer's codes against the least that its container can hold, and of the file against the ideal.

    The ideal: codes, scales, tables, and the floats that stay, which are biases most of all.
    """
    initializers, made_from = {i.name: i for i in file.graph.initializer}, sources(file)
    ideal, parts = 0, {name for name in coded for name in made_from.get(name, [])}
    for name, one in coded.items():
        held = sum(len(part.raw_data) for part in codes(name, made_from, initializers))
        least = packed_bytes(one.codes.numel(), onnx_export.stored_bits(one.codec))
        if held != least:
            return Check("size", False, f"{name} takes {held} bytes of codes, {least} are enough")
        ideal += one.payload_bytes()
    total = path.stat().st_size
    if not coded:
        return Check("size", True, f"{total:,} bytes, float network")
    ideal += sum(len(one.raw_data) for name, one in initializers.items() if name not in parts)
    return Check("size", True, f"{total:,} bytes; codes, scales and biases alone {ideal:,}")


def sources(file: onnx.ModelProto) -> dict[str, list[str]]:
    """For every value: the values that it is made from, however far up, in the file's order of nodes."""
    above: dict[str, list[str]] = {}
    for node in file.graph.node:
        own = list(dict.fromkeys(v for used in node.input if used for v in (used, *above.get(used, []))))
        above |= dict.fromkeys(node.output, own)
    return above


def codes(
    name: str, made_from: Mapping[str, Sequence[str]], initializers: Mapping[str, TensorProto]
) -> list[TensorProto]:
    """The initializers that hold the codes of the weight `name`."""
    return [initializers[part] for part in made_from.get(name, []) if onnx_text.letter(part) in onnx_text.CODES]
