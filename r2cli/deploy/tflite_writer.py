"""Write a TensorFlow Lite file: tensors, the operators that read and give them, and the bytes in between.

The schema is the one that `ai-edge-litert` ships, and `flatbuffers` packs it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from r2cli.errors import InputError

Array = np.ndarray[Any, Any]
TYPES = {"int8": schema.TensorType.INT8, "int32": schema.TensorType.INT32, "float32": schema.TensorType.FLOAT32}
# The oldest version of each operator that has INT8; of one that runs in float alone, the first.
VERSIONS = {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "FULLY_CONNECTED": 4,
    "RESIZE_NEAREST_NEIGHBOR": 3,
    "TRANSPOSE_CONV": 3,
    **dict.fromkeys(("RESHAPE", "CAST", "BATCH_MATMUL", "PRELU", "SELECT_V2", "TILE", "RESIZE_BILINEAR"), 1),
    **dict.fromkeys(
        ("SUB", "DIV", "POW", "SQRT", "RSQRT", "EXP", "LOG", "ABS", "NEG", "FLOOR", "COS", "SIN", "ELU"), 1
    ),
}
USUAL_VERSION = 2
IDENTIFIER = b"TFL3"  # bytes 4 to 7 of a file


@dataclass(frozen=True)
class LiteGrid:
    """What the integers of a tensor stand for: scale * (code - zero), or with one scale for each place on `axis`."""

    scale: Array  # float32, () or (channels,)
    zero: int = 0
    axis: int = 0

    def same(self, other: "LiteGrid") -> bool:
        return bool(np.array_equal(self.scale, other.scale)) and self.zero == other.zero


def metadata(content: bytes) -> dict[str, str]:
    """The metadata of a file, by name. Raises InputError for a file of another format, or a damaged one."""
    try:
        if content[4:8] != IDENTIFIER:
            raise ValueError("no file of TensorFlow Lite")
        model = schema.Model.GetRootAs(content, 0)
        entries = [model.Metadata(place) for place in range(model.MetadataLength())]
        return {one.Name().decode(): model.Buffers(one.Buffer()).DataAsNumpy().tobytes().decode() for one in entries}
    except Exception as error:  # flatbuffers reads offsets unchecked: whatever comes of that
        raise InputError(
            f"it is damaged, or not of TensorFlow Lite ({type(error).__name__}): write it again"
        ) from error


@dataclass(frozen=True)
class LiteTensor:
    """A tensor of a file: its type, its shape, its scales and zero points, and the bytes that it holds, if any."""

    type: int
    shape: tuple[int, ...]
    grid: tuple[tuple[float, ...], tuple[int, ...]]
    content: bytes


def tensors(content: bytes) -> dict[str, LiteTensor]:
    """The tensors of a file that LiteRT loads, by name."""
    model = schema.ModelT.InitFromPackedBuf(content)
    return {
        own.name.decode(): LiteTensor(
            own.type,
            tuple(own.shape),
            (_numbers(own.quantization, "scale"), _numbers(own.quantization, "zeroPoint")),
            bytes(() if model.buffers[own.buffer].data is None else model.buffers[own.buffer].data),
        )
        for own in model.subgraphs[0].tensors
    }


def _numbers(quantization: Any, name: str) -> tuple[Any, ...]:
    found = getattr(quantization, name, None)
    return () if found is None else tuple(found)


class TfliteWriter:
    """A graph that grows operator by operator. Tensors are known by their numbers."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self._buffers: list[Any] = [schema.BufferT()]  # the first is empty by rule: of tensors that are computed
        self._codes: dict[str, int] = {}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def tensor(
        self, name: str, shape: Sequence[int], codes: LiteGrid | None = None, content: Array | None = None
    ) -> int:
        """Add a tensor of its `content`'s type; of one that is computed, INT8 with `codes` and float32 without."""
        return self.typed(name, shape, "float32" if codes is None else "int8", codes, content)

    def typed(
        self,
        name: str,
        shape: Sequence[int],
        kind: str,
        codes: LiteGrid | None = None,
        content: Array | None = None,
    ) -> int:
        """The same, of a type that is told."""
        own = schema.TensorT()
        own.name, own.shape, own.hasRank = name.encode(), list(map(int, shape)), True
        own.type = TYPES[kind if content is None else str(content.dtype)]
        if content is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(content).tobytes(), np.uint8)
            self._buffers.append(buffer)
            own.buffer = len(self._buffers) - 1
        if codes is not None:
            own.quantization = schema.QuantizationParametersT()
            own.quantization.scale = codes.scale.reshape(-1).astype(np.float32)
            own.quantization.zeroPoint = np.full(codes.scale.size, codes.zero, np.int64)
            own.quantization.quantizedDimension = codes.axis
        self.tensors.append(own)
        return len(self.tensors) - 1

    def name(self, tensor: int) -> str:
        found: str = self.tensors[tensor].name.decode()
        return found

    def ints(self, values: Any) -> int:
        """The number of a constant of INT32 that all share who need the same one: a shape, axes or bounds."""
        content = np.asarray(values, np.int32)
        key = ("int32", content.shape, content.tobytes())
        if key not in self._shared:
            name = f"shape.{'x'.join(map(str, content.reshape(-1).tolist()))}"
            self._shared[key] = self.tensor(name, content.shape, None, content)
        return self._shared[key]

    def operator(
        self, kind: str, inputs: Sequence[int], outputs: Sequence[int], options: str = "", **given: Any
    ) -> None:
        """Add an operator of `kind`, with `options` (the schema's class without 'Options') that are `given`."""
        own = schema.OperatorT()
        own.opcodeIndex = self._codes.setdefault(kind, len(self._codes))
        own.inputs, own.outputs = list(inputs), list(outputs)
        if options:
            own.builtinOptionsType = getattr(schema.BuiltinOptions, f"{options}Options")
            own.builtinOptions = getattr(schema, f"{options}OptionsT")()
            for name, value in given.items():
                setattr(own.builtinOptions, name, value)
        self.operators.append(own)

    def to_bytes(self, given: Sequence[int], results: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
        """The file, with the tensors `given` as inputs, and `results` by name. Equal graphs give equal bytes."""
        for name, tensor in results.items():
            self.tensors[tensor].name = name.encode()
        given, outputs = self._keep_what_is_read(given, results.values())
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = b"r2", self.tensors, self.operators
        graph.inputs, graph.outputs = given, outputs
        model = schema.ModelT()
        model.version, model.description = 3, b"r2cli"
        model.metadata = [self._metadata(*entry) for entry in metadata.items()]
        model.subgraphs, model.buffers = [graph], self._buffers
        model.operatorCodes = [self._code(kind) for kind in self._codes]
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def _keep_what_is_read(self, given: Sequence[int], results: Iterable[int]) -> tuple[list[int], list[int]]:
        """Drop the tensors that no operator reads or gives, with their buffers. Returns the new numbers of both."""
        ends = {*given, *results}.union(
            *(own.inputs for own in self.operators), *(own.outputs for own in self.operators)
        )
        kept = sorted(ends - {-1})  # an input that an operator does without
        number = {-1: -1} | {old: new for new, old in enumerate(kept)}
        tensors, buffers = [self.tensors[old] for old in kept], self._buffers[:1]
        for own in tensors:
            if own.buffer:
                buffers.append(self._buffers[own.buffer])
                own.buffer = len(buffers) - 1
        for own in self.operators:
            own.inputs, own.outputs = ([number[old] for old in each] for each in (own.inputs, own.outputs))
        self.tensors, self._buffers = tensors, buffers
        return [number[old] for old in given], [number[old] for old in results]

    def _metadata(self, name: str, text: str) -> Any:
        own, buffer = schema.MetadataT(), schema.BufferT()
        buffer.data = np.frombuffer(text.encode(), np.uint8)
        self._buffers.append(buffer)
        own.name, own.buffer = name.encode(), len(self._buffers) - 1
        return own

    def _code(self, kind: str) -> Any:
        own = schema.OperatorCodeT()
        own.builtinCode = getattr(schema.BuiltinOperator, kind)
        own.deprecatedBuiltinCode = min(own.builtinCode, 127)
        own.version = VERSIONS.get(kind, USUAL_VERSION)
        return own
