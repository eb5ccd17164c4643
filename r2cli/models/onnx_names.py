"""Names of an ONNX file as paths of modules and tensors in a network.

The weight `features.0.weight` keeps its name, so the layer is `features.0`. Exporters that fold a BatchNorm name the
weight anew (`onnx::Conv_193`); then the name of the node says where it was: `/features/features.0/Conv`. Paddle's
`conv2d_0.w_0` belongs to `conv2d_0`.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from r2cli.models.onnx_patterns import DraftNode
from r2cli.models.onnx_values import Value

NORM = {1: "weight", 2: "bias"}
# The places of an operator's inputs that are tensors of a module, and their names in it.
PARTS: Mapping[str, Mapping[int, str]] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Linear"), {1: "weight", 2: "bias"}),
    "BatchNormalization": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"},
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization"), NORM),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), {1: "ih.weight", 2: "hh.weight", 3: "bias"}),
    "PRelu": {1: "weight"},
    "Gather": {0: "weight"},
}
RESERVED = {*dir(nn.Module()), "node", "attributes", "program", "holders", "steps"}
MADE_UP = re.compile(r"onnx::\w+_\d+|val_\d+")


class Names:
    """Paths for the steps and tensors of `drafts`; each is another, and none stands below a tensor."""

    def __init__(
        self,
        inputs: Sequence[str],
        drafts: Sequence[DraftNode],
        constants: Mapping[str, Value],
        origins: Mapping[str, str],
    ) -> None:
        self.constants, self.origins = constants, origins
        self.values = {*inputs, *(name for draft in drafts for name in (*draft.inputs, *draft.outputs))} - set(origins)
        self.steps = set[str]()
        self.tensors = dict[str, str]()  # paths by the name of the constant
        self.above = set[str]()  # paths that hold others

    def step(self, draft: DraftNode) -> str:
        """The path of a node's module: that of its layer, else where the file says that the node stands."""
        scope, last = _scope(draft.name), legal(draft.outputs[0])
        wanted = [self._layer(draft)] if self._is_layer(draft) else [scope, f"{scope}.{legal(draft.operator)}", last]
        if not scope and not self._is_layer(draft):
            wanted = [last]
        path = self._free([name for name in wanted if name], lambda path: path not in self.steps)
        self.steps.add(path)
        return path

    def tensor(self, draft: DraftNode, place: int) -> str:
        """The path of the tensor that a node reads."""
        name = draft.inputs[place]
        if name not in self.tensors:
            own, part = legal(self.origins.get(name, name)), PARTS.get(draft.operator, {}).get(place)
            if part is not None and not own.endswith(f".{part}"):
                own = f"{self._layer(draft)}.{part}"
            free = lambda path: path not in self.steps | self.above | self.values  # noqa: E731
            self.tensors[name] = self._free([own], free)
        return self.tensors[name]

    def is_trained(self, draft: DraftNode, place: int, value: Tensor) -> bool:
        part = PARTS.get(draft.operator, {}).get(place, "")
        return (
            value.is_floating_point()
            and not part.startswith("running")
            and (bool(part) or draft.inputs[place] in self.origins)
        )

    def _is_layer(self, draft: DraftNode) -> bool:
        place = min(PARTS.get(draft.operator, {99: ""}))
        return place < len(draft.inputs) and isinstance(self.constants.get(draft.inputs[place]), Tensor)

    def _layer(self, draft: DraftNode) -> str:
        """The path of a layer, by its weight or, where an exporter has made that name up, by its node."""
        name = draft.inputs[min(PARTS[draft.operator])]
        own = self.origins.get(name, name)
        if MADE_UP.fullmatch(own) and _scope(draft.name):
            return _scope(draft.name)
        return re.sub(r"\.(weight|[wb]_\d+)$", "", legal(own))

    def _free(self, wanted: Sequence[str], fits: object) -> str:
        assert callable(fits)
        held = set(self.tensors.values())
        parent, _, last = wanted[-1].rpartition(".")
        apart = f"{parent.replace('.', '_')}.{last}".lstrip(".")  # where what would hold it is a tensor itself
        numbers = range(1, len(held) + len(self.steps) + 2)
        tries = [*wanted, *(f"{own}_{count}" for own in (wanted[-1], apart) for count in numbers)]
        path = next(one for one in tries if fits(one) and one not in held and held.isdisjoint(_above(one)))
        self.above.update(_above(path))
        return path


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def legal(name: str) -> str:
    """A name as a path: parts with points between them, none empty, none that a module has for itself."""
    parts = [part for part in name.replace("/", ".").split(".") if part] or ["value"]
    return ".".join(f"{part}_" if part in RESERVED else part for part in parts)


def _scope(name: str) -> str:
    """The path of the module that a node was computed in: 'layer1.0.conv1' of '/layer1/layer1.0/conv1/Conv'."""
    path = list[str]()
    for part in name.strip("/").split("/")[:-1] if name.startswith("/") else ():
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    return legal(".".join(path)) if path else ""
