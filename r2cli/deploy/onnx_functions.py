"""Make an ONNX file smaller: nodes that many layers repeat become a function (ONNX's `FunctionProto`) and its calls.

This is done twice: for the nodes that compute a weight from its codes, and then for each layer with all nodes that only
it reads, up to the grid of its output. The bodies hold standard operators. Runtimes replace the calls by the bodies
when they load the file, as `inline` does here, so nothing is slower. The call of a function with a weight has the name
of its layer; after inlining, the weight is `layer.weight` again.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import count
from string import ascii_letters

import onnx
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto

DOMAIN = "r"  # one letter, since every call repeats it
LAYERS = ("Conv", "Gemm", "MatMul")
VARYING = {"Conv": "group"}  # attributes that a call passes to its function, so that layers can differ in them
NARROW = (TensorProto.INT4, TensorProto.UINT4)  # ONNX Runtime does not accept these as inputs of functions
INTEGERS = (TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8, TensorProto.INT8)
SMALL = 64  # bytes; larger constants stay outside, because ONNX Runtime copies the body for every call


@dataclass(frozen=True)
class Region:
    """Nodes in the file's order. Only the outputs of the last are read outside. They compute `weight`, if given."""

    nodes: tuple[NodeProto, ...]
    weight: str | None = None

    @property
    def inputs(self) -> list[str]:
        """The values that the nodes read from outside, each once, in the order in which they are read."""
        made = {name for node in self.nodes for name in node.output}
        return list(dict.fromkeys(name for node in self.nodes for name in node.input if name and name not in made))


def outline(file: ModelProto, weights: Set[str]) -> None:
    """Replace equal regions by calls of a function where that saves bytes, in place.

    `weights` are the names of the quantized weights.
    """
    # The decoders first: then the regions of layers hold one call each in their place, and more of them are equal.
    _replace(file, _decoders(file, weights), weights)
    _replace(file, _layers(file, weights), weights)
    _renumber(file, weights)
    if file.functions:
        file.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


# --- regions that may be equal --------------------------------------------------------------------------------------


def _decoders(file: ModelProto, weights: Set[str]) -> Iterator[Region]:
    """Yield the nodes that compute each weight from its codes."""
    finder = _RegionFinder(file, weights, frozenset())
    for node in file.graph.node:
        if node.output[0] in weights:
            yield Region(finder.above(node))


def _layers(file: ModelProto, weights: Set[str]) -> Iterator[Region]:
    """Yield regions that cover all nodes: one for each layer, cut at its input and at the grid of its output."""
    constants = {tensor.name for tensor in file.graph.initializer}
    ends = set()
    for node in file.graph.node:
        if all(name in constants for name in node.input if name):
            constants.update(node.output)
        elif node.op_type == "DequantizeLinear":
            ends.add(node.output[0])
        elif node.op_type in LAYERS:
            ends.add(node.input[0])
    finder = _RegionFinder(file, weights, ends)
    taken: set[str] = set()
    for node in reversed(file.graph.node):
        if node.output[0] not in taken:
            nodes = finder.above(node)
            taken.update(part.output[0] for part in nodes)
            inside = [name for part in nodes for name in part.output if name in weights and name != node.output[0]]
            yield Region(nodes, inside[0] if inside else None)


class _RegionFinder:
    """Finds all nodes above a node that only it reads: up to the values `ends`, and with one weight at most."""

    def __init__(self, file: ModelProto, weights: Set[str], ends: Set[str]) -> None:
        self.position = {node.output[0]: index for index, node in enumerate(file.graph.node)}
        self.producer = {name: node for node in file.graph.node for name in node.output}
        self.readers = Counter(name for node in file.graph.node for name in node.input)
        self.readers.update(value.name for value in file.graph.output)
        narrow = {tensor.name for tensor in file.graph.initializer if tensor.data_type in NARROW}
        wide = {node.output[0] for node in file.graph.node if any(name in narrow for name in node.input)}
        self.weights, self.ends = weights, ends | wide

    def above(self, root: NodeProto) -> tuple[NodeProto, ...]:
        """Return the region that ends in `root`, in the file's order."""
        region, waiting, has_weight = [root], list(root.input), any(name in self.weights for name in root.input)
        for name in waiting:  # the list grows while it is read
            node = self.producer.get(name)
            if node is None or self.readers[name] > 1 or name in self.ends or len(node.output) > 1:
                continue
            reads_weight = any(used in self.weights for used in node.input)
            if reads_weight and has_weight:
                continue
            has_weight |= reads_weight
            region.append(node)
            waiting.extend(node.input)
        return tuple(sorted(region, key=lambda node: self.position[node.output[0]]))


