"""Export a checkpoint as an ONNX file with integer weights, in standard operators that every runtime knows.

The network's graph is written node by node (`onnx_operators.py`, `onnx_layers.py`). The weight of a quantized layer is
computed from its codes (`weight_nodes.py`): they are never computed again from floats. Every value keeps the name that
it has in the network: the codes of `features.0.weight` are `features.0.weight.codes`. Activations are UINT8; below 8
bits their codes are clipped.

The file is plain: opset 13 unless an operator asks for more, IR version 8, no functions, no types of 4 bits.
"""

import json
from collections.abc import Sequence
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, fx, nn

from r2cli import models
from r2cli.calibration import deployed
from r2cli.config import targets
from r2cli.config.groups import FileForm
from r2cli.deploy import onnx_layers, onnx_moving
from r2cli.deploy.onnx_operators import OPERATORS
from r2cli.deploy.onnx_sheet import UNKNOWN, Shape, Sheet, Unwritable, Value, refusal
from r2cli.deploy.onnx_tensors import Weights
from r2cli.deploy.onnx_writer import OnnxWriter
from r2cli.deploy.retarget import retarget
from r2cli.errors import InputError, R2Error
from r2cli.graph import edit, operators, placement, structure
from r2cli.graph.channel_clip import Clip
from r2cli.graph.recurrent import RecurrentWeight
from r2cli.graph.transposed import TransposedConv
from r2cli.quantized.grid import Grid
from r2cli.storage.checkpoint import LOGITS, Checkpoint
from r2cli.storage.input_spec import NetworkInput, places


def to_bytes(checkpoint: Checkpoint, form: FileForm | None = None) -> bytes:
    """Return the bytes of the ONNX file of `checkpoint` for its target. Equal checkpoints give equal bytes.

    Its inputs and outputs have the names that the checkpoint has for them, and the batch first. An image is float32
    (batch, channels, size, size), a text int64 tokens (batch, 3, size), and a classifier gives logits (batch, classes).
    Raises R2Error for an operation that has no form in ONNX, or a weight that is lost, and InputError for what the
    target cannot hold.
    """
    form, checkpoint = form or FileForm(), retarget(checkpoint)
    target = targets.get(checkpoint.target)
    batch = target.batch if form.batch is None else targets.batch(form.batch)
    if batch is None and target.container == targets.TFLITE:
        raise InputError(f"--target {target.name} has a fixed batch: give --batch a number, or leave it out")
    graph, given = deployed.canonical(checkpoint), checkpoint.input
    edit.repeat_grids(graph)
    writer = OnnxWriter(target.most_opset, form.opset)
    weights = Weights(writer, checkpoint.coded, target)
    weights.float_activations = not checkpoint.activations
    weights.unfused = _giving_floats(graph)
    names = models.input_names(checkpoint.model, given)
    export = _Export(graph.eval(), writer, weights, names, checkpoint.outputs)
    export.write(given, batch)
    lost = [name for name in checkpoint.coded if not any(name in node.output for node in writer.nodes)]
    if lost:
        raise R2Error(f"nothing in the network reads the weight '{lost[0]}': report this with the model's name")
    model = writer.model(_told(export.given), _told(export.results), metadata(checkpoint))
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _told(values: Sequence[Value]) -> list[onnx.ValueInfoProto]:
    """Inputs or outputs as the file announces them; a length that follows the batch is called so."""
    return [
        helper.make_tensor_value_info(
            one.name,
            helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=one.dtype).numpy().dtype),
            ["batch" if length is None else length for length in one.shape],
        )
        for one in values
    ]


# --- the graph -----------------------------------------------------------------------------------------------------


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps what each node gives: for a tensor its shape and type, and the value itself of others."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.found: dict[fx.Node, Any] = {}
        self.constants: dict[fx.Node, Tensor] = {}  # those that do not depend on the input's values
        self.fixed: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.found[n] = fx.node.map_aggregate(result, lambda one: _seen(one))
        reads = [node for node in n.all_input_nodes if not isinstance(self.found[node], int | torch.device)]
        if n.op != "placeholder" and all(node in self.fixed for node in reads):
            self.fixed.add(n)
            if isinstance(result, Tensor):
                self.constants[n] = result
        return result


