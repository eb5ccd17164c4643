"""Open an ONNX file of someone else's: what is there is checked before it is read."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import torch
from onnx import TensorProto, external_data_helper, numpy_helper
from torch import Tensor

from r2cli.errors import InputError
from r2cli.models.onnx_program import OPERATORS

OPSETS = (7, 23)
STANDARD = ("", "ai.onnx")
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
REWRITTEN = ("Constant", "Identity", "Dropout", "If", "Upsample")  # operators that reading writes as others
External = tuple[TensorProto, dict[str, str]]  # a tensor, and what it says about the place of its data
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def require_there(path: Path) -> None:
    """Raises InputError for a file that is missing."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: name an .onnx file")


def opened(path: Path) -> onnx.ModelProto:
    """The model at `path` with its data, and with its functions inlined.

    Raises InputError for a file that is missing, damaged, of an opset that r2 does not know, quantized already, or has
    operators or data of which r2 has nothing.
    """
    require_there(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own classes share no base
        raise _damaged(path, error) from error
    _require_opset(path, model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _require_known(path, model.graph)
    _load(path, model)
    for value in model.graph.output:  # the checker wants shapes, of which nobody has need
        value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # as above
        raise _damaged(path, error) from error
    return model


def _damaged(path: Path, error: Exception) -> InputError:
    why = next(iter(str(error).strip().splitlines()), "")[:200]
    return InputError(f"{path} is not a valid ONNX model ({type(error).__name__}: {why}): copy or export it again")


def _require_opset(path: Path, model: onnx.ModelProto) -> None:
    version = next((each.version for each in model.opset_import if each.domain in STANDARD), None)
    if version is None:
        raise InputError(f"{path} is not a valid ONNX model (it names no opset): copy or export it again")
    if not OPSETS[0] <= version <= OPSETS[1]:
        raise InputError(
            f"{path} has opset {version}, r2 reads {OPSETS[0]} to {OPSETS[1]}: export it again with "
            "opset_version=17, or convert it by onnx.version_converter"
        )


def _require_known(path: Path, graph: onnx.GraphProto) -> None:
    for node in nodes(graph):
        named = f"{path}: node '{node.name or node.output[0]}'"
        if node.op_type in QUANTIZED or node.op_type.startswith("QLinear"):
            raise InputError(
                f"{named} is a {node.op_type}, so the file is quantized already: give the float one that it was made "
                f"from, or prove this one with `r2 verify {path}`"
            )
        if node.domain not in STANDARD:
            raise InputError(
                f"{named} is a {node.op_type} of {node.domain}, which is no standard operator: export the network "
                "again without operators of its own"
            )
        if node.op_type not in OPERATORS and node.op_type not in REWRITTEN:
            raise InputError(
                f"{named} is a {node.op_type}, an operator that r2 does not read: try `onnxsim` on the file first, or "
                "take it out of the network"
            )


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs in them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


def _load(path: Path, model: onnx.ModelProto) -> None:
    """Read the tensors that lie in other files."""
    tensors = external(model)
    require_beside(path, tensors)
    try:
        read_beside(path, tensors)
    except Exception as error:  # whatever onnx raises for data that is cut off
        raise _damaged(path, error) from error


def external(model: onnx.ModelProto) -> list[External]:
    """The tensors that lie in other files, and what they say about the place: location, offset, length."""
    parts = [model.graph, *model.functions]
    return [
        (each, {entry.key: entry.value for entry in each.external_data})
        for each in [*model.graph.initializer, *(one for part in parts for one in _tensors(part))]
        if external_data_helper.uses_external_data(each)
    ]


def _tensors(part: onnx.GraphProto | onnx.FunctionProto) -> Iterator[TensorProto]:
    """The tensors in the nodes of a graph or function, and in graphs in those."""
    for node in part.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from graph.initializer
                yield from _tensors(graph)


def require_beside(path: Path, tensors: Iterable[External]) -> None:
    """Raise InputError where one of the `tensors` of the file at `path` is not in a plain file of the same folder."""
    for tensor, place in tensors:
        _require_beside(path, tensor, place)


def _require_beside(path: Path, tensor: TensorProto, place: Mapping[str, str]) -> None:
    location = place.get("location", "")
    folder = path.resolve().parent  # where a link leads to: that is where the data was written
    file = folder / location
    if not location or Path(location).is_absolute() or not file.resolve().is_relative_to(folder) or file.is_symlink():
        raise InputError(f"{path} keeps '{tensor.name}' in '{location}', outside its folder: it is not read from there")
    if not file.is_file():
        raise InputError(f"{path} keeps '{tensor.name}' in {file}, which is not there: copy both files together")
    try:
        end = int(place.get("offset", 0)) + int(place.get("length", 0))
    except ValueError as error:
        raise InputError(f"{path} does not say where in {file} '{tensor.name}' is: write it again") from error
    if end > file.stat().st_size:
        raise InputError(f"{file} is too short for '{tensor.name}' of {path}: copy it again")


def read_beside(path: Path, tensors: Iterable[External]) -> None:
    """Put the data of `tensors`, which `require_beside` has seen, into the model of the file at `path`."""
    for tensor, _ in tensors:
        external_data_helper.load_external_data_for_tensor(tensor, str(path.resolve().parent))
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def tensor_of(proto: TensorProto) -> Tensor:
    """A tensor of the file: of 16 bits as float32.

    Raises ValueError for data that is shorter than its shape, and for kinds that torch does not have.
    """
    try:
        array = numpy_helper.to_array(proto)
    except KeyError as error:
        raise ValueError(f"onnx has no type of tensors with the number {error}") from error
    if proto.data_type in HALVES:
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array, copy=True))
