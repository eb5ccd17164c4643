"""Files in QOperator form, whose operators take codes, as float operators between grids."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from r2cli.deploy import weight_roles
from r2cli.deploy.float_nodes import moves


@dataclass(frozen=True)
class _Form:
    """Where an operator on codes has its inputs, each with its scale and zero point behind it, and its result's."""

    operator: str
    inputs: tuple[int, ...] = (0,)
    result: int = 3
    bias: int | None = None  # INT32, in units of both scales


_FORMS: Mapping[str, _Form] = {
    "QLinearConv": _Form("Conv", (0, 3), 6, 8),
    "QLinearMatMul": _Form("MatMul", (0, 3), 6),
    "QGemm": _Form("Gemm", (0, 3), 7, 6),
    "QLinearAdd": _Form("Add", (0, 3), 6),
    "QLinearMul": _Form("Mul", (0, 3), 6),
    **{
        f"QLinear{name}": _Form(name)
        for name in ("Sigmoid", "LeakyRelu", "Softmax", "ReduceMean", "AveragePool", "GlobalAveragePool")
    },
}
LAYOUT = ("channels_last", "opset")  # attributes that only the operators on codes have


def plain(file: onnx.ModelProto) -> onnx.ModelProto:
    """`file`, inlined, with float operators between grids in the place of operators on codes; else as it is."""
    held = weight_roles.constants(file)
    made = onnx.ModelProto()
    made.CopyFrom(file)
    made.graph.ClearField("node")
    grids: dict[str, list[str]] = {}  # scale and zero point of codes, by their name
    for node in file.graph.node:
        made.graph.node.extend(_moved(node, grids) or _written(node, held, made.graph))
        last = made.graph.node[-1]
        if last.op_type == "QuantizeLinear":
            grids[last.output[0]] = list(last.input[1:])
    return made


def _moved(node: NodeProto, grids: Mapping[str, list[str]]) -> list[NodeProto]:
    """What moves codes, a MaxPool for example, as the same between grids; nothing for another node."""
    if not moves(node) or node.input[0] not in grids:
        return []
    name, grid = node.output[0], grids[node.input[0]]
    own = NodeProto()
    own.CopyFrom(node)
    own.input[0], own.output[0] = f"{name}.read", f"{name}.result"
    return [
        helper.make_node("DequantizeLinear", [node.input[0], *grid], [own.input[0]]),
        own,
        helper.make_node("QuantizeLinear", [own.output[0], *grid], [name]),
    ]


def _written(node: NodeProto, held: Mapping[str, TensorProto], graph: onnx.GraphProto) -> Iterator[NodeProto]:
    given = list(node.input)
    form = _FORMS.get(node.op_type)
    if node.op_type == "QLinearConcat":
        form = _Form("Concat", tuple(range(2, len(given), 3)), 0)
    if form is None:
        yield node
        return
    name, read = node.output[0], []
    for place in form.inputs:
        read.append(f"{name}.read.{place}")
        axis = {"Conv": 0, "Gemm": 0 if _has(node, "transB") else 1}.get(form.operator, -1)
        yield helper.make_node("DequantizeLinear", given[place : place + 3], read[-1:], axis=axis)
    if form.bias is not None and len(given) > form.bias and given[form.bias]:
        scales = [numpy_helper.to_array(held[given[place + 1]]) for place in form.inputs]
        graph.initializer.append(
            numpy_helper.from_array((scales[0] * scales[1]).astype(np.float32), f"{name}.bias.scale")
        )
        read.append(f"{name}.bias")
        yield helper.make_node("DequantizeLinear", [given[form.bias], f"{name}.bias.scale"], read[-1:], axis=0)
    rounds = len(given) > form.result and given[form.result]
    result = f"{name}.result" if rounds else name
    own = helper.make_node(form.operator, read, [result])
    own.attribute.extend(each for each in node.attribute if each.name not in LAYOUT)
    yield own
    if rounds:
        yield helper.make_node("QuantizeLinear", [result, *given[form.result : form.result + 2]], [name])


def _has(node: NodeProto, name: str) -> bool:
    return any(each.name == name and each.i for each in node.attribute)