# --- functions and calls -------------------------------------------------------------------------------------------


def _replace(file: ModelProto, regions: Iterable[Region], weights: Set[str]) -> None:
    """Add a function to the file for each group of equal regions, and replace the regions by calls; in place."""
    equal: dict[bytes, list[Region]] = defaultdict(list)
    for region in regions:
        equal[_body(region, {}).SerializeToString(deterministic=True)].append(region)
    constants = {tensor.name: tensor for tensor in file.graph.initializer}
    calls: dict[str, NodeProto | None] = {}
    for group in equal.values():
        common = _common(group, constants)
        function = _body(group[0], common)
        function.domain, function.name = DOMAIN, ascii_letters[len(file.functions)]
        group_calls = [_call(region, function.name, common) for region in group]
        # A protobuf message within another costs its bytes, and 2 or 3 for its tag and its length.
        before = sum(node.ByteSize() + 2 for region in group for node in region.nodes)
        if before <= sum(call.ByteSize() + 2 for call in group_calls) + function.ByteSize() + 3:
            continue
        file.functions.append(function)
        for region, call in zip(group, group_calls, strict=True):
            calls |= {node.output[0]: None for node in region.nodes}
            calls[call.output[0]] = call
    after = (calls.get(node.output[0], node) for node in file.graph.node)
    # Copies, because the nodes belong to the list that is cleared next.
    kept = [NodeProto.FromString(node.SerializeToString()) for node in after if node is not None]
    file.graph.ClearField("node")
    file.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    left = [tensor for tensor in file.graph.initializer if tensor.name in read]
    file.graph.ClearField("initializer")
    file.graph.initializer.extend(left)


def _common(group: list[Region], constants: Mapping[str, TensorProto]) -> dict[int, TensorProto]:
    """Return the small integer constants that all regions of a group read as the same input, by the input's index."""
    columns = zip(*(region.inputs for region in group), strict=True)
    same = {index: column[0] for index, column in enumerate(columns) if len(set(column)) == 1}
    return {
        index: constants[name]
        for index, name in same.items()
        if name in constants and constants[name].ByteSize() <= SMALL and constants[name].data_type in INTEGERS
    }


def _body(region: Region, common: Mapping[int, TensorProto]) -> FunctionProto:
    """Write a region as a function without a name. Regions whose functions have the same bytes are equal.

    Inputs are named by letters and other values by numbers; a weight is named by the last part of its name.
    """
    function = FunctionProto()
    function.opset_import.append(onnx.helper.make_opsetid("", 21))
    names = {"": ""}
    for index, name in enumerate(region.inputs):
        names[name] = ascii_letters[index]
        if index in common:
            constant = TensorProto()
            constant.CopyFrom(common[index])
            constant.ClearField("name")
            function.node.append(onnx.helper.make_node("Constant", [], [names[name]], value=constant))
        else:
            function.input.append(names[name])
    for original in region.nodes:
        node = function.node.add()
        node.CopyFrom(original)
        node.ClearField("name")
        for name in original.output:
            names[name] = _last_part(name) if name == region.weight else str(len(names))
        node.input[:], node.output[:] = [names[n] for n in original.input], [names[n] for n in original.output]
        for attribute in node.attribute:
            if attribute.name == VARYING.get(node.op_type):
                attribute.ClearField("i")
                attribute.ref_attr_name = attribute.name[0]
                function.attribute.append(attribute.ref_attr_name)
    function.output.extend(function.node[-1].output)
    if any(node.domain for node in function.node):
        function.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return function


