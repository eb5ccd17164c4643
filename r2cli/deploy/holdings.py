"""What the weights of anybody's ONNX file are held as: told by the operators that read them, never by names.

It knows the forms of other tools too: codes behind DequantizeLinear, operators that take codes themselves (QLinearConv,
ConvInteger, MatMulNBits, …), and floats behind QuantizeLinear, which a runtime rounds when it loads the file.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import onnx
from onnx import TensorProto

from r2cli.deploy import weight_roles
from r2cli.deploy.audit import Check

# Types of codes. Some versions of onnx know only the first of them.
CODES = tuple(
    getattr(TensorProto, name)
    for name in (
        *("INT8", "UINT8", "INT4", "UINT4", "INT16", "UINT16", "INT2", "UINT2"),
        *("FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ", "FLOAT4E2M1"),
    )
    if hasattr(TensorProto, name)
)
ROUNDING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
STANDARD = ("", "ai.onnx", "ai.onnx.ml")
OVERHEAD = 64  # bytes of a tensor's name, type and shape
BESIDE = 0.01  # the share of a file that may go into no result: other tools leave single constants behind


@dataclass(frozen=True)
class Holding:
    """A weight that an operator reads: the constants that hold it, and how many numbers it has.

    `rounded` says that it is held as floats which a runtime rounds when it loads the file.
    """

    name: str
    operator: str
    parts: tuple[TensorProto, ...]
    numbers: int
    rounded: bool

    @property
    def coded(self) -> bool:
        return all(part.data_type in CODES for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(weight_roles.size(part) for part in self.parts)


def of(file: onnx.ModelProto) -> list[Holding]:
    """The weights of an inlined file, each once. What is only added (positions, masks) is none."""
    held, made = weight_roles.constants(file), {v: node for node in file.graph.node for v in node.output}
    typed = onnx.shape_inference.infer_shapes(file)
    known = {each.name: [one.dim_value for one in each.type.tensor_type.shape.dim] for each in typed.graph.value_info}
    found: dict[tuple[str, ...], Holding] = {}
    for node, name, leaves, adds in weight_roles.of(file):
        parts = _parts(file, name, [held[leaf] for leaf in leaves])
        if adds or not parts:
            continue
        numbers = prod(known.get(name, [0])) or max(_numbers(node, part) for part in parts)
        rounded = any(made[value].op_type == "QuantizeLinear" for value in _above(made, name))
        one = Holding(name, node.op_type, tuple(parts), numbers, rounded)
        found.setdefault(tuple(part.name for part in parts), one)
    return list(found.values())


def _parts(file: onnx.ModelProto, name: str, leaves: Sequence[TensorProto]) -> list[TensorProto]:
    """The constants that hold the weight `name`: its codes, or else the floats that it is computed from."""
    parts = [part for part in weight_roles.codes(file, name) if part.data_type in (*CODES, *weight_roles.FLOATS)]
    return parts or [leaf for leaf in leaves if leaf.data_type in weight_roles.FLOATS]


def _above(made: dict[str, onnx.NodeProto], name: str) -> list[str]:
    """The values on the way to `name`, by the first inputs of nodes, itself among them."""
    found = []
    while name in made:
        found.append(name)
        name = next(iter(made[name].input), "")
    return found


def _numbers(node: onnx.NodeProto, part: TensorProto) -> int:
    """How many numbers a constant stands for; a MatMulNBits holds several a byte."""
    own = {each.name: each.i for each in node.attribute if each.name in ("K", "N")}
    return own["K"] * own["N"] if len(own) == 2 else int(prod(part.dims))


# --- checks --------------------------------------------------------------------------------------------------------


def claims(file: onnx.ModelProto) -> bool:
    """Whether a file has any sign of quantization: an operator on integers, or one that rounds."""
    return any(
        node.op_type in ROUNDING or node.op_type.startswith(("QLinear", "QGemm", "QAttention", "MatMulNBits"))
        or "Integer" in node.op_type
        for node in file.graph.node
    )  # fmt: skip


def integer(file: onnx.ModelProto, weights: Sequence[Holding]) -> Check:
    """'integer weights': most weights, by their number, are held as codes."""
    coded, floats = [each for each in weights if each.coded], [each for each in weights if not each.coded]
    numbers = sum(each.numbers for each in weights)
    share = 100 * sum(each.numbers for each in coded) / numbers if numbers else 0.0
    if not coded and not claims(file):
        return Check("integer weights", False, f"float file: no weight is integer; {_listed(floats)}")
    rounded = sum(each.rounded for each in floats)
    told = f"{share:.3g} % of {numbers:,} weights are codes ({_types(coded)})"
    if rounded:
        told += f"; {rounded} are floats that a runtime rounds when it loads the file"
    return Check("integer weights", share > 50, f"{told}; {_listed(floats)}")


def _types(coded: Sequence[Holding]) -> str:
    kinds = Counter(TensorProto.DataType.Name(part.data_type) for each in coded for part in each.parts)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"


def _listed(floats: Sequence[Holding]) -> str:
    if not floats:
        return "no layer stays float"
    largest = sorted(floats, key=lambda each: -each.bytes)
    listed = ", ".join(f"{each.name} of {each.operator} ({each.bytes:,} bytes)" for each in largest[:3])
    return f"float: {listed}{f' and {len(floats) - 3} more' if len(floats) > 3 else ''}"


def size(file: onnx.ModelProto, weights: Sequence[Holding], total: int, beside: int | None) -> Check:
    """'size': no code takes more bytes than its type needs, and the file is smaller than it would be in float32.

    `total` are the bytes of the file and its external data, and `beside` those of the float file, if there is one.
    """
    parts = {part.name: part for each in weights if each.coded for part in each.parts}
    for name, part in parts.items():
        if stored(part) > weight_roles.size(part) + OVERHEAD:
            kind = TensorProto.DataType.Name(part.data_type)
            told = f"{name} takes {stored(part):,} bytes for {weight_roles.size(part):,} of {kind}: it is not packed"
            return Check("size", False, told)
    codes = sum(map(weight_roles.size, parts.values()))
    others = {
        each.name: weight_roles.size(each) for each in weight_roles.constants(file).values() if each.name not in parts
    }
    told = f"{total:,} bytes; codes {codes:,}, other constants {sum(others.values()):,}"
    if beside is not None:
        told = f"{told}; {total / beside:.3g} of the float file's {beside:,}"
        return Check("size", total <= beside + _of_grids(file), told)
    plain = total - codes + 4 * sum(each.numbers for each in weights if each.coded)
    return Check("size", total <= plain, f"{told}; {total / plain:.3g} of what float32 weights would take")


def _of_grids(file: onnx.ModelProto) -> int:
    """The bytes of what rounds values, and decodes weights: where these are few, it is more than their codes save."""
    nodes = [node for node in file.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    held, read = weight_roles.constants(file), {name for node in nodes for name in node.input[1:]}
    return sum(int(one.ByteSize()) for one in (*nodes, *(held[name] for name in read if name in held)))


def stored(tensor: TensorProto) -> int:
    """Bytes that a tensor takes in the file, or in the file of external data that it was read from."""
    return len(tensor.raw_data) or tensor.ByteSize()


def used(file: onnx.ModelProto, total: int) -> Check:
    """'nothing beside': all but a hundredth of the file goes into a result."""
    live = {name for out in file.graph.output for name in (out.name, *weight_roles.sources(file).get(out.name, []))}
    dead = [each for each in file.graph.initializer if each.name not in live]
    lost = sum(map(stored, dead))
    if not dead:
        return Check("nothing beside", True, "every initializer goes into the result")
    largest = max(dead, key=stored)
    more = f" and {len(dead) - 1} more" if len(dead) > 1 else ""
    told = f"{largest.name}{more} ({lost:,} bytes) goes into no result"
    return Check("nothing beside", lost <= BESIDE * total, told)


def operators(written: onnx.ModelProto) -> Check:
    """'operators': whose they are. Those of a runtime's own, and functions of the file's own, are named."""
    own = {(each.domain, each.name) for each in written.functions}
    nodes = [*written.graph.node, *(node for each in written.functions for node in each.node)]
    foreign = {(each.domain, each.op_type) for each in nodes if each.domain not in STANDARD} - own
    told = [f"{name} of {domain}" for domain, name in sorted(foreign)]
    if own:
        told.append(f"{len(own)} functions of the file's own ({', '.join(sorted(name for _, name in own))})")
    opset = next((each.version for each in written.opset_import if each.domain in STANDARD[:2]), 0)
    shown = "; not standard: " + ", ".join(told) if told else ", all standard"
    return Check("operators", True, f"opset {opset}{shown}")
