"""Make an ONNX file smaller: short names, and no text that runtimes infer.

In a small network of few bits the text of the graph would take more bytes than the codes. A quantized weight keeps its
name: it is the name of the value that its layer reads. The parts of a layer are named by a letter and the number of the
layer, in the order of the graph. All other values are named by numbers, and nodes have no names. Types and shapes of
values inside the graph, and attributes at their defaults, are left out.
"""

from collections.abc import Iterator, Set
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto

# The letter that replaces the last part of an initializer's name.
LETTERS = {
    "codes": "c",
    "high": "h",  # the plane of the highest bits of 3-bit codes
    "low": "l",  # the plane of their lower two bits
    "lut": "t",
    "offset": "o",
    "scale": "s",
    "zero_point": "z",
    "bias": "b",
    "lowest": "f",  # the bounds of an activation's codes, below 8 bits
    "highest": "g",
}
CODES = ("c", "h", "l")
SHARED = {"shape": "d", "every": "e", "step": "p"}  # letters for initializers that layers share, by their first part
MADE_BY_TORCH = "val_"  # how the names of constants begin that torch's exporter makes

ONES, ZEROS = object(), object()  # stand for a list of ones or zeros of any length
POOLS = ("AveragePool", "MaxPool")
DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Conv", *POOLS), {"auto_pad": "NOTSET", "dilations": ONES, "pads": ZEROS, "strides": ONES}),
    "Gather": {"axis": 0},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0},
}


def shorten(model: ir.Model, weights: Set[str]) -> None:
    """Shorten the text of the graph of `model`, in place. The values `weights` keep their names.

    Equal graphs get equal names. In a network without quantized weights the initializers keep their names.
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
        value.type, value.shape = None, None  # the tensor states them too
    if weights:
        _rename_initializers(graph)
    values = [value for node in nodes for value in node.outputs]
    numbers = (str(number) for number in range(len(values) + len(graph.initializers)))
    free = (number for number in numbers if number not in graph.initializers)
    for value in values:
        if not value.is_graph_output() and value.name not in weights:
            value.name = next(free)


def shorten_integers(file: onnx.ModelProto) -> None:
    """Write integer tensors, such as shapes, as protobuf's variable-length numbers where that is shorter; in place."""
    for tensor in file.graph.initializer:
        if tensor.data_type not in (TensorProto.INT64, TensorProto.INT32):
            continue
        short = TensorProto(dims=tensor.dims, data_type=tensor.data_type, name=tensor.name)
        values = onnx.numpy_helper.to_array(tensor).reshape(-1).tolist()
        (short.int64_data if tensor.data_type == TensorProto.INT64 else short.int32_data).extend(values)
        if short.ByteSize() < tensor.ByteSize():
            tensor.CopyFrom(short)


def letter(name: str) -> str:
    """Return the letter of LETTERS in the name of an initializer, or an empty text if it kept its name."""
    first = name[:1]
    return first if first in LETTERS.values() and name[1:].isdecimal() else ""


def _rename_initializers(graph: ir.Graph) -> None:
    """Give the initializers short names, in place."""
    owners: dict[str, int] = {}
    shared = dict.fromkeys(SHARED, 0)
    for value in list(_in_order(graph)):
        name = value.name or ""
        owner, _, kind = name.rpartition(".")
        first = name.partition(".")[0]
        if first in SHARED:
            shared[first] += 1
            short = f"{SHARED[first]}{shared[first] - 1}"
        elif first.startswith(MADE_BY_TORCH):
            shared["shape"] += 1
            short = f"d{shared['shape'] - 1}"
        elif kind in LETTERS and owner:
            owner = owner.removesuffix(".weight")
            short = f"{LETTERS[kind]}{owners.setdefault(owner, len(owners))}"
        else:
            continue
        graph.initializers.pop(name)
        value.name = short
        graph.initializers[short] = value


def _in_order(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the initializers in the order in which nodes first read them."""
    yielded = set()
    for node in graph:
        for value in node.inputs:
            if value is not None and value.name in graph.initializers and value.name not in yielded:
                yielded.add(value.name)
                yield value


def _is_default(node: ir.Node, name: str, value: Any) -> bool:
    """Say whether runtimes assume this value of the attribute `name` if it is missing."""
    if node.op_type == "Conv" and name == "kernel_shape":  # the shape of the weight says it
        return True
    if node.op_type == "Conv" and name == "group":
        return bool(value == 1)
    default = DEFAULTS.get(node.op_type, {}).get(name, ...)
    if default in (ONES, ZEROS):
        return all(one == (default is ONES) for one in value)
    return bool(default == value)
