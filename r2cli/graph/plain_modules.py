"""Layers and norms of a canonical graph: torch's plain modules, made of an operator's arguments and the parameters.

Whatever class, subclass or function computed them in the network, here they are one of a few classes.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from r2cli.errors import InputError
from r2cli.graph.constants import Constant, operator_name
from r2cli.graph.recurrent import KINDS, RecurrentWeight, recurrent
from r2cli.graph.transposed import TransposedConv, exchanged
from r2cli.graph.writer import Unknown, Writer

CONVOLUTIONS: Mapping[str, Any] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": TransposedConv,
    "conv_transpose2d": TransposedConv,
    "conv_transpose3d": TransposedConv,
}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
Arguments = Mapping[str, Any]


def constant_of(argument: Any) -> Constant | None:
    return argument.meta.get("constant") if isinstance(argument, fx.Node) else None


def _given(*arguments: Any) -> bool:
    """Whether each argument is a constant tensor, or None."""
    return all(argument is None or constant_of(argument) is not None for argument in arguments)


def _call(writer: Writer, node: fx.Node, given: Any, made_of: Any, of: Constant | None, make: Any) -> fx.Node:
    target = writer.layer(made_of, of, make, operator_name(node.target))
    return writer.create("call_module", target, (writer.value(given),), {}, target)


def _with(writer: Writer, module: nn.Module, **tensors: Constant | None) -> nn.Module:
    """`module` with these parameters, None for none."""
    for name, constant in tensors.items():
        setattr(module, name, None if constant is None else writer.parameter(constant))
    return module


def convolution(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    name = operator_name(node.target)
    weight, bias = constant_of(a["weight"]), constant_of(a["bias"])
    if weight is None or not _given(a["bias"]):
        return None
    transposed, groups = name.startswith("conv_transpose"), a["groups"]
    rank = weight.value.ndim - 2
    sizes = {key: _each(a[key], rank) for key in ("stride", "padding", "dilation")}
    given = a["input"]
    if isinstance(a["padding"], str):
        sizes["padding"], uneven = _same(weight.value, sizes["dilation"], a["padding"])
        if any(uneven):
            given = writer.call(torch.nn.functional.pad, writer.value(given), uneven, "constant", 0.0)
    if transposed:
        sizes["output_padding"] = _each(a["output_padding"], rank)
        weight = _outputs_first(weight, groups)
    outputs, inputs, *kernel = weight.value.shape

    def make(_path: str) -> nn.Module:
        if transposed:
            return _with(writer, TransposedConv(weight.value, groups, sizes), weight=weight, bias=bias)
        # On the meta device: its own weights would be initialised for nothing.
        module = CONVOLUTIONS[name](
            inputs * groups, outputs, tuple(kernel), **sizes, groups=groups, bias=False, device="meta"
        )
        return _with(writer, module, weight=weight, bias=bias)

    return _call(writer, node, given, (name, weight, bias, groups, *sizes.values()), weight, make)


def _outputs_first(weight: Constant, groups: int) -> Constant:
    """The weight of a transposed convolution as `TransposedConv` has it, with the name that it has in the network."""
    if weight.transposed is None:
        turned = exchanged(weight.value.detach(), groups).contiguous()
        weight.transposed = Constant(turned, weight.name, weight.own, weight.trained)
    return weight.transposed


def _each(size: Any, rank: int) -> tuple[int, ...]:
    if isinstance(size, str):
        return (0,) * rank
    given = tuple(size) if isinstance(size, list | tuple) else (size,)
    return given * rank if len(given) == 1 else given


def _same(weight: Tensor, dilation: tuple[int, ...], padding: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding 'same' in numbers: on both sides, or before the convolution where the sides differ."""
    if padding == "valid":
        return (0,) * len(dilation), ()
    total = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    if all(size % 2 == 0 for size in total):
        return tuple(size // 2 for size in total), ()
    return (0,) * len(total), tuple(part for size in reversed(total) for part in (size // 2, size - size // 2))


def linear(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    weight, bias = constant_of(a["weight"]), constant_of(a["bias"])
    if weight is None or not _given(a["bias"]) or weight.value.ndim != 2:
        return None
    return linear_layer(writer, node, a["input"], weight, bias)


def product_and_bias(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    matrix, bias = constant_of(a["mat2"]), constant_of(a["self"])
    if matrix is None or bias is None or bias.value.ndim != 1 or a["beta"] != 1 or a["alpha"] != 1:
        return None
    return linear_layer(writer, node, a["mat1"], transpose(matrix), bias)


def transpose(matrix: Constant) -> Constant:
    if matrix.transposed is None:
        turned = matrix.value.detach().t().contiguous()
        matrix.transposed = Constant(turned, weight_name(matrix), False, matrix.trained)
    return matrix.transposed


def weight_name(constant: Constant) -> str:
    """The name of a layer's weight that is `constant` in another order: below the network's own parameter."""
    return f"{constant.name}.weight" if constant.own and not constant.name.endswith("weight") else constant.name


def linear_layer(writer: Writer, node: fx.Node, given: Any, weight: Constant, bias: Constant | None) -> fx.Node:
    """A linear layer of `given`, (..., inputs), with `weight`, (outputs, inputs)."""

    def make(_path: str) -> nn.Module:
        outputs, inputs = weight.value.shape
        return _with(writer, nn.Linear(inputs, outputs, bias=False, device="meta"), weight=weight, bias=bias)

    return _call(writer, node, given, ("linear", weight, bias), weight, make)


def convolution_of_one_place(writer: Writer, node: fx.Node, given: Any, weight: Constant, groups: int) -> fx.Node:
    """A convolution of `given`, (n, inputs, places), with `weight`, (outputs, inputs / groups, 1)."""
    outputs, inputs, kernel = weight.value.shape

    def make(_path: str) -> nn.Module:
        module = nn.Conv1d(inputs * groups, outputs, kernel, groups=groups, bias=False, device="meta")
        return _with(writer, module, weight=weight)

    return _call(writer, node, given, ("conv1d", weight, groups), weight, make)


def batch_norm(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    parts = {name: constant_of(a[name]) for name in ("weight", "bias", "running_mean", "running_var")}
    if a["training"]:  # in evaluation too
        raise InputError(
            f"the BatchNorm '{writer.within}' uses no running statistics, so its result depends on the batch: let it "
            "track them (track_running_stats=True) and train it so, or write a GroupNorm"
        )
    if not _given(*(a[name] for name in parts)):
        return None
    given, of = a["input"], parts["weight"] or parts["bias"] or parts["running_mean"]
    channels = int(given.meta["val"].shape[1])

    def make(path: str) -> nn.Module:
        made = NORMS[given.meta["val"].ndim](channels, a["eps"], a["momentum"] or None, device="meta")
        module = _with(writer, made, weight=parts["weight"], bias=parts["bias"])
        for name in ("running_mean", "running_var"):
            constant = parts[name]
            setattr(module, name, None if constant is None else constant.value)
        module.num_batches_tracked = _batches(writer.model, path)  # type: ignore[assignment]
        return module

    named = of
    if of is not None and of.own and of is not parts["weight"]:
        named = Constant(of.value, f"{of.name.rpartition('.')[0]}.weight", True, of.trained)
    return _call(writer, node, given, ("batch_norm", *parts.values(), a["eps"]), named, make)


def _batches(model: nn.Module, path: str) -> Tensor | None:
    """The network's own count of batches, so that its state_dict has the same names."""
    try:
        known = model.get_submodule(path)
    except AttributeError:
        return torch.tensor(0)
    count = getattr(known, "num_batches_tracked", torch.tensor(0))
    return count if isinstance(count, Tensor) else None


def layer_norm(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    weight, bias = constant_of(a["weight"]), constant_of(a["bias"])
    if not _given(a["weight"], a["bias"]):
        return None
    shape = tuple(a["normalized_shape"])

    def make(_path: str) -> nn.Module:
        module = nn.LayerNorm(shape, a["eps"], elementwise_affine=False)
        module.elementwise_affine = weight is not None
        return _with(writer, module, weight=weight, bias=bias)

    return _call(writer, node, a["input"], ("layer_norm", weight, bias, shape, a["eps"]), weight, make)


def group_norm(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    weight, bias = constant_of(a["weight"]), constant_of(a["bias"])
    if not _given(a["weight"], a["bias"]):
        return None
    groups, channels = a["num_groups"], int(a["input"].meta["val"].shape[1])

    def make(_path: str) -> nn.Module:
        module = nn.GroupNorm(groups, channels, a["eps"], affine=False)
        module.affine = weight is not None
        return _with(writer, module, weight=weight, bias=bias)

    return _call(writer, node, a["input"], ("group_norm", weight, bias, groups, a["eps"]), weight, make)


def instance_norm(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    """A GroupNorm with a group for each channel, or a BatchNorm where it tracked statistics."""
    if not a["use_input_stats"]:
        return batch_norm(writer, node, {**a, "training": False})
    return group_norm(writer, node, {**a, "num_groups": int(a["input"].meta["val"].shape[1])})


def embedding(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    weight = constant_of(a["weight"])
    if weight is None:
        return None
    padding, (rows, width) = a["padding_idx"] if a["padding_idx"] >= 0 else None, weight.value.shape

    def make(_path: str) -> nn.Module:
        return _with(writer, nn.Embedding(rows, width, padding, device="meta"), weight=weight)

    return _call(writer, node, a["indices"], ("embedding", weight, padding), weight, make)


def prelu(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node | None:
    weight = constant_of(a["weight"])
    if weight is None:
        return None

    def make(_path: str) -> nn.Module:
        return _with(writer, nn.PReLU(weight.value.numel(), device="meta"), weight=weight)

    return _call(writer, node, a["self"], ("prelu", weight), weight, make)


def recurrent_layer(writer: Writer, node: fx.Node, a: Arguments) -> fx.Node:
    kind, given = operator_name(node.target), a.get("params")
    directions = a["num_layers"] * (1 + a["bidirectional"])
    if given is None or "input" not in a or len(given) != directions * (4 if a["has_biases"] else 2):
        raise Unknown(f"its {kind} reads packed sequences, or projects its state")
    if a["input"].meta["val"].ndim != 3:
        raise Unknown(f"its {kind} reads a sequence without a batch")
    states = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
    first = None if all(map(_zeros, writer.value(states))) else writer.value(states)
    weights = [_recurrent_weight(writer, one) for one in given]
    return writer.part(
        recurrent, kind, writer.value(a["input"]), first, weights, a["num_layers"], a["bidirectional"], a["batch_first"]
    )


def recurrent_cell(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    """A cell of nn.GRUCell and its kin: its layer, of one step."""
    kind = operator_name(node.target).replace("_cell", "")
    states = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
    given = [a["w_ih"], a["w_hh"], *(a[name] for name in ("b_ih", "b_hh") if a[name] is not None)]
    steps = writer.part(torch.unsqueeze, writer.value(a["input"]), 1)
    first = [writer.part(torch.unsqueeze, writer.value(state), 0) for state in states]
    weights = [_recurrent_weight(writer, one) for one in given]
    found = writer.part(recurrent, kind, steps, first, weights, 1, False, True)
    last = tuple(
        writer.part(torch.squeeze, writer.part(operator.getitem, found, 1 + place), (0,))
        for place in range(len(states))
    )
    return last if kind == "lstm" else last[0]


def _zeros(state: Any) -> bool:
    return isinstance(state, fx.Node) and state.target is torch.full and bool(state.args[1] == 0)


def _recurrent_weight(writer: Writer, argument: Any) -> Any:
    """A matrix as a module of its own; a bias, or what depends on the input, as it is."""
    weight = constant_of(argument)
    if weight is None or weight.value.ndim != 2:
        return writer.value(argument)
    target = writer.layer(
        ("recurrent", weight), weight, lambda _: _with(writer, RecurrentWeight(), weight=weight), "weight"
    )
    if target not in writer.read_weights:  # a cell reads the same ones at every step
        writer.read_weights[target] = writer.create("call_module", target, (), {}, target)
    return writer.read_weights[target]


# By the operator: what writes it as a module, or gives None where its tensors depend on the input.
LAYER_RULES: Mapping[str, Callable[[Writer, fx.Node, Arguments], Any]] = {
    **dict.fromkeys(CONVOLUTIONS, convolution),
    "linear": linear,
    "batch_norm": batch_norm,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "embedding": embedding,
    "prelu": prelu,
    **dict.fromkeys(KINDS, recurrent_layer),
    **dict.fromkeys((f"{kind}_cell" for kind in KINDS), recurrent_cell),
}
