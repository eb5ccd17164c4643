"""What exporters write in several nodes and is one operation: each pattern becomes that operation again.

A product by a constant matrix is a linear layer, a sum behind it or behind a convolution its bias. `x * clip(x + 3, 0,
6) / 6` is HardSwish, for whose parts runtimes have integer kernels. GELU and LayerNormalization, which older opsets do
not have, stay one operation, so that no value within them is rounded.
"""

import math
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from r2cli.models.onnx_values import Value


@dataclass(frozen=True)
class DraftNode:
    """A node while a file is read: its name in the file, and its values by their names."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Graph:
    """The drafts by the values that they give, and how often each value is read."""

    drafts: list[DraftNode]
    constants: MutableMapping[str, Value]
    origins: MutableMapping[str, str]
    ranks: Mapping[str, int]
    results: Sequence[str]

    def __post_init__(self) -> None:
        self.made = {name: draft for draft in self.drafts for name in draft.outputs}
        self.reads = Counter(name for draft in self.drafts for name in draft.inputs)
        self.reads.update(self.results)

    def before(self, name: str, *operators: str) -> DraftNode | None:
        """The node that gives `name`, if it is one of these and nothing else reads it."""
        found = self.made.get(name)
        return found if found is not None and found.operator in operators and self.reads[name] == 1 else None

    def number(self, name: str) -> float | None:
        """A constant that is one number."""
        value = self.constants.get(name)
        if isinstance(value, Tensor) and value.numel() == 1:
            return float(value.reshape(-1)[0])
        return value if isinstance(value, int | float) else None

    def hold(self, name: str, value: Tensor, of: str) -> str:
        """Hold a constant that is made of another, whose name in the file it keeps. Returns `name`."""
        self.constants[name] = value
        self.origins[name] = self.origins.get(of, of)
        return name


def simplified(
    drafts: list[DraftNode],
    constants: MutableMapping[str, Value],
    origins: MutableMapping[str, str],
    ranks: Mapping[str, int],
    results: Sequence[str],
) -> list[DraftNode]:
    """`drafts` with every pattern replaced, without what nothing reads.

    `ranks` are the numbers of axes of values. Tensors that are new go into `constants`, their names into `origins`.
    """
    for rewrite in (_as_linear, _with_factor, _with_bias, _as_hard_swish, _as_gelu, _as_layer_norm):
        graph = _Graph(drafts, constants, origins, ranks, results)
        found = []
        for draft in drafts:
            new = rewrite(graph, draft) or draft
            graph.made.update(dict.fromkeys(new.outputs, new))
            found.append(new)
        drafts = _needed(found, results)
    return drafts


def _needed(drafts: list[DraftNode], results: Sequence[str]) -> list[DraftNode]:
    """The drafts whose values go into the results."""
    needed, found = set(results), list[DraftNode]()
    for draft in reversed(drafts):
        if needed.intersection(draft.outputs):
            needed.update(draft.inputs)
            found.append(draft)
    return found[::-1]


def _as_linear(graph: _Graph, draft: DraftNode) -> DraftNode | None:
    """A Gemm, or a MatMul, by a constant matrix."""
    a = draft.attributes
    if draft.operator not in ("Gemm", "MatMul") or a.get("transA") or a.get("alpha", 1) != 1 or a.get("beta", 1) != 1:
        return None
    matrix = graph.constants.get(draft.inputs[1])
    if not isinstance(matrix, Tensor) or matrix.ndim != 2 or draft.inputs[0] in graph.constants:
        return None
    weight, outputs = draft.inputs[1], matrix.shape[0] if a.get("transB") else matrix.shape[1]
    if not a.get("transB"):
        weight = graph.hold(f"{weight} transposed", matrix.t(), weight)
    inputs: tuple[str, ...] = (draft.inputs[0], weight)
    if len(draft.inputs) > 2 and draft.inputs[2]:
        bias = _flat(graph, draft.inputs[2], outputs, -1)
        if bias is None:
            return None
        inputs = (*inputs, bias)
    return replace(draft, operator="Linear", inputs=inputs, attributes={})


def _layer_before(graph: _Graph, draft: DraftNode) -> tuple[DraftNode, str, int] | None:
    """The layer whose result alone a sum or product reads beside a constant, that constant, and its channels' axis."""
    if len(draft.inputs) != 2:
        return None
    for name, other in (draft.inputs, draft.inputs[::-1]):
        layer = graph.before(name, "Linear", "Conv", "ConvTranspose")
        if layer is None or other not in graph.constants or graph.constants[other] is None:
            continue
        weight = graph.constants.get(layer.inputs[1])
        if isinstance(weight, Tensor) and all(one in graph.constants for one in layer.inputs[1:]):
            return layer, other, -1 if layer.operator == "Linear" else 1 - weight.ndim
    return None


