"""What the layers of a network repeat, written once: functions of the model (ONNX's `FunctionProto`), and their calls.

First what makes a weight from its codes becomes a function, then a layer with all that it alone reads, up to the grid
of its output. Bodies are of standard operators; runtimes put them in place of the calls when they load, as `inline`
does here, so that nothing is slower. A call with a weight has the name of its layer, and the weight is `layer.weight`
again where it is inlined.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import count
from string import ascii_letters

import onnx
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto

DOMAIN = "r"
LAYERS = ("Conv", "Gemm", "MatMul")
VARYING = {"Conv": "group"}  # attributes of which a function leaves the value to its calls
NARROW = (TensorProto.INT4, TensorProto.UINT4)  # ONNX Runtime's functions do not take them: their Cast stays outside
INTEGERS = (TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8, TensorProto.INT8)
SMALL = 64  # bytes of a constant that may stand in a body: ONNX Runtime copies a body for every call


@dataclass(frozen=True)
class Region:
    """Nodes, in the file's order, of which only the last one's outputs are read outside; `weight` is made in them."""

    nodes: tuple[NodeProto, ...]
    weight: str | None = None

    @property
    def inputs(self) -> list[str]:
        made = {name for node in self.nodes for name in node.output}
        return list(dict.fromkeys(name for node in self.nodes for name in node.input if name and name not in made))


def outline(file: ModelProto, weights: Set[str]) -> None:
    """Put calls in place of what is alike, where that saves bytes; in place. `weights` are the coded ones' names."""
    _replace(file, _decoders(file, weights), weights)
    _replace(file, _layers(file, weights), weights)
    _renumber(file, weights)
    if file.functions:
        file.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


# --- what is alike -------------------------------------------------------------------------------------------------


def _decoders(file: ModelProto, weights: Set[str]) -> Iterator[Region]:
    """The nodes that make each weight."""
    grow = _Growth(file, weights, frozenset())
    for node in file.graph.node:
        if node.output[0] in weights:
            yield Region(grow.from_root(node))


def _layers(file: ModelProto, weights: Set[str]) -> Iterator[Region]:
    """All nodes, parted where a layer reads and where an activation has been put on its grid."""
    constants = {each.name for each in file.graph.initializer}
    ends = set()
    for node in file.graph.node:
        if all(name in constants for name in node.input if name):
            constants.update(node.output)
        elif node.op_type == "DequantizeLinear":
            ends.add(node.output[0])
        elif node.op_type in LAYERS:
            ends.add(node.input[0])
    grow = _Growth(file, weights, ends)
    taken: set[str] = set()
    for node in reversed(file.graph.node):
        if node.output[0] not in taken:
            nodes = grow.from_root(node)
            taken.update(each.output[0] for each in nodes)
            own = [name for each in nodes for name in each.output if name in weights and name != node.output[0]]
            yield Region(nodes, own[0] if own else None)


class _Growth:
    """Of a node, all above it that it alone reads, up to `ends`, and with one weight at most."""

    def __init__(self, file: ModelProto, weights: Set[str], ends: Set[str]) -> None:
        self.order = {node.output[0]: place for place, node in enumerate(file.graph.node)}
        self.producer = {name: node for node in file.graph.node for name in node.output}
        self.readers = Counter(name for node in file.graph.node for name in node.input)
        self.readers.update(value.name for value in file.graph.output)
        narrow = {each.name for each in file.graph.initializer if each.data_type in NARROW}
        wide = {node.output[0] for node in file.graph.node if any(name in narrow for name in node.input)}
        self.weights, self.ends = weights, ends | wide

    def from_root(self, root: NodeProto) -> tuple[NodeProto, ...]:
        found, waiting, has_weight = [root], list(root.input), any(name in self.weights for name in root.input)
        for name in waiting:
            node = self.producer.get(name)
            if node is None or self.readers[name] > 1 or name in self.ends or len(node.output) > 1:
                continue
            reads_weight = any(used in self.weights for used in node.input)
            if reads_weight and has_weight:
                continue
            has_weight |= reads_weight
            found.append(node)
            waiting.extend(node.input)
        return tuple(sorted(found, key=lambda node: self.order[node.output[0]]))


# --- functions and calls -------------------------------------------------------------------------------------------


