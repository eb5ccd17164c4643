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
from torch import Tensor

from r2cli.config.targets import DEFAULT, TARGETS, Target
from r2cli.deploy import float_nodes, weight_nodes, weight_roles
from r2cli.graph import placement
from r2cli.quantized.coded import Coded
from r2cli.quantized.palette import Palette


@dataclass(frozen=True)
class Check:
    """One tick: what was checked, whether it holds, and the numbers."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class HeldWeights:
    """What the weights of a file take: bytes of integers, and the float ones each."""

    integer_bytes: int
    floats: tuple[weight_roles.FloatWeight, ...]

    @property
    def share(self) -> float:
        """Percent of the weights' bytes that are integers."""
        total = self.integer_bytes + sum(each.bytes for each in self.floats)
        return 100 * self.integer_bytes / total if total else 0.0


def held_weights(file: onnx.ModelProto, coded: Mapping[str, Coded]) -> HeldWeights:
    """The weights of every operator that holds some. What decodes integers (scales, tables) is no weight."""
    held = weight_roles.constants(file)
    integers: dict[str, int] = {}
    floats: dict[str, weight_roles.FloatWeight] = {}
    for node, _, leaves, adds in weight_roles.of(file):
        whole = {part for part in leaves if held[part].data_type in weight_roles.INTEGERS}
        integers |= {part: weight_roles.size(held[part]) for part in whole}
        for part in leaves:
            if held[part].data_type in weight_roles.FLOATS and not adds and not (whole and _decodes(held[part], coded)):
                floats[part] = weight_roles.FloatWeight(part, node.op_type, weight_roles.size(held[part]))
    return HeldWeights(sum(integers.values()), tuple(floats.values()))


def _decodes(part: TensorProto, coded: Mapping[str, Coded]) -> bool:
    """Whether a float constant beside integers is of a size that scales or tables have."""
    sizes = {one.codec.scale.numel() for one in coded.values()}
    sizes |= {one.codec.lut.numel() for one in coded.values() if isinstance(one.codec, Palette)}
    return prod(part.dims) in sizes


def all_integer(
    file: onnx.ModelProto, coded: Mapping[str, Coded], floats: Mapping[str, Tensor], asked: Sequence[str] = ()
) -> Check:
    """Every coded weight is decoded from integers; a palette's centroids may be float.

    No layer reads a float weight but those of layers that were `asked` to stay float. Those, and a float weight of any
    other operator, must be one of `floats`, the checkpoint's.
    """
    made_from, held = weight_roles.sources(file), weight_roles.constants(file)
    named = [f"{name}.weight" for name in asked]
    problem = _decoded_from(made_from, held, coded)
    problem = problem or (_float_weight(file, held, coded, floats, named) if coded else None)
    if problem:
        return Check("integer weights", False, problem)
    kinds = Counter(
        TensorProto.DataType.Name(part.data_type) for name in coded for part in weight_roles.codes(file, name)
    )
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "float network"
    if any(has_float_table(one) for one in coded.values()):
        told += " of codes, float tables"
    told = f"{len(coded)} layers ({told}), {_shares(held_weights(file, coded))}"
    return Check("integer weights", True, told + (f"; {len(asked)} as --keep asks" if asked else ""))


def _shares(weights: HeldWeights) -> str:
    told = f"{weights.share:.3g} % of the weights' bytes"
    if not weights.floats:
        return told
    listed = ", ".join(f"{each.name} ({each.bytes:,} bytes)" for each in weights.floats[:3])
    more = f" and {len(weights.floats) - 3} more" if len(weights.floats) > 3 else ""
    return f"{told}; float: {listed}{more}"


def _decoded_from(
    made_from: Mapping[str, Sequence[str]], held: Mapping[str, TensorProto], coded: Mapping[str, Coded]
) -> str | None:
    """What is wrong with a coded weight: it comes from no integers, or from floats that are not its scale and table."""
    for name, one in coded.items():
        leaves = [held[part] for part in made_from.get(name, []) if part in held]
        if not any(part.data_type in weight_roles.INTEGERS for part in leaves):
            return f"{name} has no codes in the file"
        allowed = [one.codec.scale.numel()]
        if isinstance(one.codec, Palette) and has_float_table(one):
            allowed.append(one.codec.lut.numel())
        for part in leaves:
            if part.data_type in weight_roles.FLOATS:
                if prod(part.dims) not in allowed:
                    return f"{name} is made from the float initializer {part.name}"
                allowed.remove(prod(part.dims))
    return None


def _float_weight(
    file: onnx.ModelProto,
    held: Mapping[str, TensorProto],
    coded: Mapping[str, Coded],
    floats: Mapping[str, Tensor],
    asked: Sequence[str],
) -> str | None:
    """Return which float weight the checkpoint does not explain, and why; None where there is none."""
    large = {one.codes.numel() for one in coded.values()}
    seen: set[str] = set()
    for node, _, leaves, adds in weight_roles.of(file):
        integers = any(held[part].data_type in weight_roles.INTEGERS for part in leaves)
        for part in leaves:
            tensor = held[part]
            if tensor.data_type not in weight_roles.FLOATS or (integers and _decodes(tensor, coded)):
                continue
            if node.op_type in weight_roles.LAYERS and part not in asked:
                return f"{part}, which {node.op_type} reads, is {TensorProto.DataType.Name(tensor.data_type).lower()}"
            if part in seen or (adds and prod(tensor.dims) not in large):
                continue
            seen.add(part)
            if weight_roles.unaccounted(onnx.numpy_helper.to_array(tensor), floats):
                return f"{part}, which {node.op_type} reads, holds floats that the checkpoint has not"
    return None


def nothing_beside(written: onnx.ModelProto, file: onnx.ModelProto) -> Check:
    """Every initializer and node goes into a result. `file` is `written`, the stored model, without functions."""
    dead = weight_roles.beside(written, file)
    more = f" and {len(dead) - 1} more" if len(dead) > 1 else ""
    told = f"{dead[0]}{more} goes into no result" if dead else "every initializer and node goes into the result"
    return Check("nothing beside", not dead, told)


def announced(file: onnx.ModelProto, weights: Check, left: Sequence[placement.FloatOperation] | None) -> Check:
    """Extend the check `weights`: it fails where the file runs a float operator between grids that `left` has not."""
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


def size(file: onnx.ModelProto, path: Path, coded: Mapping[str, Coded], target: Target = TARGETS[DEFAULT]) -> Check:
    """Bytes of every layer's codes against the least that its container can hold, and of the file against the ideal.

    The ideal: codes, scales, tables, and the floats that stay, which are biases most of all.
    """
    initializers, made_from = {i.name: i for i in file.graph.initializer}, weight_roles.sources(file)
    ideal, parts = 0, {name for name in coded for name in made_from.get(name, [])}
    for name, one in coded.items():
        held = sum(len(part.raw_data) for part in weight_roles.codes(file, name))
        least = weight_nodes.stored_bytes(one, target)
        if held != least:
            return Check("size", False, f"{name} takes {held} bytes of codes, {least} are enough")
        ideal += one.payload_bytes()
    total = path.stat().st_size
    if not coded:
        return Check("size", True, f"{total:,} bytes, float network")
    ideal += sum(len(one.raw_data) for name, one in initializers.items() if name not in parts)
    return Check("size", True, f"{total:,} bytes; codes, scales and biases alone {ideal:,}")
