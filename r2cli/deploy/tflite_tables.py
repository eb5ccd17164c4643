"""Functions of one value between two grids, such as GELU, as a table of 256 codes: what ONNX Runtime gives for each.

TensorFlow Lite has kernels of its own for some functions, which round otherwise; a table is the function itself, and
so is any function that ONNX can write.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, TensorProto, helper

from r2cli.deploy import runtime, tflite_lines
from r2cli.deploy.tflite_sheet import Array, HeldValue, LiteSheet

# Operators of one value, or of one and numbers.
POINTWISE = frozenset(
    "Abs Add Ceil Celu Clip Cos Div Elu Erf Exp Floor HardSigmoid HardSwish LeakyRelu Log Max Min Mul Neg Pow "
    "Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Sqrt Sub Tanh".split()
)
NATIVE = frozenset("Add Clip Mul Relu Sigmoid".split())  # those that have integer kernels, alone between two grids
LOWEST, CODES = -128, 256


@dataclass
class Tables:
    """The functions of a graph: for each QuantizeLinear's output its `chain`, and the nodes that only those read."""

    chains: Mapping[str, "Chain"] = field(default_factory=dict)
    covered: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Chain:
    """The nodes between the codes `source` and the QuantizeLinear `end`."""

    source: str
    end: NodeProto
    nodes: tuple[NodeProto, ...]


def find(lite: LiteSheet) -> Tables:
    chains = {}
    for node in lite.graph.node:
        own = _chain(lite, node) if node.op_type == "QuantizeLinear" else None
        if own is not None:
            chains[node.output[0]] = own
    nodes = [node for chain in chains.values() for node in chain.nodes if node.op_type != "DequantizeLinear"]
    inside = {node.output[0] for node in nodes}
    covered: set[str] = set()
    for node in reversed(lite.graph.node):
        readers = lite.readers.get(node.output[0], [])
        if node.output[0] in inside and all(each.output[0] in covered | chains.keys() for each in readers):
            covered.add(node.output[0])
    return Tables(chains, frozenset(covered))


def _chain(lite: LiteSheet, end: NodeProto) -> Chain | None:
    """What computes the values that `end` rounds from one value on a grid, where no integer kernel does."""
    found: dict[str, NodeProto] = {}
    sources = set()
    todo = [end.input[0]]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        if name in lite.constants:
            if lite.constants[name].size != 1:
                return None
            continue
        node = lite.makers.get(name)
        if node is None:
            return None
        if node.op_type not in POINTWISE and node.op_type != "DequantizeLinear":
            return None
        found[name] = node
        if node.op_type == "DequantizeLinear" and node.input[0] not in lite.constants:
            sources.add(node.input[0])
        else:
            todo += [each for each in node.input if each]
    computing = [node for node in found.values() if node.op_type != "DequantizeLinear"]
    if len(sources) != 1 or not computing or _is_native(lite, computing):
        return None
    order = [node for node in lite.graph.node if node.output[0] in found]
    return Chain(sources.pop(), end, tuple(order))


def _is_native(lite: LiteSheet, computing: list[NodeProto]) -> bool:
    first = [node for node in computing if node.op_type not in ("Relu", "Clip")] or computing[:1]
    floats = any(name in lite.constants for node in first if node.op_type in ("Add", "Mul") for name in node.input)
    return len(first) == 1 and first[0].op_type in NATIVE and not floats


def write(lite: LiteSheet, chain: Chain) -> None:
    """Look the codes of the source up: TensorFlow Lite counts places from 0, so 128 is added to them."""
    x, name = lite.codes(chain.source), chain.end.output[0]
    added = _added(lite, chain)
    if added is not None:  # a sum with a number is a line, which accelerators have
        grid = lite.parameters(chain.end)
        lite.values[name] = tflite_lines.line(lite, x, grid, grid, added, name)
        return
    content = _content(lite, chain)
    grid = lite.parameters(chain.end)
    table = lite.writer.tensor(f"{name}.table", content.shape, grid, content)
    sizes = [x.shape[axis] for axis in x.order]
    wide, places = (lite.writer.typed(f"{name}.{what}", sizes, "int32") for what in ("wide", "places"))
    lite.writer.operator("CAST", [x.tensor], [wide], "Cast", inDataType=9, outDataType=2)
    lite.writer.operator("ADD", [wide, lite.writer.ints([-LOWEST])], [places], "Add", fusedActivationFunction=0)
    found = lite.made(name, x.shape, grid, x.order)
    lite.writer.operator("GATHER", [table, places], [found.tensor], "Gather", axis=0)
    lite.values[name] = HeldValue(found.tensor, x.shape, grid, x.order)


def _added(lite: LiteSheet, chain: Chain) -> float | None:
    """The number that is added, where the function is no more than that."""
    computing = [node for node in chain.nodes if node.op_type != "DequantizeLinear"]
    numbers = [name for node in computing for name in node.input if name in lite.constants]
    is_sum = [node.op_type for node in computing] == ["Add"] and len(numbers) == 1
    return float(lite.constants[numbers[0]].reshape(())) if is_sum else None


def _content(lite: LiteSheet, chain: Chain) -> Array:
    """The code that ONNX Runtime gives for each code of the source."""
    nodes = [*chain.nodes, chain.end]
    read = {name for node in nodes for name in node.input}
    held = [each for each in lite.graph.initializer if each.name in read]
    given = helper.make_tensor_value_info(chain.source, TensorProto.INT8, [CODES])
    result = helper.make_tensor_value_info(chain.end.output[0], TensorProto.INT8, [CODES])
    graph = helper.make_graph(nodes, "table", [given], [result], held)
    model = helper.make_model(graph, opset_imports=lite.model.opset_import, ir_version=lite.model.ir_version)
    session = runtime.session(model.SerializeToString(), optimise=False)
    codes = np.arange(LOWEST, LOWEST + CODES, dtype=np.int8)
    found: Array = session.run(None, {chain.source: codes})[0]
    return found