def _channels(graph: _Graph, layer: DraftNode) -> int:
    weight = graph.constants[layer.inputs[1]]
    transposed = layer.operator == "ConvTranspose"
    return int(weight.shape[1] * layer.attributes.get("group", 1) if transposed else weight.shape[0])


def _with_factor(graph: _Graph, draft: DraftNode) -> DraftNode | None:
    """A product of a layer and one number: the layer's weight, and bias, times that."""
    found = _layer_before(graph, draft) if draft.operator in ("Mul", "Div") else None
    factor = None if found is None else graph.number(found[1])
    if found is None or factor is None or (draft.operator == "Div" and draft.inputs[1] != found[1]):
        return None
    layer, _, _ = found
    factor = 1 / factor if draft.operator == "Div" else factor
    parts = [
        graph.hold(f"{name} times {factor}", graph.constants[name] * factor, name) for name in layer.inputs[1:] if name
    ]
    return replace(layer, inputs=(layer.inputs[0], *parts), outputs=draft.outputs)


def _with_bias(graph: _Graph, draft: DraftNode) -> DraftNode | None:
    """A sum of a layer and a constant, one number or one for each of its channels: the layer's bias."""
    found = _layer_before(graph, draft) if draft.operator == "Add" else None
    if found is None:
        return None
    layer, other, axis = found
    channels, number = _channels(graph, layer), graph.number(other)
    bias = _flat(graph, other, channels, axis) if number is None else None
    if number is not None:
        bias = f"{other} for {channels}"
        graph.constants[bias] = torch.full((channels,), number)
    if bias is None:
        return None
    if len(layer.inputs) > 2 and layer.inputs[2]:
        own = layer.inputs[2]
        bias = graph.hold(f"{own} and {bias}", graph.constants[own] + graph.constants[bias], own)
    return replace(layer, inputs=(*layer.inputs[:2], bias), outputs=draft.outputs)


def _flat(graph: _Graph, name: str, channels: int, axis: int) -> str | None:
    """The name of a constant as a bias: (channels,), where it has one number for each of them along `axis`."""
    value = graph.constants.get(name)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != channels:
        return None
    if value.ndim < -axis or value.shape[axis] != channels:
        return None
    if value.ndim == 1:
        return name
    return graph.hold(f"{name} flat", value.reshape(-1), name)


def _as_hard_swish(graph: _Graph, draft: DraftNode) -> DraftNode | None:
    """x * clip(x + 3, 0, 6) / 6, as Paddle and old exporters write it."""
    if draft.operator != "Div" or len(draft.inputs) != 2 or graph.number(draft.inputs[1]) != 6:
        return None
    product = graph.before(draft.inputs[0], "Mul")
    if product is None:
        return None
    for name, x in (product.inputs, product.inputs[::-1]):
        clip = graph.before(name, "Clip")
        total = graph.before(clip.inputs[0], "Add") if clip is not None and _bounds(graph, clip) == (0, 6) else None
        if total is not None and x in total.inputs:
            other = total.inputs[1 - total.inputs.index(x)]
            if graph.number(other) == 3:
                return replace(draft, operator="HardSwish", inputs=(x,), attributes={})
    return None


def _bounds(graph: _Graph, clip: DraftNode) -> tuple[float | None, float | None]:
    least, most = clip.attributes.get("min"), clip.attributes.get("max")
    if len(clip.inputs) > 1:
        least = graph.number(clip.inputs[1])
    if len(clip.inputs) > 2:
        most = graph.number(clip.inputs[2])
    return least, most


