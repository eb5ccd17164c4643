"""As little text as says the same: at few bits the text of a small network's graph is more than its codes.

A coded weight keeps its name, on the value that its layer reads. What belongs to a layer is called by a letter and the
layer's number, in the order of the graph; every other value by a number; nodes have no names. What runtimes infer or
take for granted is left out: types and shapes between input and output, attributes at their defaults.
"""

from collections.abc import Iterator, Set
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto

# The last part of an initializer's name before, and its letter after.
LETTERS = {
    "codes": "c",
    "high": "h",  # bits of 3-bit codes
    "low": "l",
    "lut": "t",
    "offset": "o",
    "scale": "s",
    "zero_point": "z",
    "bias": "b",
    "lowest": "f",  # code of an activation below 8 bits, and highest
    "highest": "g",
}
CODES = ("c", "h", "l")
SHARED = {"shape": "d", "every": "e", "step": "p"}  # the first part of a name that no layer owns
MADE_BY_TORCH = "val_"  # constants of its exporter's own

ONES, ZEROS = object(), object()
POOLS = ("AveragePool", "MaxPool")
DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Conv", *POOLS), {"auto_pad": "NOTSET", "dilations": ONES, "pads": ZEROS, "strides": ONES}),
    "Gather": {"axis": 0},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0},
}


def shorten(model: ir.Model, weights: Set[str]) -> None:
    """Cut the text of `model`'s graph; in place. `weights` are the values that keep their names.

    The same names for the same graph. In a network without coded weights the initializers keep theirs.
    """
    graph = model.graph
    nodes = list(ir.traversal.RecursiveGraphIterator(graph))
    for node in nodes:
        node.name = ""
        node.metadata_props.clear()
        node.doc_string = None
        for name in [name for name, attribute in node.attributes.items() if _is_default(node, name, attribute.value)]:
            del node.attributes[name]
        for output in node.outputs:
            output.metadata_props.clear()
            if not output.is_graph_output():
                output.type, output.shape = None, None
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for value in graph.initializers.values():
        value.type, value.shape = None, None  # the tensor has them
    if weights:
        _rename_initializers(graph)
    values = [value for node in nodes for value in node.outputs]
    numbers = (str(number) for number in range(len(values) + len(graph.initializers)))
    free = (number for number in numbers if number not in graph.initializers)
    for value in values:
        if not value.is_graph_output() and value.name not in weights:
            value.name = next(free)


def shorten_integers(file: onnx.ModelProto) -> None:
    """Write what shapes and the like hold as numbers of varying length, where that is shorter; in place."""
    for tensor in file.graph.initializer:
        if tensor.data_type not in (TensorProto.INT64, TensorProto.INT32):
            continue
        short = TensorProto(dims=tensor.dims, data_type=tensor.data_type, name=tensor.name)
        values = onnx.numpy_helper.to_array(tensor).reshape(-1).tolist()
        (short.int64_data if tensor.data_type == TensorProto.INT64 else short.int32_data).extend(values)
        if short.ByteSize() < tensor.ByteSize():
            tensor.CopyFrom(short)


def letter(name: str) -> str:
    """What an initializer of a coded network is, as the values of LETTERS; empty for one that kept its name."""
    first = name[:1]
    return first if first in LETTERS.values() and name[1:].isdecimal() else ""


def _rename_initializers(graph: ir.Graph) -> None:
    owners: dict[str, int] = {}
    shared = dict.fromkeys(SHARED, 0)
    for value in list(_in_order(graph)):
        name = value.name or ""
        owner, _, kind = name.rpartition(".")
        first = name.partition(".")[0]
        if first in SHARED:
            shared[first] += 1
            own = f"{SHARED[first]}{shared[first] - 1}"
        elif first.startswith(MADE_BY_TORCH):
            shared["shape"] += 1
            own = f"d{shared['shape'] - 1}"
        elif kind in LETTERS and owner:
            owner = owner.removesuffix(".weight")
            own = f"{LETTERS[kind]}{owners.setdefault(owner, len(owners))}"
        else:
            continue
        graph.initializers.pop(name)
        value.name = own
        graph.initializers[own] = value


def _in_order(graph: ir.Graph) -> Iterator[ir.Value]:
    """The initializers, as nodes first read them."""
    seen = set()
    for node in graph:
        for value in node.inputs:
            if value is not None and value.name in graph.initializers and value.name not in seen:
                seen.add(value.name)
                yield value


def _is_default(node: ir.Node, name: str, value: Any) -> bool:
    if node.op_type == "Conv" and name == "kernel_shape":  # the weight's
        return True
    if node.op_type == "Conv" and name == "group":
        return bool(value == 1)
    default = DEFAULTS.get(node.op_type, {}).get(name, ...)
    if default in (ONES, ZEROS):
        return all(one == (default is ONES) for one in value)
    return bool(default == value)
