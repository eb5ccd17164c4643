"""Read an ONNX file: its program and its weights.

The graph is run once, node by node, on an example. What depends on constants alone is computed here and becomes a
constant; `If` is decided where its condition is known; `Identity` and `Dropout` vanish. What is left becomes nodes of
`onnx_program`, with the weights under the names that they have in the file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from r2cli.errors import InputError
from r2cli.models.onnx_file import HALVES, opened, tensor_of
from r2cli.models.onnx_names import Names
from r2cli.models.onnx_patterns import DraftNode, simplified
from r2cli.models.onnx_program import OPERATORS, HeldTensor, OnnxNode, OnnxProgram
from r2cli.models.onnx_values import FEW, KINDS, Uncomputable, Value, is_numbers

FREE = 2  # inputs in the example of a file whose batch is free
MOST = 2**26  # elements that a file fixes of an input: 256 MB of floats, and each node makes some of them
KIND_OF = {
    **dict.fromkeys(HALVES, "float32"),
    **{getattr(TensorProto, {"float32": "FLOAT", "float64": "DOUBLE"}.get(n, n.upper())): n for n in KINDS},
}
# Operators whose product with a constant is the layer's own.
POINTWISE_OF_TWO = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Equal", "Greater", "Less", "Where", "Mod")
TRANSPARENT = ("Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten")  # keep the name of a weight


@dataclass(frozen=True)
class OnnxInput:
    """The input of a file: its name, kind and shape, None where a size is free."""

    name: str
    kind: str
    shape: tuple[int | None, ...]


def given(path: Path, model: onnx.ModelProto) -> list[OnnxInput]:
    """The inputs of a model. Raises InputError for one without a known number of axes."""
    held, found = {each.name for each in model.graph.initializer}, []
    for each in model.graph.input:
        kind = each.type.tensor_type
        if each.name in held:
            continue
        if not kind.HasField("shape") or kind.elem_type not in KIND_OF or not kind.shape.dim:
            raise InputError(f"{path}: the input '{each.name}' has no shape or an odd type: export it again")
        sizes = tuple(size.dim_value if size.dim_value > 0 else None for size in kind.shape.dim)
        if math.prod(size or 1 for size in sizes) > MOST:
            told = "x".join("?" if size is None else str(size) for size in sizes)
            raise InputError(f"{path}: the input '{each.name}' of {told} is too large: export it for a free batch")
        found.append(OnnxInput(each.name, KIND_OF[kind.elem_type], sizes))
    return found


def read(path: Path, inputs: Mapping[str, tuple[Any, str]]) -> tuple[OnnxProgram, dict[str, Tensor]]:
    """The program of the file at `path` for `inputs`, each a shape without the batch and a kind, and its tensors by
    their paths. The program takes the inputs in that order.

    A file for a batch of one number alone is read as one for any batch, where that gives the same. Raises InputError
    as `onnx_file.opened` does, for inputs of another shape, and for what cannot be computed, naming the node.
    """
    model = opened(path)
    found = {one.name: one for one in given(path, model)}
    for name, (shape, kind) in inputs.items():
        own = found[name]
        sizes = zip(own.shape[1:], shape, strict=False)
        if kind != own.kind or len(own.shape) != len(shape) + 1 or any(n not in (None, m) for n, m in sizes):
            wanted, got = ("x".join("?" if n is None else str(n) for n in one) for one in (own.shape[1:], shape))
            raise InputError(
                f"{path}: its input '{name}' is {own.kind} {wanted}, not {kind} {got}: give the data that it is for"
            )
    fixed = next((one.shape[0] for one in found.values() if one.shape[0]), None)
    if fixed is None:
        reader = _Reader(path, model, inputs, None)
        reader.walk()
        return reader.program()
    why = ""
    for late in (False, True):
        reader = _Reader(path, model, inputs, fixed, late=late)
        try:
            reader.walk()
        except InputError as error:
            why = f" ({error})"
            continue
        if reader.keeps_images_apart():
            return reader.program()
    raise InputError(
        f"{path} is for a batch of {fixed} alone, and reading it for others would change what it computes{why}: "
        "export it again with a free batch (dynamic_axes, or dynamic_shapes)"
    )


class _Reader:
    """One walk over a graph. `examples` holds the values of two batches, of which the second is twice the first."""

    def __init__(
        self,
        path: Path,
        model: onnx.ModelProto,
        inputs: Mapping[str, tuple[Any, str]],
        fixed: int | None,
        *,
        late: bool = False,
    ) -> None:
        self.path, self.model, self.inputs, self.fixed, self.late = path, model, tuple(inputs), fixed, late
        self.opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
        self.constants: dict[str, Value] = {"": None}
        self.origins: dict[str, str] = {}  # of a constant that is a weight: its name in the file
        self.aliases: dict[str, str] = {}
        self.inner: dict[str, int] = {}  # of an axis that holds the batch and more: how many values stand before it
        self.drafts: list[DraftNode] = []
        self.examples: dict[str, tuple[Value, ...]] = {}
        first, generator = fixed or FREE, torch.Generator().manual_seed(0)
        for name, (shape, kind) in inputs.items():
            blank = torch.randn((2 * first if fixed else first, *shape), generator=generator)
            blank = blank if kind.startswith("float") else torch.ones_like(blank)
            self.examples[name] = (blank[:first].to(KINDS[kind]), blank.to(KINDS[kind]))

    @torch.no_grad()
    def walk(self) -> None:
        self._enter(self.model.graph)
        for node in self.model.graph.node:
            self._node(node)

    def keeps_images_apart(self) -> bool:
        """Whether a batch of twice as many gives for the first half what that gives alone."""
        pairs = [self.examples.get(self._known(each.name)) for each in self.model.graph.output]
        return all(pair is None or _same(*pair) for pair in pairs)

    def _enter(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._hold(tensor.name, tensor, origin=True)

    def _hold(self, name: str, proto: TensorProto, *, origin: bool) -> None:
        try:
            value = tensor_of(proto)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.path}: the tensor '{name}' is damaged ({error}): export it again") from error
        self.constants[name] = _plain(value)
        if origin:
            self.origins[name] = name

    def _known(self, name: str) -> str:
        while name in self.aliases:
            name = self.aliases[name]
        return name

    def _node(self, node: onnx.NodeProto) -> None:
        operator, attributes = node.op_type, {each.name: each for each in node.attribute}
        inputs = tuple(self._known(name) for name in node.input)
        if operator in ("Identity", "Dropout"):
            self.aliases[node.output[0]] = inputs[0]
        elif operator == "Constant":
            self._constant(node.output[0], node.attribute[0])
        elif operator == "If":
            self._branch(node, inputs[0], attributes)
        else:
            # An output that is not wanted has no name.
            outputs = tuple(name or f"{node.output[0]} {place}" for place, name in enumerate(node.output))
            draft = DraftNode(operator, node.name, inputs, outputs, self._attributes(node))
            self._computed(_of_today(draft, self.opset))

    def _constant(self, name: str, attribute: onnx.AttributeProto) -> None:
        if attribute.HasField("t"):
            self._hold(name, attribute.t, origin=False)
        elif attribute.name in ("value_float", "value_int", "value_floats", "value_ints"):
            self.constants[name] = _plain(torch.tensor(helper.get_attribute_value(attribute)))
        else:
            raise InputError(f"{self.path}: the constant '{name}' is no tensor of numbers: export it again")

    def _branch(self, node: onnx.NodeProto, condition: str, attributes: dict[str, onnx.AttributeProto]) -> None:
        known = self.constants.get(condition, self.examples.get(condition, (None,))[0])
        if not is_numbers(known):
            raise self._refusal(node.name or node.output[0], "If", "its condition depends on the values of the input")
        chosen = attributes["then_branch" if (known[0] if isinstance(known, list) else known) else "else_branch"].g
        self._enter(chosen)
        for inner in chosen.node:
            self._node(inner)
        for name, own in zip(node.output, chosen.output, strict=True):
            self.aliases[name] = self._known(own.name)

    def _attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        """The attributes of a node as numbers, words and lists."""
        found: dict[str, Any] = {}
        for each in node.attribute:
            value = helper.get_attribute_value(each)
            if each.name == "to":
                if value not in KIND_OF:
                    raise self._refusal(node.name or node.output[0], node.op_type, "it casts to an odd type")
                value = KIND_OF[value]
            elif isinstance(value, TensorProto):  # of ConstantOfShape
                tensor = tensor_of(value)
                found["kind"] = str(tensor.dtype).removeprefix("torch.")
                value = tensor.reshape(-1)[0].item()
            elif isinstance(value, bytes):
                value = value.decode()
            elif not isinstance(value, int | float | list):
                raise self._refusal(node.name or node.output[0], node.op_type, f"its {each.name} is no number")
            found[each.name] = (
                [one.decode() if isinstance(one, bytes) else one for one in value] if isinstance(value, list) else value
            )
        return found

    def _computed(self, draft: DraftNode) -> None:
        """Compute a node: a constant where its inputs are, else a draft with the examples of its outputs."""
        draft = self._with_numbers(draft)
        if all(name in self.constants for name in draft.inputs) and draft.operator != "RandomNormal":
            found = self._run(draft, [self.constants[name] for name in draft.inputs])
            for name, value in zip(draft.outputs, found, strict=False):
                self.constants[name] = _plain(value)
            if draft.operator in TRANSPARENT and draft.inputs[0] in self.origins:
                self.origins[draft.outputs[0]] = self.origins[draft.inputs[0]]
            return
        draft = self._without_strides(draft)
        if self.fixed and draft.operator == "Reshape" and draft.inputs[0] in self.examples:
            draft = self._with_free_batch(draft)
        results = [self._run(draft, self._values(draft, batch)) for batch in range(2 if self.fixed else 1)]
        # Of outputs that no node reads the last are left out: a BatchNormalization had five once.
        outputs = draft.outputs[: len(results[0])]
        inner = max((self.inner.get(name, 1) for name in draft.inputs), default=1)
        for name, *values in zip(outputs, *results, strict=True):
            self.examples[name] = tuple(values)
            self.inner.setdefault(name, inner)
        self.drafts.append(replace(draft, outputs=outputs))

    def _values(self, draft: DraftNode, batch: int) -> list[Value]:
        return [self.examples[name][batch] if name in self.examples else self.constants[name] for name in draft.inputs]

    def _run(self, draft: DraftNode, values: list[Value]) -> list[Value]:
        attributes = {**draft.attributes, "outputs": len(draft.outputs), "device": torch.device("cpu")}
        try:
            found = OPERATORS[draft.operator].compute(attributes, *values)
        except Uncomputable as why:
            raise self._refusal(draft.name or draft.outputs[0], draft.operator, str(why)) from why
        except Exception as error:  # whatever torch raises for shapes that do not fit
            why_not = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise self._refusal(draft.name or draft.outputs[0], draft.operator, why_not) from error
        return list(found)[: len(draft.outputs)] if isinstance(found, tuple) else [found]

    def _refusal(self, name: str, operator: str, why: str) -> InputError:
        return InputError(
            f"{self.path}: node '{name}' ({operator}) cannot be read ({why}): run `onnxsim {self.path} simple.onnx` "
            "first, or export it again"
        )

    def _with_numbers(self, draft: DraftNode) -> DraftNode:
        """Make constants numbers where the node wants shapes, or computes with numbers alone."""
        places = set(OPERATORS[draft.operator].numbers)
        values = [self.examples[name][0] if name in self.examples else None for name in draft.inputs]
        computed = [value for value in values if value is not None]
        if draft.operator in POINTWISE_OF_TWO and computed and all(map(is_numbers, computed)):
            places |= set(range(len(draft.inputs)))
        if draft.operator in POINTWISE_OF_TWO:  # one number of a higher rank
            ranks = max((value.ndim for value in computed if isinstance(value, Tensor)), default=0)
            places |= {at for at, name in enumerate(draft.inputs) if self._is_one(name, ranks)}
        inputs = list(draft.inputs)
        for place, name in enumerate(draft.inputs):
            value = self.constants.get(name)
            if place in places and isinstance(value, Tensor) and value.ndim <= max(1, int(value.numel() == 1) * 9):
                inputs[place] = f"{name} "  # the same as numbers; no name of a file ends so
                one = (
                    value.reshape(-1)[0].item()
                    if value.numel() == 1 and place not in OPERATORS[draft.operator].numbers
                    else None
                )
                self.constants[inputs[place]] = value.tolist() if one is None else one
        return replace(draft, inputs=tuple(inputs))

    def _is_one(self, name: str, ranks: int) -> bool:
        value = self.constants.get(name)
        return isinstance(value, Tensor) and value.numel() == 1 and value.ndim <= ranks

    def _without_strides(self, draft: DraftNode) -> DraftNode:
        """A reshape for all of a flat value in its order, as torch's exporter gathers it by numbers (as_strided)."""
        flat = self.examples.get(draft.inputs[0], (None,))[0]
        index = self.constants.get(draft.inputs[-1])
        if draft.operator != "Gather" or not isinstance(flat, Tensor) or not isinstance(index, Tensor):
            return draft
        if flat.ndim != 1 or not torch.equal(index.flatten(), torch.arange(len(flat))):
            return draft
        target = f"{draft.outputs[0]} shape"
        self.constants[target] = list(index.shape)
        return replace(draft, operator="Reshape", inputs=(draft.inputs[0], target), attributes={})

    def _with_free_batch(self, draft: DraftNode) -> DraftNode:
        """A reshape to a shape that the file has for one batch, for any: the axis that holds the batch is free."""
        name, target = draft.inputs[0], f"{draft.outputs[0]} shape"
        one, two = self.examples[name]
        axes = [axis for axis, (n, m) in enumerate(zip(one.shape, two.shape, strict=True)) if n != m]
        if not axes:
            return draft
        shape = list(self._run(draft, self._values(draft, 0))[0].shape)
        # So many values stand before the next image's: it is the same in any shape.
        before = math.prod(one.shape[: axes[0]]) * self.inner.get(name, 1)
        counts = [math.prod(shape[:axis]) for axis in range(len(shape) + 1)]
        axis = next((axis for axis in range(len(shape)) if counts[axis] <= before < counts[axis + 1]), 0)
        if before in counts[:-1]:
            axis = counts.index(before)
            last = axis == len(shape) - 1  # features are never of several images
            if axis and shape[axis] != self.fixed and last is not self.late:
                axis -= 1
        self.inner[draft.outputs[0]] = before // counts[axis]
        shape[axis] = -1
        self.constants[target] = shape
        return replace(draft, inputs=(name, target))

    def program(self) -> tuple[OnnxProgram, dict[str, Tensor]]:
        """What was read, without what nothing reads."""
        outputs = [each.name for each in self.model.graph.output]
        results = [self._known(name) for name in outputs]
        for name, result in zip(outputs, results, strict=True):
            if result not in self.examples:
                raise InputError(f"{self.path}: its output '{name}' does not depend on its input: export it again")
            if not all(isinstance(value, Tensor) for value in self.examples[result]):
                raise InputError(f"{self.path}: its output '{name}' is a shape and no tensor: take it out")
        ranks = {name: own[0].ndim for name, own in self.examples.items() if isinstance(own[0], Tensor)}
        drafts = simplified(self.drafts, self.constants, self.origins, ranks, results)
        names = Names(self.inputs, drafts, self.constants, self.origins)
        tensors: dict[str, Tensor] = {}
        held: dict[str, HeldTensor] = {}
        nodes, numbers = [], {}
        for draft in drafts:
            inputs = []
            for place, name in enumerate(draft.inputs):
                value = self.constants.get(name)
                if isinstance(value, Tensor):
                    own = names.tensor(draft, place)
                    tensors[own] = value.contiguous()
                    kind: Any = str(value.dtype).removeprefix("torch.")
                    held[own] = HeldTensor(tuple(value.shape), kind, names.is_trained(draft, place, value))
                elif value is not None:
                    own = name
                    numbers[name] = value
                else:
                    own = name
                inputs.append(own)
            nodes.append(OnnxNode(draft.operator, names.step(draft), tuple(inputs), draft.outputs, draft.attributes))
        program = OnnxProgram(self.inputs, tuple(outputs), tuple(results), tuple(nodes), held, numbers)
        return program, tensors


