"""What an ONNX file computes in float between its integers: found in the file itself, not asked of the exporter.

A value is on a grid where a DequantizeLinear makes it, also behind what only moves values. An operation runs on
integers where all that it reads is on grids and what it gives is rounded at once; a layer, where all that it reads is.
"""

from collections import Counter

import onnx

MOVING = {
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Gather",
    "Expand",
    "MaxPool",
    "Pad",
    "Tile",
    "Identity",
    "DepthToSpace",
    "SpaceToDepth",
}
CLIPPING = {"Relu", "Clip", "Min"}  # with constants: fused into what is before them
LAYERS = {"Conv", "Gemm", "MatMul"}
INTEGER = {"Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "GlobalAveragePool", "AveragePool"}


def moves(node: onnx.NodeProto) -> bool:
    """Whether a node only moves, copies or picks values: a Resize does so by the nearest neighbour."""
    if node.op_type == "Resize":
        return all(each.s == b"nearest" for each in node.attribute if each.name == "mode")
    return node.op_type in MOVING


def operators(file: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each operator compute in float; those that give constants, shapes or codes do not count.

    A layer that reads floats is counted as 'layer Conv', 'layer Gemm' or 'layer MatMul'.
    """
    typed = onnx.shape_inference.infer_shapes(file)
    known = {each.name: each.type.tensor_type.elem_type for each in [*typed.graph.value_info, *typed.graph.output]}
    constants = {each.name for each in file.graph.initializer}
    on_grid: set[str] = set()
    rounded = _rounded(file)
    products: set[str] = set()  # of layers whose bias is added behind them
    found: Counter[str] = Counter()
    for node in file.graph.node:
        read = [name for name in node.input if name]
        outputs = list(node.output)
        if all(name in constants for name in read):
            constants.update(outputs)
            if node.op_type == "DequantizeLinear":
                on_grid.update(outputs)
        elif node.op_type == "DequantizeLinear" or (moves(node) and read[0] in on_grid):
            on_grid.update(outputs)
        elif known.get(outputs[0]) != onnx.TensorProto.FLOAT or moves(node) or node.op_type == "Cast":
            continue
        elif _clips(node, constants) and (rounded[outputs[0]] or read[0] in products):
            products.update(outputs)
        elif node.op_type in LAYERS and read[1] in constants:
            products.update(outputs)
            found[f"layer {node.op_type}"] += read[0] not in on_grid
        elif node.op_type == "Add" and any(n in products for n in read) and any(n in constants for n in read):
            products.update(outputs)
        elif node.op_type in INTEGER and rounded[outputs[0]] and all(n in on_grid for n in read):
            continue
        else:
            found[node.op_type] += 1
    return +found


def _clips(node: onnx.NodeProto, constants: set[str]) -> bool:
    return node.op_type in CLIPPING and all(name in constants for name in node.input[1:] if name)


def _rounded(file: onnx.ModelProto) -> dict[str, bool]:
    """For every value, whether all that reads it rounds it, behind a ReLU perhaps."""
    found = {name: True for node in file.graph.node for name in node.output}
    read, constants = set[str](), {each.name for each in file.graph.initializer}
    for node in reversed(file.graph.node):
        for name in filter(None, node.input):
            fits = node.op_type == "QuantizeLinear" or (_clips(node, constants) and found[node.output[0]])
            found[name] = found.get(name, True) and fits
            read.add(name)
    return {name: fits and name in read for name, fits in found.items()}
