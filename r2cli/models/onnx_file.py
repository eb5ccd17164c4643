"""Open an ONNX file of someone else's: what is there is checked before it is read."""

from collections.abc import Iterator
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
    _load_external_data(path, model)
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


def _load_external_data(path: Path, model: onnx.ModelProto) -> None:
    """Read the tensors that stand in other files, which must be in the folder of the model."""
    folder = path.resolve().parent
    for tensor in _tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        where = next((each.value for each in tensor.external_data if each.key == "location"), "")
        file = (folder / where).resolve()
        if not where or not file.is_relative_to(folder):
            raise InputError(f"{path}: the data of '{tensor.name}' stands outside its folder ({where}): save it again")
        if not file.is_file():
            raise InputError(f"{path}: the data of '{tensor.name}' is missing: put {where} beside it")
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except Exception as error:  # whatever onnx raises for data that is cut off
            raise _damaged(path, error) from error
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)


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
