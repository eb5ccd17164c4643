"""A network that came as an ONNX file, without its weights: what a checkpoint records of it, and what is built of that.

A checkpoint may come from anyone, so `of_text` reads it like any file from outside: sizes are bounded before memory is
taken, operators are those of the table, and a node reads only what stands before it.
"""

import base64
import binascii
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from r2cli.errors import InputError
from r2cli.models.onnx_layers import LAYERS
from r2cli.models.onnx_pointwise import POINTWISE
from r2cli.models.onnx_recurrent import RECURRENT
from r2cli.models.onnx_shapes import SHAPES
from r2cli.models.onnx_values import Operator
from r2cli.storage import schema
from r2cli.storage.schema import Between, Malformed

OPERATORS: Mapping[str, Operator] = {**LAYERS, **RECURRENT, **POINTWISE, **SHAPES}
LONGEST = 2**26  # bytes of JSON: the largest network of the benchmark has 0.5 MB
LONGEST_WORD = 256  # characters; the equation of an Einsum is the longest
MOST = 2**16  # nodes, tensors, and numbers in a list
Size = Annotated[int, Between(0, 2**31)]


@dataclass(frozen=True)
class OnnxNode:
    """One operator: `path` is where its module stands in the network, inputs are '' where they are not given."""

    operator: str
    path: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class HeldTensor:
    """A parameter, if it is `trained`, or a buffer."""

    shape: tuple[Size, ...]
    kind: Literal["float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
    trained: bool


@dataclass(frozen=True)
class OnnxProgram:
    """The nodes in the order in which they run. Tensors are known by their paths in the network's state_dict.

    `results` are the values that the network gives, `outputs` their names in the file.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    results: tuple[str, ...]
    nodes: tuple[OnnxNode, ...]
    tensors: Mapping[str, HeldTensor]
    numbers: Mapping[str, Any]

    def text(self) -> str:
        """The program as a text for a checkpoint's JSON."""
        told = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return base64.b64encode(zlib.compress(told.encode(), 9)).decode()


def of_text(text: Any, most: int | None = None) -> OnnxProgram:
    """The program that `OnnxProgram.text` wrote. Raises InputError for one that is damaged, that does something else
    than compute, or whose tensors have more than `most` elements.
    """
    try:
        program = schema.of_text(OnnxProgram, _unpacked(text))
        _require_sound(program)
    except (Malformed, binascii.Error, zlib.error, ValueError, TypeError) as error:
        raise InputError(f"the network that the file describes is damaged ({error}): write the file again") from error
    held = sum(math.prod(tensor.shape) for tensor in program.tensors.values())
    if most is not None and held > most:
        raise InputError("onnx as the file describes it has more parameters than the file holds: write it again")
    return program


def _unpacked(text: Any) -> bytes:
    if not isinstance(text, str):
        raise Malformed("it is no text")
    reader = zlib.decompressobj()
    found = reader.decompress(base64.b64decode(text, validate=True), LONGEST)
    if not reader.eof:
        raise Malformed("it is cut off, or too large")
    return found


def _require_sound(program: OnnxProgram) -> None:
    """Raises Malformed for an unknown operator, for a value that nothing made before, and for odd attributes."""
    if max(len(program.nodes), len(program.tensors), len(program.numbers)) > MOST:
        raise Malformed("it has too many nodes")
    if not program.inputs or len({*program.inputs, *program.tensors}) < len(program.inputs) + len(program.tensors):
        raise Malformed("its inputs have no names of their own")
    known = {"", *program.inputs, *program.tensors, *program.numbers}
    for name, number in program.numbers.items():
        _require_plain(f"the number {name}", number)
    for node in program.nodes:
        if node.operator not in OPERATORS:
            raise Malformed(f"'{node.path}' is a {node.operator}, which is no operator that r2 knows")
        for name in node.inputs:
            if name not in known:
                raise Malformed(f"'{node.path}' ({node.operator}) reads '{name}', which nothing before it gives")
        for name, value in node.attributes.items():
            _require_plain(f"{name} of '{node.path}' ({node.operator})", value)
        if not all(node.outputs) or known.intersection(node.outputs):
            raise Malformed(f"'{node.path}' ({node.operator}) gives what is there already")
        known.update(node.outputs)
    if not program.results or not known.issuperset(program.results) or len(program.results) != len(program.outputs):
        raise Malformed("nothing gives its outputs")


def _require_plain(what: str, value: Any) -> None:
    """Raises Malformed for what is no finite number, no short word, and no list of numbers."""
    each = value if isinstance(value, list) else [value]
    word = isinstance(value, str) and len(value) <= LONGEST_WORD
    if not word and (len(each) > MOST or not all(isinstance(one, int | float) and math.isfinite(one) for one in each)):
        raise Malformed(f"{what} is neither a number nor a word")
