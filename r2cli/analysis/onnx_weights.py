"""The weights of any .onnx file: float initializers as they are, integer ones as ONNX Runtime decodes them.

Whatever a layer reads that is computed from constants alone (dequantized, unpacked, looked up, transposed) is run, so
that packed weights come out as their values, whoever wrote the file. Output channels are put first.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from r2cli.analysis.layer_table import OtherTensor
from r2cli.deploy import runtime, weight_roles
from r2cli.storage.stream import Stored, from_memory

# Which input of each operator is the weight.
WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


def of_onnx(path: Path) -> tuple[list[Stored], list[Stored], list[OtherTensor]]:
    """The weights that are decoded from integers, the float initializers, and the initializers that are neither.

    Raises InputError where the file is no valid model or ONNX Runtime cannot decode it.
    """
    file = runtime.read(path)
    initializers = {each.name: each for each in file.graph.initializer}
    weights = dict(_weights(file))
    above = weight_roles.sources(file)
    given = {value.name for value in file.graph.input} - set(initializers)
    computed = [name for name in weights if name in above and not given & {name, *above[name]}]
    arrays = runtime.run_constants(file, dict.fromkeys(computed)) if computed else []
    decoded = []
    for name, array in zip(computed, arrays, strict=True):
        values = _channels_first(torch.from_numpy(np.asarray(array, dtype=np.float32)), weights[name])
        decoded.append(from_memory(name, values, str(path)))
    parts = {name for value in computed for name in above[value]}
    floats, others = [], []
    for name, each in initializers.items():
        kind = TensorProto.DataType.Name(each.data_type).lower()
        if name in parts:
            others.append(OtherTensor(name, tuple(each.dims), kind, "part of a decoded weight"))
        elif each.data_type not in FLOATS:
            others.append(OtherTensor(name, tuple(each.dims), kind, "integers"))
        else:
            values = _to_tensor(each)
            floats.append(
                from_memory(name, _channels_first(values, weights[name]) if name in weights else values, str(path))
            )
    return decoded, floats, others


def _weights(file: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """Return the names of values that layers read as weights, each with a layer that reads it."""
    for node in file.graph.node:
        place = WEIGHT_INPUT.get(node.op_type)
        if place is not None and len(node.input) > place:
            yield node.input[place], node


def _channels_first(values: Tensor, node: onnx.NodeProto) -> Tensor:
    """Return the weight as (output channels, ...). In MatMul, and Gemm without transB, the output channels are last."""
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return values.T if node.op_type in ("MatMul", "Gemm") and values.ndim == 2 and not transposed else values


def _to_tensor(initializer: TensorProto) -> Tensor:
    array = numpy_helper.to_array(initializer)
    if initializer.data_type == TensorProto.BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