def _plain(value: Value) -> Value:
    """A constant as numbers where it can be a shape: integers of rank 0 or 1, a float of rank 0; else a tensor."""
    if isinstance(value, Tensor) and value.is_floating_point():
        value = value.clamp(torch.finfo(value.dtype).min, torch.finfo(value.dtype).max)  # as a checkpoint can hold
    if isinstance(value, Tensor) and not value.is_floating_point() and value.ndim < 2 and value.numel() <= FEW:
        return value.tolist()
    return value.item() if isinstance(value, Tensor) and not value.ndim else value


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether the first half of a batch of twice as many gives what it gives alone."""
    if len(two) != 2 * len(one) or one.shape[1:] != two.shape[1:]:
        return False
    scale = float(one.abs().max()) or 1.0 if one.is_floating_point() else 1.0
    return float((two[: len(one)].double() - one.double()).abs().max()) <= 1e-4 * scale


def _of_today(draft: DraftNode, opset: int) -> DraftNode:
    """A node of an older opset with the attributes and inputs that it has in newer ones."""
    a = dict(draft.attributes)
    if draft.operator in ("Softmax", "LogSoftmax") and opset < 13:
        a = {"axis": 1, **a, "flat": 1}
    if draft.operator == "Upsample" or (draft.operator == "Resize" and opset == 10):
        a |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        scales = draft.inputs[1:]
        return replace(draft, operator="Resize", inputs=(draft.inputs[0], "", *scales), attributes=a)
    if draft.operator == "BatchNormalization":
        return replace(draft, outputs=draft.outputs[:1], attributes=a)
    return replace(draft, attributes=a)