def _as_gelu(graph: _Graph, draft: DraftNode) -> DraftNode | None:
    """x * (1 + erf(x / sqrt(2))) / 2, its factors in any order."""
    if draft.operator != "Mul":
        return None
    factors = _factors(graph, draft)
    names = [name for name in factors if graph.number(name) is None]
    numbers = [graph.number(name) or 0.0 for name in factors if graph.number(name) is not None]
    if len(names) != 2 or not _is_near(math.prod(numbers), 0.5):
        return None
    for total, x in (names, names[::-1]):
        add = graph.before(total, "Add")
        erf = next((one for one in (graph.before(name, "Erf") for name in add.inputs) if one), None) if add else None
        if add is None or erf is None or not any(graph.number(name) == 1 for name in add.inputs):
            continue
        scaled = graph.before(erf.inputs[0], "Div", "Mul")
        if scaled is None or x not in scaled.inputs:
            continue
        by = graph.number(scaled.inputs[1 - scaled.inputs.index(x)])
        if by is not None and _is_near(by if scaled.operator == "Div" else 1 / by, math.sqrt(2)):
            return replace(draft, operator="Gelu", inputs=(x,), attributes={})
    return None


def _factors(graph: _Graph, draft: DraftNode) -> list[str]:
    """What a product is of: the products within it are opened."""
    found = list[str]()
    for name in draft.inputs:
        inner = graph.before(name, "Mul")
        found += _factors(graph, inner) if inner is not None else [name]
    return found


def _is_near(one: float, other: float) -> bool:
    return abs(one - other) < 1e-4 * abs(other)


def _as_layer_norm(graph: _Graph, draft: DraftNode) -> DraftNode | None:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis."""
    product = next((one for one in (graph.before(name, "Mul") for name in draft.inputs) if one), None)
    quotient = next((one for one in (graph.before(n, "Div") for n in product.inputs) if one), None) if product else None
    if draft.operator != "Add" or product is None or quotient is None:
        return None
    bias, weight = (_other(own, read.outputs[0]) for own, read in ((draft, product), (product, quotient)))
    affine = [graph.constants.get(name) for name in (weight, bias)]
    if not all(isinstance(one, Tensor) and one.ndim == 1 for one in affine):
        return None
    centred, root = graph.made.get(quotient.inputs[0]), graph.before(quotient.inputs[1], "Sqrt")
    sure = graph.before(root.inputs[0], "Add") if root is not None else None
    if centred is None or centred.operator != "Sub" or sure is None:
        return None
    epsilon = next((number for number in map(graph.number, sure.inputs) if number is not None), None)
    variance = next((one for one in (graph.before(name, "ReduceMean") for name in sure.inputs) if one), None)
    mean = graph.before(centred.inputs[1], "ReduceMean")
    if epsilon is None or variance is None or mean is None or mean.inputs[0] != centred.inputs[0]:
        return None
    square = graph.before(variance.inputs[0], "Pow", "Mul")
    last = all(_is_over_last(graph, one) for one in (variance, mean))
    if square is None or square.inputs[0] != centred.outputs[0] or not last:
        return None
    if square.inputs[1] != square.inputs[0] and (square.operator == "Mul" or graph.number(square.inputs[1]) != 2):
        return None
    inputs = (centred.inputs[0], weight, bias)
    return replace(draft, operator="LayerNormalization", inputs=inputs, attributes={"axis": -1, "epsilon": epsilon})


def _other(draft: DraftNode, name: str) -> str:
    """The other one of two inputs."""
    return draft.inputs[1 - draft.inputs.index(name)]


def _is_over_last(graph: _Graph, mean: DraftNode) -> bool:
    """Whether a mean is over the last axis alone, which it keeps."""
    axes = mean.attributes.get("axes") if len(mean.inputs) < 2 else graph.constants.get(mean.inputs[1])
    return axes in ([-1], [graph.ranks.get(mean.inputs[0], 0) - 1]) and bool(mean.attributes.get("keepdims", 1))
