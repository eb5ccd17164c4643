"""Which constants of an ONNX file are weights: told by the operators that read them, never by names.

What a convolution, a product of matrices, a recurrent layer or a lookup multiplies or picks from is a weight. Biases,
scales and norms' parameters have one long axis and are none; a constant of two long axes that some other operator
reads is taken for a weight too, unless that operator only adds or joins it, as it does with positions and masks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from torch import Tensor

INTEGERS = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
BITS: Mapping[int, int] = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT: 32, TensorProto.DOUBLE: 64}

# The inputs that are weights, whatever their shape: of float operators, and of those that take the codes themselves.
LAYERS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "DeformConv", "Attention", "FusedConv"), (1,)),
    **dict.fromkeys(("Gemm", "MatMul", "Einsum", "FusedMatMul", "FusedGemm"), (0, 1)),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), (1, 2)),
    **dict.fromkeys(("ConvInteger", "MatMulNBits", "MatMulBnb4", "QAttention", "DynamicQuantizeMatMul"), (1,)),
    **dict.fromkeys(("MatMulInteger", "MatMulIntegerToFloat"), (0, 1)),
    **dict.fromkeys(("QLinearMatMul", "QGemm"), (0, 3)),
    "QLinearConv": (3,),
}
# Codes of embeddings are a choice: those in float are listed.
LISTED: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Gather", "GatherND", "GatherElements", "GatherBlockQuantized"), (0,)),
    **dict.fromkeys(("EmbedLayerNormalization", "QEmbedLayerNormalization"), (2, 3, 4)),
}
ADDING = ("Add", "Sub", "Where", "Concat", "Expand", "Pad")


@dataclass(frozen=True)
class FloatWeight:
    """A float initializer that is a weight, or part of one: the operator that reads it, and its bytes."""

    name: str
    operator: str
    bytes: int


def constants(file: onnx.ModelProto) -> dict[str, TensorProto]:
    """The constants of an inlined file by name: initializers, and what nodes of kind Constant give."""
    found = {each.name: each for each in file.graph.initializer}
    for node in file.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def sources(file: onnx.ModelProto) -> dict[str, list[str]]:
    """For every value: the values that it is made from, however far up, in the file's order of nodes."""
    above: dict[str, list[str]] = {}
    for node in file.graph.node:
        read = (*node.input, *captured(node))
        own = list(dict.fromkeys(v for used in read if used for v in (used, *above.get(used, []))))
        above |= dict.fromkeys(node.output, own)
    return above


def captured(node: onnx.NodeProto) -> list[str]:
    """What the graphs within a node read of the graph around it, an If's branches for example."""
    inner = [graph for each in node.attribute for graph in (each.g, *each.graphs) if graph.node]
    found = []
    for graph in inner:
        own = {each.name for each in (*graph.input, *graph.initializer)}
        own |= {name for each in graph.node for name in each.output}
        found += [name for each in graph.node for name in (*each.input, *captured(each)) if name and name not in own]
        found += [each.name for each in graph.output if each.name not in own]
    return found


def codes(file: onnx.ModelProto, name: str) -> list[TensorProto]:
    """The initializers that hold the codes of the weight that is the value `name`: what is decoded, looked up, or put
    together to make it, and neither a scale nor a table. Planes stand in the order in which they are added."""
    made = {value: node for node in file.graph.node for value in node.output}
    held = constants(file)
    found: list[TensorProto] = []
    todo = [name]
    while todo:
        value = todo.pop(0)
        if value in held:
            found.append(held[value])
            continue
        node = made.get(value)
        if node is None:
            continue
        todo = [*_holding(node, held), *todo]
    return found


def _holding(node: onnx.NodeProto, held: Mapping[str, TensorProto]) -> list[str]:
    """Which inputs of a node, on the way to a weight, hold its codes: no scale, no zero point, no table."""
    if node.op_type == "Gather":
        picks = held.get(node.input[1])
        # A lookup's codes are its indices, which are computed from bytes; constant indices pick rows of the weight.
        place = 0 if picks is not None and picks.data_type not in INTEGERS else 1
        return [node.input[place]]
    if node.op_type == "Concat":
        return list(node.input)
    if node.op_type in ("Add", "Mul"):
        # Planes are added to each other; a constant beside is an offset or a scale.
        computed = [name for name in node.input if name not in held]
        return computed if node.op_type == "Add" else computed[:1] or [node.input[0]]
    return list(node.input[:1])


def size(tensor: TensorProto) -> int:
    """Bytes of a tensor's values."""
    bits = BITS.get(tensor.data_type, 16 if tensor.data_type in FLOATS else 8)
    return (int(prod(tensor.dims)) * bits + 7) // 8


def of(file: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str, list[str], bool]]:
    """Each weight that a node on data reads: the node, the value, the constants it is made of, and whether the node
    only adds it."""
    held, above = constants(file), sources(file)
    given = {each.name for each in file.graph.input} - set(held)
    fixed = {name for name, own in above.items() if given.isdisjoint(own) and name not in given} | set(held)
    for node in file.graph.node:
        if all(name in fixed for name in node.input if name):
            continue
        for place, name in enumerate(node.input):
            if name not in fixed:
                continue
            leaves = [part for part in (name, *above.get(name, [])) if part in held]
            role = LAYERS.get(node.op_type, LISTED.get(node.op_type))
            if node.op_type == "Einsum" or (role is not None and place in role):
                yield node, name, leaves, False
            elif role is None and any(_is_matrix(held[part]) and held[part].data_type in FLOATS for part in leaves):
                yield node, name, leaves, node.op_type in ADDING


def _is_matrix(tensor: TensorProto) -> bool:
    return len([length for length in tensor.dims if length > 1]) > 1


def unaccounted(value: np.ndarray[Any, Any], floats: Mapping[str, Tensor]) -> bool:
    """Whether a constant is no tensor among `floats`, nor picked or joined from one, nor a mask of two values."""
    own = [tensor.numpy() for tensor in floats.values() if tensor.is_floating_point() and tensor.ndim]
    if any(each.size == value.size and np.array_equal(each.reshape(-1), value.reshape(-1)) for each in own):
        return False
    if len(np.unique(value.reshape(-1)[:10000])) <= 2 and len(np.unique(value)) <= 2:
        return False
    if any(np.isin(value, each).all() for each in own):
        return False
    return not bool(np.isin(value, np.concatenate([each.reshape(-1) for each in own] or [np.zeros(0)])).all())


def beside(written: onnx.ModelProto, file: onnx.ModelProto) -> list[str]:
    """What a file as `written`, and inlined as `file`, holds that its result does not come from, in words."""
    above = sources(file)
    read = {name for out in file.graph.output for name in (out.name, *above.get(out.name, []))}
    found = [f"the initializer {each.name} ({size(each):,} bytes)" for each in file.graph.initializer]
    dead = [text for text, each in zip(found, file.graph.initializer, strict=True) if each.name not in read]
    dead += [f"the node of {n.op_type} that makes {n.output[0]}" for n in file.graph.node if read.isdisjoint(n.output)]
    bodies = [node for function in written.functions for node in function.node]
    called = {(node.domain, node.op_type) for node in (*written.graph.node, *bodies)}
    dead += [f"the function {each.name}" for each in written.functions if (each.domain, each.name) not in called]
    dead += [f"the sparse initializer {each.values.name}" for each in written.graph.sparse_initializer]
    for node in (*written.graph.node, *bodies):
        for attribute in node.attribute:
            if attribute.g.initializer or attribute.graphs:
                dead.append(f"a graph within the node of {node.op_type}")
    return dead + (["a training graph"] if written.training_info else [])
