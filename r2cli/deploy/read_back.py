"""A quantized ONNX file, anybody's, as the network that it was made from, with the file's weights, biases and grids.

The float network runs node by node on a few inputs. A layer takes the weight of the file's layer that reads the same
value, and a value takes the grid that the file puts on it; the run goes on with what the file itself gave, in ONNX
Runtime. So names count only where several layers of one shape read one value, and nothing drifts: what differs is
another network, and is named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import NodeProto, numpy_helper
from torch import Tensor, fx, nn

from r2cli.calibration.deployed import FakeQuantize, insert_grids
from r2cli.deploy import comparison, operator_form, runtime, weight_roles
from r2cli.deploy.comparison import BETWEEN_GRIDS, Rounding
from r2cli.errors import InputError
from r2cli.graph import structure
from r2cli.graph.operators import ACTIVATIONS, LAYERS, is_a, module_of
from r2cli.graph.transposed import exchanged
from r2cli.quantized.grid import Grid
from r2cli.storage.input_spec import Given, places

KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
OTHERWISE = 0.01  # share of codes that may be others than torch's


def opened(path: Path) -> onnx.ModelProto:
    """The model at `path`, in float operators between grids. Raises InputError where it has none, or none that last."""
    file = operator_form.plain(runtime.read(path))
    found = next((node for node in file.graph.node if node.op_type == "DynamicQuantizeLinear"), None)
    if found is not None:
        raise InputError(f"{path} quantizes '{found.input[0]}' dynamically: give a file with fixed grids")
    held = [part for _, name, _, _ in weight_roles.of(file) for part in weight_roles.codes(file, name)]
    if all(each.data_type in weight_roles.FLOATS for each in held):
        raise InputError(f"{path} is a float network: give a quantized one, `r2 ptq {path}` makes it")
    return file


def has_norms(file: onnx.ModelProto) -> bool:
    """Whether BatchNorms stand in `file` by themselves."""
    return any(node.op_type == "BatchNormalization" for node in file.graph.node)


@torch.no_grad()
def network(path: Path, file: onnx.ModelProto, net: fx.GraphModule, inputs: Given) -> fx.GraphModule:
    """`net`, a float network's graph, with all that `file` at `path` has instead, in place. It runs on `inputs`.

    Raises InputError naming the first value that differs where the file is of another network.
    """
    layers, rounded = _layers(file), comparison.roundings(file)
    names = {name for each in layers for name in (each.reads, each.gives)}
    names |= {name for each in rounded for name in (each.reads, each.gives)}
    own = {each.name for each in (*file.graph.input, *file.graph.output)}
    values = runtime.values(file, sorted(names - own), optimise=False)(*places(inputs))
    walk = _Walk(net, path, layers, rounded, values)
    outputs = walk.run(*places(inputs))
    left = [layer.gives for layer in walk.layers] + [rounding.reads for rounding in walk.rounded]
    if left:
        raise _differs(path, f"'{left[0]}', which stands in the file alone")
    for each, found in zip(file.graph.output, places(outputs), strict=True):
        if not _same(values[each.name], found):
            raise _differs(path, f"the output '{each.name}'")
    insert_grids(net, walk.found)
    return net


def _differs(path: Path, what: str) -> InputError:
    return InputError(f"{path} is not of this network: the first value that differs is {what}")


@dataclass(frozen=True)
class _Layer:
    """A layer of the file: the names of its weight, of the value that it reads and of what it gives, and its numbers,
    as torch has them."""

    name: str
    reads: str
    gives: str
    weight: Tensor
    bias: Tensor | None


class _Walk(fx.Interpreter):
    """Runs the float network, gives its layers the file's numbers, and finds its grids."""

    def __init__(
        self,
        net: fx.GraphModule,
        path: Path,
        layers: Sequence[_Layer],
        rounded: Sequence[Rounding],
        values: Mapping[str, Tensor],
    ) -> None:
        super().__init__(net)
        self.extra_traceback = False  # errors are told to users as they are
        self.path, self.values = path, values
        self.layers, self.rounded = list(layers), [each for each in rounded if not each.repeats]
        self.found: dict[str, Grid] = {}

    def run_node(self, n: fx.Node) -> Any:
        module = module_of(self.module, n)  # type: ignore[arg-type]
        if module is not None and isinstance(module, LAYERS):
            value: Any = self._layer(n, module, super().run_node)
        else:
            value = super().run_node(n)
        return self._rounded(n, value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _layer(self, node: fx.Node, module: nn.Module, run: Any) -> Any:
        name = f"{node.target}.weight"
        read = self.env[node.all_input_nodes[0]] if node.all_input_nodes else None
        fit = [
            each
            for each in self.layers
            if each.weight.squeeze().shape == module.weight.squeeze().shape  # type: ignore[operator]
            and (each.name == name or (read is not None and _same(self.values[each.reads], read)))
        ]
        if not fit:
            raise _differs(self.path, f"'{node.target}'")
        best = max(fit, key=lambda each: (each.name == name, _likeness(each.weight, module.weight)))
        self.layers.remove(best)
        _set(module, best)
        value = run(node)
        if read is not None and not _same(self.values[best.gives], value):
            raise _differs(self.path, f"'{node.target}'")
        return value if read is None else self.values[best.gives].reshape(value.shape)

    def _rounded(self, node: fx.Node, value: Tensor) -> Tensor:
        own = next((each for each in self.rounded if self._fits(each, node, value)), None)
        if own is None:
            return value
        self.rounded.remove(own)
        self.found[node.name] = grid = _grid(own)
        given = self.values[own.gives].reshape(value.shape)
        if not _same_codes(grid, value, given):
            raise _differs(self.path, f"'{own.gives}', which is not on the grid of scale {own.scale:.6g} that it names")
        return given

    def _fits(self, rounding: Rounding, node: fx.Node, value: Tensor) -> bool:
        """Whether the file puts this value on that grid. A ReLU that the grid's lower end replaces is not in the file:
        the grid is then on what the ReLU gives."""
        user = structure.only_user(node)
        if rounding.zero == 0 and user is not None and is_a(self.module, user, ACTIVATIONS):  # type: ignore[arg-type]
            return False
        given, before = self.values[rounding.gives], self.values[rounding.reads]
        if given.numel() != value.numel():
            return False
        if rounding.bounded:
            return _same_codes(_grid(rounding), value, given.reshape(value.shape))
        if _same(before, value):
            return True
        low, high = ((code - rounding.zero) * rounding.scale for code in (0, rounding.highest))
        before = before / (rounding.codes_scale / rounding.scale)  # a hard sigmoid's sum, on six times the grid
        within = rounding.zero == 0 or rounding.codes_scale != rounding.scale
        return within and _same(before.clamp(low, high), value.clamp(low, high))


def _grid(rounding: Rounding) -> Grid:
    bits = (rounding.highest + 1).bit_length() - 1
    return Grid(torch.tensor(rounding.scale), torch.tensor(rounding.zero, dtype=torch.int32), bits, signed=False)


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.numel() != expected.numel():
        return False
    most = float((found.reshape(-1) - expected.reshape(-1)).abs().max())
    return most <= BETWEEN_GRIDS * max(float(expected.abs().max()), 1e-30)


def _same_codes(grid: Grid, value: Tensor, given: Tensor) -> bool:
    """Whether `given` is `value` on the grid, but for some codes at the edges of two."""
    found = FakeQuantize(grid)(value)
    more = max(float(grid.scale), BETWEEN_GRIDS * float(value.abs().max()))
    return float(((found - given).abs() > more / 2).float().mean()) <= OTHERWISE


def _likeness(one: Tensor, other: Any) -> float:
    return float(F.cosine_similarity(one.reshape(-1), other.reshape(-1), dim=0))


def _set(module: Any, own: _Layer) -> None:
    """Give a layer the file's numbers. A bias of zeros may be lacking in the file."""
    module.weight.copy_(own.weight.reshape(module.weight.shape))
    if own.bias is not None and module.bias is None:
        module.bias = nn.Parameter(torch.empty(own.bias.numel()))
    if getattr(module, "bias", None) is not None:
        module.bias.copy_(torch.zeros(()) if own.bias is None else own.bias.reshape(-1))


def _layers(file: onnx.ModelProto) -> list[_Layer]:
    """The layers of `file` whose weights are constants, in its order."""
    found = [(node, name) for node, name, _, adds in weight_roles.of(file) if not adds and node.op_type in KINDS]
    fixed = _fixed(file)
    biases = [_bias(file, node, fixed) for node, _ in found]
    names = {name for _, name in found} | {bias[0] for bias in biases if bias is not None}
    held = weight_roles.constants(file)
    computed = [name for name in names if name not in held]
    numbers = {name: numpy_helper.to_array(held[name]) for name in names - {*computed}}
    if computed:
        numbers |= dict(zip(computed, runtime.run_constants(file, dict.fromkeys(computed)), strict=True))
    layers = []
    for (node, name), bias in zip(found, biases, strict=True):
        given = {each.name: each for each in node.attribute}
        weight = torch.tensor(numbers[name]) * (given["alpha"].f if "alpha" in given else 1)
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and not ("transB" in given and given["transB"].i)):
            weight = weight.mT
        if node.op_type == "ConvTranspose":
            weight = exchanged(weight, given["group"].i if "group" in given else 1)
        beta = given["beta"].f if "beta" in given else 1
        moved = None if bias is None else torch.tensor(numbers[bias[0]]) * beta
        layers.append(_Layer(name, node.input[0], node.output[0] if bias is None else bias[1], weight, moved))
    return layers


def _fixed(file: onnx.ModelProto) -> set[str]:
    held = set(weight_roles.constants(file))
    given = {each.name for each in file.graph.input} - held
    above = weight_roles.sources(file)
    return held | {name for name, own in above.items() if given.isdisjoint(own)}


def _bias(file: onnx.ModelProto, node: NodeProto, fixed: set[str]) -> tuple[str, str] | None:
    """What is added to a layer, and the value that has it: its third input, or a constant in the sum that reads it."""
    if len(node.input) > 2 and node.input[2]:
        return node.input[2], node.output[0]
    readers = [each for each in file.graph.node if node.output[0] in each.input]
    if node.op_type == "MatMul" and len(readers) == 1 and readers[0].op_type == "Add":
        own = [name for name in readers[0].input if name in fixed]
        return (own[0], readers[0].output[0]) if own else None
    return None