def _renumber(file: ModelProto, weights: Set[str]) -> None:
    """Number the values of the graph from 0 again, in place: many are in functions now, and short names save bytes."""
    kept = {value.name for value in file.graph.output} | weights
    taken = {value.name for value in (*file.graph.initializer, *file.graph.input, *file.graph.output)}
    free = (name for number in count() if (name := str(number)) not in taken)
    names: dict[str, str] = {}
    for node in file.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        names |= {name: next(free) for name in node.output if name not in kept}
        node.output[:] = [names.get(name, name) for name in node.output]


def _call(region: Region, function: str, common: Mapping[int, TensorProto]) -> NodeProto:
    """Return the call of `function` that stands for a region."""
    inputs = [name for index, name in enumerate(region.inputs) if index not in common]
    call = NodeProto(op_type=function, domain=DOMAIN, input=inputs, output=region.nodes[-1].output)
    call.name = (region.weight or "").rpartition(".")[0]
    for node in region.nodes:
        for attribute in node.attribute:
            if attribute.name == VARYING.get(node.op_type):
                call.attribute.append(onnx.helper.make_attribute(attribute.name[0], attribute.i))
    if not call.name:  # protobuf writes a field that was set, even to an empty text
        call.ClearField("name")
    return call


def _last_part(weight: str) -> str:
    return weight.rpartition(".")[2]


# --- the way back ----------------------------------------------------------------------------------------------------


def inline(file: ModelProto) -> ModelProto:
    """Return `file` with the calls replaced by the bodies of their functions. Works for files of any program.

    A value in a body is named by the call, a dot, and its name in the body. Constants in bodies become initializers.
    """
    functions = {(function.domain, function.name): function for function in file.functions}
    if not file.functions:
        return file
    flat = ModelProto()
    flat.CopyFrom(file)
    flat.ClearField("functions")
    flat.ClearField("opset_import")
    domains = {domain for domain, _ in functions}
    flat.opset_import.extend(opset for opset in file.opset_import if opset.domain not in domains)
    for _ in functions:  # calls are nested at most as deep as there are functions: none calls itself
        nodes = [part for node in flat.graph.node for part in _inlined(node, functions)]
        flat.graph.ClearField("node")
        for node in nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                flat.graph.initializer.append(node.attribute[0].t)
                flat.graph.initializer[-1].name = node.output[0]
            else:
                flat.graph.node.append(node)
    return flat


def _inlined(node: NodeProto, functions: Mapping[tuple[str, str], FunctionProto]) -> Iterator[NodeProto]:
    """Yield the nodes that stand for `node`: the body of its function, or the node itself."""
    function = functions.get((node.domain, node.op_type))
    if function is None:
        yield node
        return
    names = {"": ""} | dict.fromkeys(function.input, "")  # an optional input that the call leaves out has an empty name
    names |= dict(zip(function.input, node.input)) | dict(zip(function.output, node.output))  # noqa: B905
    given = {attribute.name: attribute for attribute in (*function.attribute_proto, *node.attribute)}
    for inner in function.node:
        part = NodeProto()
        part.CopyFrom(inner)
        for name in inner.output:
            names.setdefault(name, f"{node.name or node.output[0]}.{name}")
        part.input[:], part.output[:] = [names[n] for n in inner.input], [names[n] for n in inner.output]
        part.ClearField("attribute")
        for attribute in inner.attribute:
            part.attribute.extend(_attribute(attribute, given))
        yield part


def _attribute(attribute: AttributeProto, given: Mapping[str, AttributeProto]) -> Iterator[AttributeProto]:
    """Yield an attribute of a node in a body, with the value from the call. Yields nothing if the call has no value."""
    if not attribute.ref_attr_name:
        yield attribute
    elif attribute.ref_attr_name in given:
        value = AttributeProto()
        value.CopyFrom(given[attribute.ref_attr_name])
        value.name = attribute.name
        yield value