def _replace(file: ModelProto, regions: Iterable[Region], weights: Set[str]) -> None:
    """Put a call in place of every region that is like others, and the function into the file."""
    alike: dict[bytes, list[Region]] = defaultdict(list)
    for region in regions:
        alike[_body(region, {}).SerializeToString(deterministic=True)].append(region)
    constants = {each.name: each for each in file.graph.initializer}
    calls: dict[str, NodeProto | None] = {}
    for group in alike.values():
        common = _common(group, constants)
        function = _body(group[0], common)
        function.domain, function.name = DOMAIN, ascii_letters[len(file.functions)]
        made = [_call(region, function.name, common) for region in group]
        flat = sum(node.ByteSize() + 2 for region in group for node in region.nodes)
        if flat <= sum(call.ByteSize() + 2 for call in made) + function.ByteSize() + 3:
            continue
        file.functions.append(function)
        for region, call in zip(group, made, strict=True):
            calls |= {node.output[0]: None for node in region.nodes}
            calls[call.output[0]] = call
    after = (calls.get(node.output[0], node) for node in file.graph.node)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in after if node is not None]
    file.graph.ClearField("node")
    file.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    left = [each for each in file.graph.initializer if each.name in read]
    file.graph.ClearField("initializer")
    file.graph.initializer.extend(left)


def _common(group: list[Region], constants: Mapping[str, TensorProto]) -> dict[int, TensorProto]:
    """The small integers that all regions of a group read at the same place of their inputs."""
    columns = zip(*(region.inputs for region in group), strict=True)
    same = {place: column[0] for place, column in enumerate(columns) if len(set(column)) == 1}
    return {
        place: constants[name]
        for place, name in same.items()
        if name in constants and constants[name].ByteSize() <= SMALL and constants[name].data_type in INTEGERS
    }


def _body(region: Region, common: Mapping[int, TensorProto]) -> FunctionProto:
    """A region as a function without a name: inputs by letters, what is between by numbers, a weight by its part.

    Regions with equal bodies are alike.
    """
    function = FunctionProto()
    function.opset_import.append(onnx.helper.make_opsetid("", 21))
    names = {"": ""}
    for place, name in enumerate(region.inputs):
        names[name] = ascii_letters[place]
        if place in common:
            held = TensorProto()
            held.CopyFrom(common[place])
            held.ClearField("name")
            function.node.append(onnx.helper.make_node("Constant", [], [names[name]], value=held))
        else:
            function.input.append(names[name])
    for given in region.nodes:
        node = function.node.add()
        node.CopyFrom(given)
        node.ClearField("name")
        for name in given.output:
            names[name] = _part(name) if name == region.weight else str(len(names))
        node.input[:], node.output[:] = [names[n] for n in given.input], [names[n] for n in given.output]
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
    """Number the values between calls again, after those that are in functions now."""
    kept = {value.name for value in file.graph.output} | weights
    taken = {each.name for each in (*file.graph.initializer, *file.graph.input, *file.graph.output)}
    free = (name for number in count() if (name := str(number)) not in taken)
    names: dict[str, str] = {}
    for node in file.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        names |= {name: next(free) for name in node.output if name not in kept}
        node.output[:] = [names.get(name, name) for name in node.output]


def _call(region: Region, function: str, common: Mapping[int, TensorProto]) -> NodeProto:
    inputs = [name for place, name in enumerate(region.inputs) if place not in common]
    call = NodeProto(op_type=function, domain=DOMAIN, input=inputs, output=region.nodes[-1].output)
    call.name = (region.weight or "").rpartition(".")[0]
    for node in region.nodes:
        for attribute in node.attribute:
            if attribute.name == VARYING.get(node.op_type):
                call.attribute.append(onnx.helper.make_attribute(attribute.name[0], attribute.i))
    if not call.name:
        call.ClearField("name")
    return call


def _part(weight: str) -> str:
    return weight.rpartition(".")[2]


# --- and back ------------------------------------------------------------------------------------------------------


def inline(file: ModelProto) -> ModelProto:
    """`file` with the bodies of its functions in place of their calls, whoever wrote it.

    What a call with a name makes inside is called by that name, a dot and its name in the body. Constants of bodies
    become initializers.
    """
    functions = {(each.domain, each.name): each for each in file.functions}
    if not file.functions:
        return file
    flat = ModelProto()
    flat.CopyFrom(file)
    flat.ClearField("functions")
    flat.ClearField("opset_import")
    own = {domain for domain, _ in functions}
    flat.opset_import.extend(each for each in file.opset_import if each.domain not in own)
    for _ in functions:  # no deeper than that: a function does not call itself
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
    function = functions.get((node.domain, node.op_type))
    if function is None:
        yield node
        return
    names = {"": ""} | dict.fromkeys(function.input, "")  # an input that is not given is left out inside, too
    names |= dict(zip(function.input, node.input)) | dict(zip(function.output, node.output))  # noqa: B905
    given = {each.name: each for each in (*function.attribute_proto, *node.attribute)}
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
    """An attribute of a body's node, with the value that the call gives it; none where the call gives none."""
    if not attribute.ref_attr_name:
        yield attribute
    elif attribute.ref_attr_name in given:
        value = AttributeProto()
        value.CopyFrom(given[attribute.ref_attr_name])
        value.name = attribute.name
        yield value