def _seen(one: Any) -> Any:
    return (tuple(one.shape), one.dtype) if isinstance(one, Tensor) else one


class _Export:
    """One walk over a graph, which writes each node by its row of `OPERATORS` or `onnx_layers.LAYERS`."""

    def __init__(
        self, net: fx.GraphModule, writer: OnnxWriter, weights: Weights, inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        self.net, self.writer, self.weights = net, writer, weights
        self.inputs, self.outputs = inputs, outputs
        self.given: list[Value] = []
        self.results: list[Value] = []
        self.values: dict[fx.Node, Any] = {}  # Value, or a list of them, or what a node without a tensor gives
        self.modules = {node: operators.module_of(net, node) for node in net.graph.nodes}
        self.constants: dict[fx.Node, Tensor] = {}
        self.batch = ""

    def write(self, spec: NetworkInput, batch: int | None) -> None:
        """Write the nodes in their order. What one sample more changes follows the batch, unless `batch` fixes it."""
        blank = places(spec.blank(batch or 2))
        with torch.no_grad():
            first, second = _Shapes(self.net), _Shapes(self.net)
            first.run(*blank)
            second.run(*places(spec.blank(batch or 3)))
        # What depends on the batch's size is no constant, whatever it is made from.
        both = first.constants.items()
        self.constants = {node: one for node, one in both if torch.equal(one, second.constants[node])}
        for node in self.net.graph.nodes:
            if node.op == "placeholder":
                own, name = blank[len(self.given)], self.inputs[len(self.given)]
                self.values[node] = Value(name, (batch, *own.shape[1:]), own.dtype)
                self.given.append(self.values[node])
            elif node.op == "output":
                self._result(node.args[0])
            else:
                self.values[node] = self._node(node, first, second)

    def _result(self, given: Any) -> None:
        renamed: dict[str, str] = {}
        for one, wanted in zip([given] if isinstance(given, fx.Node) else given, self.outputs, strict=True):
            value = self.values[one]
            name = renamed.get(value.name, value.name)
            if value.name in renamed or not any(name in node.output for node in self.writer.nodes):
                self.writer.enter(f"{wanted}.result")
                name = self.writer.node("Identity", [name])
            renamed.setdefault(value.name, wanted)
            self.results.append(Value(self.writer.rename(name, wanted), value.shape, value.dtype))

    def _node(self, node: fx.Node, first: _Shapes, second: _Shapes) -> Any:
        seen = _merged(first.found[node], second.found[node])
        constant = self.constants.get(node)
        if constant is not None and self._is_value(node):
            if node.op == "get_attr":
                return Value(self.weights.tensor(str(node.target), constant), *_typed(constant))
            if all(user in self.constants and self._is_value(user) for user in node.users):
                return Value("", *_typed(constant))  # what reads it is a constant too, and written instead
            return Value(self.weights.tensor(f"{node.name}.constant", constant), *_typed(constant))
        if not _has_tensor(seen):
            return seen
        if self._joins(node):
            return None  # the grid that reads it writes both
        try:
            names = self._write(node, seen)
        except Unwritable as why:
            raise R2Error(self._refusal(node, str(why))) from why
        return _valued(names, seen)

    def _is_value(self, node: fx.Node) -> bool:
        """Whether a constant is written as its value, and not computed in the file."""
        return not self._from_codes(node) and not isinstance(self.modules[node], RecurrentWeight)

    def _from_codes(self, node: fx.Node) -> bool:
        """Whether a constant is made from a quantized weight or is on a grid: then the file computes it from codes."""
        if node.op == "get_attr":
            return str(node.target) in self.weights.coded
        if isinstance(self.modules[node], deployed.FakeQuantize) or f"{node.target}.weight" in self.weights.coded:
            return True
        return any(self._from_codes(each) for each in node.all_input_nodes if each.op != "placeholder")

    def _write(self, node: fx.Node, seen: Any) -> Any:
        shapes, dtypes = zip(*(seen if isinstance(seen, list) else [seen]), strict=True)
        sheet = Sheet(self.writer, shapes, dtypes, self._batch)
        module = self.modules[node]
        if isinstance(module, RecurrentWeight):
            return self.weights.tensor(f"{node.target}.weight", module.weight)
        args: Any = fx.node.map_arg(node.args, lambda each: self.values[each])
        kwargs = fx.node.map_arg(node.kwargs, lambda each: self.values[each])
        self.writer.enter(node.name)
        if self._is_clipped(node) and (self.weights.target.signed or self._bounds_few_bits(node)):
            return args[0].name
        if module is not None:
            return self._module(sheet, node, module, args[0])
        if node.op == "get_attr":
            return self.weights.tensor(str(node.target), getattr_path(self.net, str(node.target)))
        if node.target not in OPERATORS:
            raise Unwritable(UNKNOWN)
        by_number = node.target in (torch.add, torch.mul) and operators.with_number(node)
        if by_number and placement.is_between_grids(self.net, node):
            args = (args[0], onnx_layers.number_on_grid(sheet, self.weights, float(args[1])))
        count = len(self.writer.nodes)
        return self._named(OPERATORS[node.target](sheet, *args, **kwargs), node.name, count)

    def _module(self, sheet: Sheet, node: fx.Node, module: nn.Module, x: Value) -> str:
        name, before = str(node.target), len(self.writer.nodes)
        if isinstance(module, deployed.FakeQuantize):
            return self._grid(sheet, node, module.grid, x)
        if isinstance(module, Clip):
            if self._clips_codes(node):  # the grid clips the codes of each channel
                return sheet.node("Relu", x)
            return onnx_layers.channel_clip(sheet, name, module, x)
        for kinds, handler in onnx_layers.LAYERS:
            if isinstance(module, kinds):
                own = handler(sheet, self.weights, name, module, x)
                return self._named(own, node.name, before)  # type: ignore[no-any-return]
        raise Unwritable(UNKNOWN)

    def _grid(self, sheet: Sheet, node: fx.Node, grid: Grid, x: Value) -> str:
        name = str(node.target)
        before = node.all_input_nodes[0]
        if self._joins(before):
            given = self.values[before.all_input_nodes[0]]
            return onnx_layers.hard_sigmoid_on_grid(sheet, self.weights, name, grid, given)
        module = self.modules[before]
        bound = module.high if isinstance(module, Clip) and self._clips_codes(before) else None
        return onnx_layers.quantize(sheet, self.weights, name, grid, x.name, bound)

    def _is_clipped(self, node: fx.Node) -> bool:
        """Whether a ReLU changes nothing, because the grids that read it clip its values. ONNX Runtime does not fuse it
        with INT8 codes."""
        most = next(
            (high for kind, high in ((F.relu, None), (F.relu6, 6.0)) if operators.is_a(self.net, node, (kind,))), 0
        )
        grids = [self.modules[user] for user in node.users]
        return most != 0 and all(
            isinstance(each, deployed.FakeQuantize)
            and int(each.grid.zero_point) == 0
            and (most is None or int(each.grid.encode(torch.tensor(most))) == each.grid.highest)
            for each in grids
        )

    def _bounds_few_bits(self, node: fx.Node) -> bool:
        """Whether a clipped ReLU6 stands before grids of fewer than 8 bits. ONNX Runtime does not see that it changes
        nothing there, and would leave the layer before it in float."""
        grids = [self.modules[user] for user in node.users]
        return operators.is_a(self.net, node, (F.relu6,)) and all(
            isinstance(each, deployed.FakeQuantize) and each.grid.bits < 8 for each in grids
        )

    def _clips_codes(self, node: fx.Node) -> bool:
        """Whether the bounds of a Clip are those of its grid's codes."""
        return self.weights.target.clips_codes and all(edit.is_grid(user) for user in node.users)

    def _joins(self, node: fx.Node) -> bool:
        """Whether `node` is a hard sigmoid between two grids of 8 bits, which is written with the second."""
        user = structure.only_user(node)
        grid = None if user is None else self.modules[user]
        return (
            isinstance(grid, deployed.FakeQuantize)
            and grid.grid.bits == 8
            and operators.is_a(self.net, node, (F.hardsigmoid,))
            and edit.is_grid(node.all_input_nodes[0])
        )

    def _named(self, given: Any, name: str, before: int) -> Any:
        """Call the value that the last node gives, where it is the result, as the network does."""
        reserved = name in self.inputs or name in self.outputs
        if reserved or not isinstance(given, str):
            return given
        if len(self.writer.nodes) > before and given in self.writer.nodes[-1].output:
            return self.writer.rename(given, name)
        return given

    def _batch(self) -> str:
        """Write the size of the batch, once: (1,) INT64."""
        self.batch = self.batch or onnx_moving.batch(self.writer, self.given[0])
        return self.batch

    def _refusal(self, node: fx.Node, why: str) -> str:
        module = self.modules[node]
        what = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
        return refusal(node.name, what, why)


def getattr_path(net: nn.Module, path: str) -> Tensor:
    """The tensor at a path of a network."""
    owner, _, name = path.rpartition(".")
    found: Tensor = getattr(net.get_submodule(owner), name)
    return found


def _typed(tensor: Tensor) -> tuple[Shape, torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _is_typed(seen: Any) -> bool:
    return isinstance(seen, tuple) and len(seen) == 2 and isinstance(seen[1], torch.dtype)


def _has_tensor(seen: Any) -> bool:
    return _is_typed(seen) or (isinstance(seen, list) and any(map(_has_tensor, seen)))


def _merged(one: Any, other: Any) -> Any:
    """What a node gives for any batch: lengths, and numbers, that differ between two batches are None."""
    if _is_typed(one):
        return tuple(a if a == b else None for a, b in zip(one[0], other[0], strict=True)), one[1]
    if isinstance(one, tuple | list) and not isinstance(one, torch.Size):
        return [_merged(a, b) for a, b in zip(one, other, strict=True)]
    if isinstance(one, torch.Size):
        return tuple(a if a == b else None for a, b in zip(one, other, strict=True))
    return one if one == other else None


def _valued(names: Any, seen: Any) -> Any:
    if isinstance(seen, list):
        return [_valued(name, each) for name, each in zip(names, seen, strict=True)]
    return names if isinstance(names, Value) else Value(names, *seen)


def _giving_floats(net: fx.GraphModule) -> set[str]:
    """The weights of layers that run in float: no grid is on what they give, behind its activation perhaps.

    An activation before a grid that reaches below zero is not fused.
    """
    found = set()
    for layer in structure.layers(net):
        node = structure.node_of(net, layer)
        user = structure.only_user(node)
        last = user if user is not None and operators.is_a(net, user, operators.ACTIVATIONS) else node
        transposed = isinstance(operators.module_of(net, node), TransposedConv)
        grids: list[Any] = [operators.module_of(net, each) for each in last.users if edit.is_grid(each)]
        fuses = any(last is node or not bool(each.zero_point) for each in grids)
        if transposed or not fuses:
            found.add(layer.weight)
    return found


# --- the file ------------------------------------------------------------------------------------------------------


def metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the metadata of the file, sorted by key: its preprocessing, its classes, its network and its history."""
    entries = {
        "r2.class_names": _json(checkpoint.class_names),
        "r2.history": _json(checkpoint.history),
        "r2.input": _json(checkpoint.input.described()),
        "r2.model": _json(checkpoint.model.described()),
        "r2.target": _json(checkpoint.target),
    }
    if checkpoint.outputs != LOGITS:
        entries["r2.outputs"] = _json(checkpoint.outputs)
    return dict(sorted(entries.items()))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
