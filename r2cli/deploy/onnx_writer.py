"""Write an ONNX graph: nodes in the order in which they run, each constant once, and the lowest opset that will do."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from r2cli.config.targets import MOST_OPSET
from r2cli.errors import InputError, R2Error

Array = np.ndarray[Any, Any]
# The lowest opset with all that r2 writes, but for the operators that say otherwise: any runtime since 2020 reads it.
OPSET = 13
# The oldest format of a file in which each opset may stand.
IR_VERSIONS = {13: 8, 14: 8, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10}
SINCE = {"LayerNormalization": 17}  # operators that no lower opset has
AXES_AS_INPUT = 18  # from this opset on, means and extremes read their axes
OF_CODES = ("QuantizeLinear", "Clip", "Min")  # what codes of activations come from
REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin")


class OnnxWriter:
    """A graph that grows node by node. Values are known by their names."""

    def __init__(self, most_opset: int = MOST_OPSET, opset: int | None = None) -> None:
        """`opset` is asked for, and `most_opset` is the greatest that the file may have."""
        self.most_opset, self.asked = most_opset, opset
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.opset, self._asker = OPSET, ""
        self._scope, self._counts = "", Counter[str]()
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._once: dict[tuple[str, tuple[str | None, ...], int], str] = {}

    def enter(self, scope: str) -> None:
        """Name what follows after `scope`: the first value `scope`.1, and so on, also where it comes again."""
        self._scope = scope

    def node(self, operator: str, inputs: Sequence[str | None], *, outputs: int = 1, **attributes: Any) -> str:
        """Add a node and return the name of its first value."""
        return self.several(operator, inputs, outputs, **attributes)[0]

    def several(self, operator: str, inputs: Sequence[str | None], outputs: int, **attributes: Any) -> list[str]:
        """Add a node with several `outputs` and return their names. An input may be None where it is optional."""
        names = [self._next() for _ in range(outputs)]
        read = ["" if name is None else name for name in inputs]
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(operator, read, names, **given))
        self.require(SINCE.get(operator, OPSET), operator)
        return names

    def once(self, operator: str, inputs: Sequence[str | None], axis: int) -> str:
        """As `node`, but for what was written before of the same inputs: then that value's name."""
        key = (operator, tuple(inputs), axis)
        if key not in self._once:
            self._once[key] = self.node(operator, inputs, axis=axis)
        return self._once[key]

    def require(self, opset: int, asker: str) -> None:
        """Let the file have `opset` at least, because of `asker`."""
        if opset > self.opset:
            self.opset, self._asker = opset, asker

    def _next(self) -> str:
        self._counts[self._scope] += 1
        return f"{self._scope}.{self._counts[self._scope]}"

    def made(self, name: str) -> onnx.NodeProto:
        """Return the node that gives the value `name`. Raises KeyError where none does."""
        for node in reversed(self.nodes):
            if name in node.output:
                return node
        raise KeyError(name)

    def rename(self, old: str, new: str) -> str:
        """Give a value that a node has made another name, and return it."""
        for node in reversed(self.nodes):  # what reads a value stands behind the node that makes it
            for names in (node.output, node.input):
                if old in names:
                    names[:] = [new if name == old else name for name in names]
            if new in node.output:
                node.name = new
                return new
        raise KeyError(old)

    def initializer(self, name: str, content: Array) -> str:
        """Add a constant under `name`, and return the name."""
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(content).reshape(content.shape), name)
        return name

    def add(self, tensor: TensorProto) -> str:
        """Add a constant of a type that NumPy lacks, and return its name."""
        self.initializers[tensor.name] = tensor
        return tensor.name

    def constant(self, content: Array | Sequence[float] | float, dtype: Any = None, kind: str = "constant") -> str:
        """Return the name of a constant that all share who need the same one.

        It is called after its `kind` and its values, where they are few.
        """
        values = np.asarray(content, dtype)
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self._shared:
            few = values.size <= 8
            told = "x".join(map(str, values.reshape(-1).tolist())) if few else str(len(self._shared))
            name = f"{kind}.{told}" if told else f"{kind}.empty"
            while name in self.initializers:  # the same numbers of another type
                name += f".{values.dtype}"
            self._shared[key] = self.initializer(name, values)
        return self._shared[key]

    def ints(self, values: Sequence[int]) -> str:
        """Return the name of a shared constant (n,) of INT64: a shape, axes, or bounds."""
        return self.constant(list(values), np.int64, "shape")

    def _opset(self) -> int:
        """The file's opset. Raises InputError where its operators and what is asked for exclude each other."""
        if self.opset > self.most_opset:
            raise InputError(
                f"{self._asker} exists from opset {self.opset} on, and the target reads {self.most_opset} at most: "
                "take another --target"
            )
        if self.asked is not None and self.asked < self.opset:
            raise InputError(f"{self._asker} exists from opset {self.opset} on: give --opset {self.opset} or more")
        if self.asked is not None and self.asked > self.most_opset:
            raise InputError(f"the target reads opset {self.most_opset} at most: give a lower --opset")
        return self.asked or self.opset

    def _give_axes(self, node: NodeProto) -> None:
        """Make the axes of a mean or an extreme its second input, in place."""
        own = next((each for each in node.attribute if each.name == "axes"), None)
        if node.op_type in REDUCTIONS and own is not None:
            node.input.append(self.ints(list(own.ints)))
            node.attribute.remove(own)

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        metadata: Mapping[str, str],
    ) -> onnx.ModelProto:
        """Return the finished file, with what goes into its `outputs` alone.

        Raises R2Error for an input or output that has the name of a constant.
        """
        for each in (*inputs, *outputs):
            if each.name in self.initializers:
                raise R2Error(
                    f"'{each.name}' is an input or output and a weight too: give one another name in its code"
                )
        needed, nodes = {each.name for each in outputs}, []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        opset = self._opset()
        if opset >= AXES_AS_INPUT:
            for node in nodes:
                self._give_axes(node)
            needed = {name for node in nodes for name in node.input}
        held = [tensor for name, tensor in self.initializers.items() if name in needed]
        graph = helper.make_graph(_read_once(nodes[::-1]), "r2", inputs, outputs, held)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=IR_VERSIONS[opset],
            producer_name="r2cli",
        )
        helper.set_model_props(model, dict(metadata))
        return model


def _read_once(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """The nodes, with a DequantizeLinear of its own for each that reads a value on a grid.

    OpenCV 5 drops a DequantizeLinear with the first of its readers that it turns to integers, and then fails at the
    next one. ONNX Runtime makes these copies itself.
    """
    made: dict[str, NodeProto] = {}
    readers: Counter[str] = Counter()
    found, codes = [], set[str]()
    for node in nodes:
        for name in dict.fromkeys(each for each in node.input if each in made):
            readers[name] += 1
            if readers[name] > 1:
                own = NodeProto()
                own.CopyFrom(made[name])
                own.output[0] = own.name = f"{name}.copy{readers[name]}"
                found.append(own)
                node.input[:] = [own.output[0] if each == name else each for each in node.input]
        if node.op_type in OF_CODES:
            codes.update(node.output)
        if node.op_type == "DequantizeLinear" and node.input[0] in codes:
            made[node.output[0]] = node
        found.append(node)
    return found
