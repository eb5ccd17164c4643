"""How each operator of torch.export becomes a canonical function, with its arguments in one form."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import OpOverload

from r2cli.graph.constants import operator_name
from r2cli.graph.differences import differences
from r2cli.graph.functions import FUNCTIONS, PAD_WITH, SLICE
from r2cli.graph.repeats import expand, repeat
from r2cli.graph.writer import Writer

Arguments = Mapping[str, Any]
Rule = Callable[[Writer, fx.Node, Arguments], Any]
# They do not change a value in evaluation.
NOTHING = (
    *("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "alias", "detach", "lift_fresh"),
    *("lift_fresh_copy", "positive", "lift", "requires_grad_"),
)
DIMENSIONS = ("dim", "dims", "dim0", "dim1", "axis0", "axis1")
SIZES = ("kernel_size", "stride", "padding", "dilation", "output_size")


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, with defaults."""
    assert isinstance(node.target, OpOverload)
    known = node.target._schema.arguments
    found = {each.name: each.default_value for each in known}
    found |= {each.name: given for each, given in zip(known, node.args, strict=False)} | node.kwargs
    return found | {"correction": int(bool(found["unbiased"]))} if "unbiased" in found else found


def plain(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    """A function of the table, with the operator's own arguments; the operator itself where there is no row."""
    name = operator_name(node.target)
    if name not in FUNCTIONS:
        return writer.create(
            "call_function", node.target, writer.value(node.args), writer.value(node.kwargs), _own_name(writer, name)
        )
    function, arguments = FUNCTIONS[name]
    placed, _, named = arguments.partition("|")
    given = [_argument(node, key, a.get(key)) for key in placed.split()]
    while name in ("sum", "argmax", "argmin", "max", "min", "softmax") and len(given) > 1 and given[-1] is None:
        given.pop()  # over all dimensions
    defaults = {each.name: each.default_value for each in node.target._schema.arguments}  # type: ignore[union-attr]
    extra = {key: a[key] for key in named.split() if key in a and a[key] != defaults.get(key)}
    values = list(writer.value(given))
    if a.get("dtype") is not None:  # the type that a sum is computed in
        values[0] = writer.call(Tensor.to, values[0], a["dtype"])
    return writer.call(function, *values, **writer.value(extra))


def _own_name(writer: Writer, name: str) -> str:
    return f"{writer.within}.{name.strip('_')}".lstrip(".")


def _argument(node: fx.Node, key: str, given: Any) -> Any:
    if key in DIMENSIONS:
        return _from_zero(node, given)
    if key in SIZES and isinstance(given, list | tuple | int):
        spatial = int(operator_name(node.target)[-2])
        sizes = tuple(given) if isinstance(given, list | tuple) else (given,)
        return (
            sizes * spatial if len(sizes) == 1 else sizes or _argument(node, "kernel_size", bind(node)["kernel_size"])
        )
    return given


def _from_zero(node: fx.Node, given: Any) -> Any:
    """Dimensions counted from 0."""
    first = node.args[0]
    one = first[0] if isinstance(first, list | tuple) else first
    ranks = one.meta["val"].ndim + (operator_name(node.target) in ("unsqueeze", "stack"))  # type: ignore[union-attr]
    if isinstance(given, list | tuple):
        return tuple(dim % ranks for dim in given)
    return given % ranks if isinstance(given, int) and ranks else given


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _first(a: Arguments) -> Any:
    return next(iter(a.values()))


# --- numbers -------------------------------------------------------------------------------------------------------


def _is_tensor(given: Any) -> bool:
    return isinstance(given, fx.Node) and isinstance(given.meta.get("val"), Tensor)


def add(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    first, second = writer.value(a["self"]), writer.value(a["other"])
    if a.get("alpha", 1) != 1:
        second = writer.call(torch.mul, second, a["alpha"]) if _is_tensor(a["other"]) else second * a["alpha"]
    return writer.call(torch.add, first, second)


def subtract(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    first, second, alpha = a["self"], a["other"], a.get("alpha", 1)
    if operator_name(node.target) == "rsub":
        first, second = second, first
    if not _is_tensor(first):  # number - x
        turned = writer.call(torch.neg, writer.value(second))
        return writer.call(torch.add, turned if alpha == 1 else writer.call(torch.mul, turned, alpha), first)
    if not _is_tensor(second) and isinstance(second, int | float):
        return writer.call(torch.add, writer.value(first), -second * alpha)
    taken = writer.value(second)
    return writer.call(torch.sub, writer.value(first), taken if alpha == 1 else writer.call(torch.mul, taken, alpha))


def divide(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    mode = "floor" if operator_name(node.target) == "floor_divide" else a.get("rounding_mode")
    rounding = {"rounding_mode": mode} if mode else {}
    return writer.call(torch.div, writer.value(a["self"]), writer.value(a["other"]), **rounding)


def clip(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    least, most = a.get("min", a.get("min_val")), a.get("max", a.get("max_val"))
    given = writer.value(a["self"])
    if least == 0 and most in (None, 6) and not isinstance(most, fx.Node):
        return writer.call(F.relu if most is None else F.relu6, given)
    return writer.call(torch.clamp, given, writer.value(least), writer.value(most))


def gated(gate: Callable[..., Any]) -> Rule:
    """x * gate(x), such as a swish: its parts can run on integers."""

    def write(writer: Writer, node: fx.Node, a: Arguments) -> Any:
        given = writer.value(a["self"])
        return writer.part(torch.mul, given, writer.part(gate, given))

    return write


def glu(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    dim = _from_zero(node, a["dim"])
    half = int(_shape(node)[dim])
    both = writer.call(torch.split, writer.value(a["self"]), [half, half], dim)
    first, second = (writer.call(operator.getitem, both, index) for index in (0, 1))
    return writer.call(torch.mul, first, writer.call(torch.sigmoid, second))


def added_product(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    """addcmul, addcdiv: beta * input + alpha * (one * other), or one / other."""
    base, one, other, *_ = writer.value(list(a.values()))
    function = torch.mul if operator_name(node.target) == "addcmul" else torch.div
    return with_base(writer, writer.call(function, one, other), base, a)


def with_base(writer: Writer, found: fx.Node, base: Any, a: Arguments) -> Any:
    """beta * base + alpha * found."""
    factor, share = a.get("alpha", a.get("value")), a.get("beta", 1)
    found = found if factor == 1 else writer.call(torch.mul, found, factor)
    if share == 0:
        return found
    return writer.call(torch.add, base if share == 1 else writer.call(torch.mul, base, share), found)


def softmax(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    name, given = operator_name(node.target).lstrip("_"), writer.value(a["self"])
    if node.meta["val"].dtype != a["self"].meta["val"].dtype:
        given = writer.call(Tensor.to, given, node.meta["val"].dtype)
    return writer.call(getattr(torch, name), given, _from_zero(node, a["dim"]))


def attention(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    """An attention, with keys and values that queries share as often as they are read."""
    given, heads = [], a["query"].meta["val"].ndim - 3
    for name in ("query", "key", "value"):
        value = writer.value(a[name])
        if a.get("enable_gqa") and (times := _shape(a["query"])[heads] // _shape(a[name])[heads]) > 1:
            value = writer.part(torch.repeat_interleave, value, times, heads)
        given.append(value)
    more = {name: writer.value(a[name]) for name in ("attn_mask", "is_causal", "scale")}
    return writer.call(F.scaled_dot_product_attention, *given, **more)


# --- shapes --------------------------------------------------------------------------------------------------------


def same(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    return writer.value(_first(a))


def cast(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    kind, given = node.meta["val"].dtype, _first(a)
    value = writer.value(given)
    return value if given.meta["val"].dtype == kind else writer.call(Tensor.to, value, kind)


def reshape(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    given, before, after = writer.value(_first(a)), _shape(_first(a)), _shape(node)
    if before == after:
        return given
    dynamic = [dim for dim, size in enumerate(after) if not isinstance(size, int)]
    if operator_name(node.target) == "flatten" or (len(after) == 2 and len(before) > 2 and _keeps_batch(before, after)):
        first = a.get("start_dim", 1) % max(len(before), 1)
        return writer.call(torch.flatten, given, first, a.get("end_dim", -1) % max(len(before), 1))
    if len(dynamic) == 1:
        return writer.call(torch.reshape, given, tuple(size if isinstance(size, int) else -1 for size in after))
    return writer.call(torch.reshape, given, tuple(writer.number(size) for size in after))


def _keeps_batch(before: Sequence[Any], after: Sequence[Any]) -> bool:
    return not isinstance(after[0], int) and bool(before[0] == after[0])


def squeeze(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    before = _shape(a["self"])
    given = a.get("dim", tuple(range(len(before))))
    dims = _from_zero(node, given if isinstance(given, list | tuple) else (given,))
    dims = tuple(dim for dim in dims if isinstance(before[dim], int) and before[dim] == 1)
    return writer.call(torch.squeeze, writer.value(a["self"]), dims) if dims else writer.value(a["self"])


def transpose(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    given, rank = writer.value(_first(a)), node.meta["val"].ndim
    return writer.call(torch.transpose, given, rank - 2, rank - 1) if rank > 1 else given


def moved(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    rank = node.meta["val"].ndim
    source, to = ([dim % rank for dim in ([x] if isinstance(x, int) else x)] for x in (a["source"], a["destination"]))
    rest = iter(dim for dim in range(rank) if dim not in source)
    order = tuple(source[to.index(dim)] if dim in to else next(rest) for dim in range(rank))
    return writer.call(torch.permute, writer.value(a["self"]), order)


def piece(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    """A slice, or narrow, with its ends within the size; all of it is the value itself."""
    before, after = _shape(a["self"]), _shape(node)
    dim, step = a["dim"] % len(before), a.get("step", 1)
    size, given = before[dim], writer.value(a["self"])
    if before[dim] == after[dim] and step == 1:
        return given
    start = writer.value(a["start"]) or 0
    if not isinstance(size, int) or not isinstance(start, int) or not isinstance(after[dim], int):
        end = (
            writer.value(a["end"])
            if "end" in a
            else writer.create("call_function", operator.add, (start, writer.value(a["length"])), {}, "size")
        )
        return writer.call(SLICE, given, dim, start, end, step)
    start = min(max(start + size if start < 0 else start, 0), size)
    return writer.call(SLICE, given, dim, start, min(start + after[dim] * step, size), step)


def split(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    given = writer.value(a["self"])
    dim = _from_zero(node, a["dim"])
    sizes = [part.shape[dim] for part in node.meta["val"]]
    known = all(isinstance(size, int) for size in sizes)
    return writer.call(torch.split, given, sizes, dim) if known else writer.call(torch.chunk, given, len(sizes), dim)


def padded(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    name, given = operator_name(node.target), writer.value(a["self"])
    pad = tuple(a.get("pad", a.get("padding")))
    if not any(pad):
        return given
    if name in ("pad", "constant_pad_nd"):
        mode, value = a.get("mode", "constant"), a.get("value")
    else:
        mode, value = {"reflection": "reflect", "replication": "replicate"}[name.partition("_")[0]], None
    if mode == "constant" and value:  # no zeros, which every grid has, and no values that are there
        return writer.call(PAD_WITH, given, pad, float(value))
    return writer.call(F.pad, given, pad, mode, 0.0 if mode == "constant" else None)


# --- pools ---------------------------------------------------------------------------------------------------------


def mean(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    """The mean of an image's height and width is a pool, for which runtimes have integer kernels."""
    rank, given = a["self"].meta["val"].ndim, writer.value(a["self"])
    dims = a.get("dim")
    dims = tuple(range(rank)) if dims is None or dims == [] else dims
    dims = tuple(sorted(dim % rank for dim in ([dims] if isinstance(dims, int) else dims)))
    if a["self"].meta["val"].dtype != node.meta["val"].dtype:
        given = writer.call(Tensor.to, given, node.meta["val"].dtype)
    if rank == 4 and dims == (2, 3):
        pooled = writer.call(F.adaptive_avg_pool2d, given, (1, 1))
        return pooled if a["keepdim"] else writer.call(torch.flatten, pooled, 1, 3)
    return writer.call(torch.mean, given, dims, bool(a.get("keepdim", False)))


def adaptive_mean(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    """An adaptive pool is an average pool where the size divides evenly, and nothing where it stays."""
    spatial = int(operator_name(node.target)[-2])
    before, after = _shape(a["self"])[-spatial:], _shape(node)[-spatial:]
    if before == after:
        return writer.value(a["self"])
    known = all(isinstance(size, int) for size in (*before, *after))
    if known and any(size != 1 for size in after) and not any(b % s for b, s in zip(before, after, strict=True)):
        window = tuple(b // s for b, s in zip(before, after, strict=True))
        pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[spatial]
        more = () if spatial == 1 else (None,)
        return writer.call(pool, writer.value(a["self"]), window, window, (0,) * spatial, False, True, *more)
    pool = FUNCTIONS[operator_name(node.target)][0]
    return writer.call(pool, writer.value(a["self"]), after)


def first_of_two(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    """A pool that gives indices too: without them where nothing reads them."""
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return writer.create(
            "call_function", node.target, writer.value(node.args), writer.value(node.kwargs), _own_name(writer, "pool")
        )
    function, arguments = FUNCTIONS[operator_name(node.target).removesuffix("_with_indices")]
    given = [a[key] for key in arguments.split()]
    return (writer.call(function, *writer.value([tuple(x) if isinstance(x, list) else x for x in given])),)


def interpolate(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    name = operator_name(node.target).strip("_")
    mode = name.removeprefix("upsample_").removesuffix("_aa").rstrip("123d").replace("_", "-")
    given = a.get("self", a.get("input"))
    before, after = _shape(given)[2:], _shape(node)[2:]
    scales = a.get("scale_factors") or [
        a.get(key) for key in ("scales_d", "scales_h", "scales_w", "scales") if key in a
    ]
    pairs = list(zip(before, after, strict=True))
    sizes: dict[str, Any] = {"size": after}
    if scales and None not in scales and any(b * s != n for (b, n), s in zip(pairs, scales, strict=True)):
        sizes = {"scale_factor": tuple(scales)}
    elif not any(n % b for b, n in pairs):  # which holds for inputs of other sizes too
        sizes = {"scale_factor": tuple(float(n // b) for b, n in pairs)}
    corners = {"align_corners": a["align_corners"]} if a.get("align_corners") is not None else {}
    smooth = {"antialias": True} if name.endswith("_aa") else {}
    return writer.call(F.interpolate, writer.value(given), **sizes, mode=mode, **corners, **smooth)


# --- constants whose size depends on the batch ------------------------------------------------------------------------


def filled(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    name = operator_name(node.target)
    value = a["fill_value"] if "fill_value" in a else 1 if "ones" in name else 0
    shape = tuple(writer.number(size) for size in _shape(node))
    device = writer.value(torch.device("cpu"))
    return writer.call(torch.full, shape, writer.value(value), dtype=node.meta["val"].dtype, device=device)


def counted(writer: Writer, node: fx.Node, a: Arguments) -> Any:
    ends = [writer.value(each) for each in (a.get("start", 0), a["end"], a.get("step", 1))]
    device = writer.value(torch.device("cpu"))
    return writer.call(torch.arange, *ends, dtype=node.meta["val"].dtype, device=device)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(NOTHING, same),
    **dict.fromkeys(("to", "_to_copy", "type_as"), cast),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unflatten", "view_as", "reshape_as", "flatten"), reshape),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    "repeat": repeat,
    **dict.fromkeys(("squeeze", "squeeze_"), squeeze),
    **dict.fromkeys(("t", "mT", "adjoint", "numpy_T"), transpose),
    **dict.fromkeys(("movedim", "moveaxis"), moved),
    **dict.fromkeys(("slice", "narrow"), piece),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split"), split),
    **dict.fromkeys(("pad", "constant_pad_nd"), padded),
    **{f"{kind}_pad{n}d": padded for kind in ("reflection", "replication") for n in (1, 2, 3)},
    "add": add,
    **dict.fromkeys(("sub", "rsub"), subtract),
    **dict.fromkeys(("div", "floor_divide"), divide),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh"), clip),
    "silu": gated(torch.sigmoid),
    "diff": differences,
    "hardswish": gated(F.hardsigmoid),
    "glu": glu,
    **dict.fromkeys(("addcmul", "addcdiv"), added_product),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), softmax),
    "scaled_dot_product_attention": attention,
    "mean": mean,
    **{f"adaptive_avg_pool{n}d": adaptive_mean for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": first_of_two for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": first_of_two for n in (1, 2, 3)},
    **{
        name: interpolate
        for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
        for name in (
            f"upsample_{kind}",
            f"_upsample_{kind}_aa",
            f"_upsample_{kind.replace('nearest', 'nearest_exact')}",
        )
    },
    **{f"{kind}{like}": filled for kind in ("zeros", "ones", "full") for like in ("", "_like")},
    **{f"new_{kind}": filled for kind in ("zeros", "ones", "full")},
    "arange": counted,
}
