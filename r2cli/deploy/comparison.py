"""The file beside the checkpoint's network, value by value: grids, biases, and all that is computed between grids.

A code on the edge of two may fall either way, and what follows differs then, so two runs of a whole network agree only
roughly. Here each part between grids is compared alone: torch computes it from the codes that the file's own run gave,
so nothing may differ but the order in which floats are summed. A grid of the file is found by its scale, its zero point
and its values, not by its name.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, fx

from r2cli.calibration.deployed import FakeQuantize
from r2cli.deploy import weight_roles
from r2cli.deploy.audit import Check
from r2cli.deploy.float_nodes import moves
from r2cli.errors import InputError
from r2cli.graph.edit import is_grid
from r2cli.quantized.grid import Grid
from r2cli.storage import schema
from r2cli.storage.checkpoint import LOGITS, Checkpoint
from r2cli.storage.input_spec import Given, places, split
from r2cli.storage.schema import Malformed

MAKE_CODES = ("ptq", "qat", "palettize")
Array = np.ndarray[Any, Any]
CODES = (*weight_roles.INTEGERS, onnx.TensorProto.UINT16, onnx.TensorProto.INT16)  # of values on grids
# Of a value's largest magnitude, for what torch and ONNX Runtime make of the same codes: sums in another order, and
# their own erf, exp and tanh, differ by some 1e-6. A ReLU that is lacking, or a shift by 0.1, is a thousandth and more.
BETWEEN_GRIDS = 1e-4
FOLLOWED = 8  # images of which every value on a grid is compared
FOLLOWED_PIXELS = 2**14  # of images whose values are held at once: at 224 pixels a mobile network has 100 MB of them
DECIDED = 0.99  # share of equal integers in an output of integers
# Of a step: a value this near to the edge between two codes may fall to either, and to no third. It is a share of the
# range: steps of 16 bits are as small as the noise of sums of floats.
EDGE = 1e-2
BIAS = 3e-7  # relative: a bias as int32 codes times a scale is rounded twice to float32


@dataclass(frozen=True)
class Rounding:
    """A value that the file puts on a grid: what QuantizeLinear reads, and what DequantizeLinear gives."""

    reads: str
    gives: str
    scale: float
    zero: int
    codes_scale: float  # QuantizeLinear's own
    codes_zero: int
    bounded: bool  # codes clipped in each channel, in the place of the value
    repeats: bool  # it reads a value that is on this grid already
    signed: bool  # INT8: no ReLU stands before it, where its codes are clipped as the ReLU would
    highest: int = 255  # its greatest code


def roundings(file: onnx.ModelProto) -> list[Rounding]:
    """Every value that the inlined `file` rounds as it runs, in its order."""
    held = weight_roles.constants(file)
    producer = {name: node for node in file.graph.node for name in node.output}
    found: dict[str, Rounding] = {}
    seen: set[tuple[str, ...]] = set()

    def parameters(node: onnx.NodeProto) -> tuple[float, int] | None:
        """The one scale and the one zero point that the file holds for a node; None where it holds others."""
        parts = [held[name] for name in node.input[1:] if name in held]
        if len(parts) < 2 or len(node.input) != 3 or parts[1].data_type not in CODES:
            return None
        scale, zero = map(onnx.numpy_helper.to_array, parts)
        if scale.size != 1 or zero.size != 1:
            return None
        # Grids of the checkpoint have unsigned codes.
        return float(scale.item()), int(zero.item()) - _ends(parts[1])[0]

    for node in file.graph.node:
        given = parameters(node) if node.op_type == "DequantizeLinear" else None
        if given is None:
            continue
        codes, bounded = producer.get(node.input[0]), False
        signed, ends = held[node.input[2]].data_type == TensorProto.INT8, _ends(held[node.input[2]])
        highest = ends[1] - ends[0]
        while codes is not None and codes.op_type in ("Clip", "Min"):
            bounded |= codes.op_type == "Min"
            if codes.op_type == "Clip" and codes.input[2] in held:
                highest = int(onnx.numpy_helper.to_array(held[codes.input[2]]).item()) - ends[0]
            codes = producer.get(codes.input[0])
        taken = parameters(codes) if codes is not None and codes.op_type == "QuantizeLinear" else None
        if codes is None or taken is None:
            continue
        (scale, zero), origin = given, codes.input[0]
        while origin in producer and moves(producer[origin]):
            origin = producer[origin].input[0]
        before = found.get(origin)
        repeats = before is not None and (before.scale, before.zero) == given == taken
        repeats |= tuple(node.input) in seen  # another reader's
        seen.add(tuple(node.input))
        own = Rounding(codes.input[0], node.output[0], scale, zero, *taken, bounded, repeats, signed, highest)
        found[node.output[0]] = own
    return list(found.values())


def _ends(zero_point: TensorProto) -> tuple[int, int]:
    """The least and the greatest code of a zero point's type."""
    kind = onnx.numpy_helper.to_array(zero_point).dtype
    return int(np.iinfo(kind).min), int(np.iinfo(kind).max)


class _Forced(fx.Interpreter):
    """The checkpoint's network from grid to grid, each grid's value that of the file."""

    def __init__(self, net: fx.GraphModule, rounded: list[Rounding], values: Mapping[str, Tensor]) -> None:
        super().__init__(net)
        self.free, self.values = [each for each in rounded if not each.repeats], values
        self.lost: list[str] = []  # grids of the checkpoint that the file lacks
        self.differ: list[str] = []  # values that the file computes otherwise

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, FakeQuantize):
            return self._on_grid(str(target), module, *args)
        return super().call_module(target, args, kwargs)

    def _on_grid(self, target: str, module: FakeQuantize, x: Tensor) -> Tensor:
        expected: Tensor = module(x)
        name = target.partition(".")[2]
        scale, zero = float(module.scale), int(module.zero_point)
        alike = [r for r in self.free if (r.scale, r.zero) == (scale, zero) and self._fits(r, x)]
        if not alike and float((x - expected).abs().max()) <= BETWEEN_GRIDS * scale:
            return expected  # the values are on this grid already, and the file moves them only
        if not alike:
            self.lost.append(f"'{name}' (scale {scale:.6g}, zero point {zero})")
            return expected
        place = x / scale

        def unlike(rounding: Rounding) -> tuple[int, int]:
            # Not by the codes that differ alone: where a whole value lies at edges, half of its codes may be others.
            given = self.values[rounding.gives].reshape(x.shape)
            wrong, moved = _wrong(given, expected, place, module.grid), _moved(given, expected, scale)
            return int(wrong.sum()), int(moved.sum())

        best = min(alike, key=unlike)
        self.free.remove(best)
        given: Tensor = self.values[best.gives].reshape(x.shape)
        self._compare(name, best, x, module.grid)
        if bool(_wrong(given, expected, place, module.grid).any()):
            self.differ.append(f"'{name}'")
        return given

    def _fits(self, rounding: Rounding, x: Tensor) -> bool:
        given = self.values[rounding.gives]
        return given.numel() == x.numel() and given.shape[:1] == x.shape[:1]

    def _compare(self, name: str, rounding: Rounding, x: Tensor, grid: Grid) -> None:
        scale = float(grid.scale)
        if rounding.bounded or rounding.reads not in self.values:
            return
        before = self.values[rounding.reads].reshape(x.shape)
        if (rounding.signed or grid.bits < 8) and rounding.codes_scale == rounding.scale:
            # A ReLU that changes nothing on the grid, which ends where it does, is not in the file.
            low, high = ((code - rounding.zero) * scale for code in (grid.lowest, grid.highest))
            before, x = (value.clamp(low, high) for value in (before, x))
        if rounding.codes_scale != rounding.scale:  # a hard sigmoid: its sum on six times the grid, which clips it
            low, high = -rounding.zero * scale, (255 - rounding.zero) * scale
            before, x = (before / (rounding.codes_scale / scale)).clamp(low, high), x.clamp(low, high)
        if not _equal(before, x):
            self.differ.append(f"'{name}'")


def _moved(given: Tensor, expected: Tensor, scale: float) -> Tensor:
    """Which codes are not those that torch has."""
    return (given - expected).abs() > 0.5 * scale


def _wrong(given: Tensor, expected: Tensor, place: Tensor, grid: Grid) -> Tensor:
    """Which codes are other ones where the value, at `place` in steps, is not at the edge between the two."""
    scale = float(grid.scale)
    if grid.bits > 8:
        wide: Tensor = (given - expected).abs() > (1 + EDGE * 2 ** (grid.bits - 8)) * scale
        return wide
    inside = (place - place.floor() - 0.5).abs() > EDGE
    far = (given - expected).abs() > 1.5 * scale
    return far | (_moved(given, expected, scale) & inside)


def _equal(found: Tensor, expected: Tensor) -> bool:
    if not found.is_floating_point():  # decisions, where values are near each other
        return float((found == expected).double().mean()) >= DECIDED
    return float((found - expected).abs().max()) <= BETWEEN_GRIDS * max(float(expected.abs().max()), 1e-30)


@torch.no_grad()
def between_grids(
    net: fx.GraphModule,
    images: Given,
    file: onnx.ModelProto,
    values: Mapping[str, Tensor],
    optimised: Mapping[str, Tensor],
) -> list[Check]:
    """'same grids' and 'same graph': whether each part of the file is that of `net`, the checkpoint's network.

    `values` is what a session without optimisation made of `images`, by name: the file's result and all that `exposed`
    names. `optimised` is what a session at its default made of them: the result and all that `coded_values` names. A
    code may be another one than torch's only where the value is at the edge between the two (`EDGE`).
    """
    rounded = roundings(file)
    forced = _Forced(net, rounded, values)
    results = _by_name(file, forced.run(*places(images)))
    grids = len({node.target for node in net.graph.nodes if is_grid(node)})
    strange = [r for r in rounded if not _same_parameters(r)]
    problem = ""
    if forced.lost:
        problem = f"the checkpoint's grid {forced.lost[0]} is on no value of the file"
    elif forced.free:
        one = forced.free[0]
        problem = f"the file has a grid that the checkpoint has not (scale {one.scale:.6g}, zero point {one.zero})"
    elif strange:
        one = strange[0]
        problem = f"a value is put on a grid of scale {one.codes_scale:.6g} and read from one of {one.scale:.6g}"
    checks = [Check("same grids", not problem, problem or f"{grids} grids of values, scale and zero point equal")]
    forced.differ += [f"the output '{name}'" for name, result in results.items() if not _equal(values[name], result)]
    told = f"each part within {BETWEEN_GRIDS:g} of torch's from the same codes, as written and optimised"
    fused = _Forced(net, rounded, optimised)
    results = _by_name(file, fused.run(*places(images)))
    fused.differ += [f"the output '{name}'" for name, result in results.items() if not _equal(optimised[name], result)]
    if forced.differ:
        told = f"the file computes {forced.differ[0]} otherwise than the checkpoint's network, from the same codes"
    elif fused.differ:
        told = f"ONNX Runtime's optimisation computes {fused.differ[0]} otherwise than the file, from the same codes"
    return [*checks, Check("same graph", not (forced.differ or fused.differ), told)]


def in_parts(
    net: fx.GraphModule,
    images: Given,
    file: onnx.ModelProto,
    written: Callable[..., Mapping[str, Tensor]],
    optimised: Callable[..., Mapping[str, Tensor]],
) -> list[Check]:
    """`between_grids` of `images`, a few at a time. The functions give values by name for inputs by place."""
    at_once = max(1, FOLLOWED_PIXELS // max(one[0, 0].numel() if one.ndim > 1 else 1 for one in places(images)))
    told: dict[str, Check] = {}
    for few in split(images, at_once):
        own = written(*places(few)), optimised(*places(few))
        for check in between_grids(net, few, file, *own):
            if told.setdefault(check.name, check).passed:  # the first that fails is told
                told[check.name] = check
    return list(told.values())


def _by_name(file: onnx.ModelProto, outputs: Given) -> dict[str, Tensor]:
    """What a network gives, by the names of the file's outputs."""
    return dict(zip((each.name for each in file.graph.output), places(outputs), strict=True))


def _same_parameters(rounding: Rounding) -> bool:
    same = rounding.codes_zero == rounding.zero
    return same and rounding.codes_scale in (rounding.scale, float(np.float32(6) * np.float32(rounding.scale)))


def exposed(file: onnx.ModelProto) -> list[str]:
    """The values of the file that `between_grids` wants."""
    own = {each.name for each in (*file.graph.input, *file.graph.output)}
    names = dict.fromkeys(name for each in roundings(file) for name in (each.reads, each.gives))
    return [name for name in names if name not in own]


def coded_values(file: onnx.ModelProto) -> list[str]:
    """The values of the file that `between_grids` wants of an optimised session: reading others would hinder it."""
    own = {each.name for each in (*file.graph.input, *file.graph.output)}
    return [name for name in dict.fromkeys(each.gives for each in roundings(file)) if name not in own]


def same_biases(file: onnx.ModelProto, checkpoint: Checkpoint) -> Check:
    """Each bias of a layer with codes, and each norm's parameters, are the checkpoint's numbers."""
    held = weight_roles.constants(file)
    made = {name: node for node in file.graph.node for name in node.output}
    floats = [tensor.numpy().reshape(-1) for tensor in checkpoint.floats.values() if tensor.is_floating_point()]
    count = 0
    for node in file.graph.node:
        if node.op_type in ("BatchNormalization", "LayerNormalization"):
            for name in node.input[1:]:
                own = _constant(name, held, made)
                if (
                    own is not None
                    and np.ptp(own)
                    and not any(np.array_equal(own.reshape(-1), each) for each in floats)
                ):
                    return Check("same biases", False, f"{name} of a {node.op_type} is no tensor of the checkpoint")
        weight = _weight(node, checkpoint.coded, made)
        if weight is None:
            continue
        name = f"{weight.removesuffix('.weight')}.bias"
        expected, found = checkpoint.floats.get(name), _bias(file, node, held, made)
        if expected is None:
            if found is not None and np.any(found) and node.op_type != "MatMul":
                return Check("same biases", False, f"the file has {name}, which the checkpoint has not")
            continue
        count += 1
        if found is None and not bool(expected.any()):  # a bias of zeros needs no input in the file
            continue
        same = found is not None and found.size == expected.numel()
        if not same or not np.allclose(found.reshape(-1), expected.numpy(), rtol=BIAS, atol=0):  # type: ignore[union-attr]
            return Check("same biases", False, f"{name} has other numbers than the checkpoint's")
    return Check("same biases", True, f"{count} biases of layers equal, and all parameters of norms")


def _weight(node: onnx.NodeProto, coded: Mapping[str, Any], made: Mapping[str, onnx.NodeProto]) -> str | None:
    """The weight with codes that the layer `node` reads, as it is or transposed."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    turned = [made[name].input[0] for name in node.input if name in made and made[name].op_type == "Transpose"]
    return next((name for name in (*node.input, *turned) if name in coded), None)


def _bias(
    file: onnx.ModelProto, node: onnx.NodeProto, held: Mapping[str, Any], made: Mapping[str, onnx.NodeProto]
) -> Array | None:
    """What is added to the layer `node`: its own third input, or a constant in the sum that reads a product."""
    if node.op_type != "MatMul":
        return _constant(node.input[2], held, made) if len(node.input) > 2 else None
    for reader in file.graph.node:
        if reader.op_type == "Add" and node.output[0] in reader.input:
            for name in reader.input:
                value = _constant(name, held, made)
                if value is not None:
                    return value
    return None


def _constant(name: str, held: Mapping[str, Any], made: Mapping[str, onnx.NodeProto]) -> Array | None:
    """The numbers of a constant, from codes where it has them; None for anything else."""
    if name in held:
        return onnx.numpy_helper.to_array(held[name])
    node = made.get(name)
    if node is None or node.op_type != "DequantizeLinear" or not all(part in held for part in node.input):
        return None
    codes, scale = (onnx.numpy_helper.to_array(held[part]) for part in node.input[:2])
    decoded: Array = codes.astype(np.float32) * scale
    return decoded


def require_codes(file: onnx.ModelProto, checkpoint: Checkpoint) -> None:
    """Raise InputError for a float checkpoint beside a file that says which command made its codes."""
    found = next((entry.value for entry in file.metadata_props if entry.key == "r2.history"), "[]")
    try:
        history = schema.parsed(found)
    except Malformed:
        return  # which `same_metadata` says
    commands = (
        [entry.get("command") for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    )
    work = next((command for command in commands if command in MAKE_CODES), None)
    if work is not None and not checkpoint.coded:
        raise InputError(
            f"{checkpoint.origin} is float, and the file holds codes that r2 {work} made: give the "
            "checkpoint that it wrote beside the file"
        )


def same_metadata(file: onnx.ModelProto, checkpoint: Checkpoint) -> Check:
    """What the file says of itself, how to feed it above all, is what the checkpoint says."""
    expected = {
        "r2.class_names": checkpoint.class_names,
        "r2.history": checkpoint.history,
        "r2.input": checkpoint.input.described(),
        "r2.model": checkpoint.model.described(),
        "r2.target": checkpoint.target,
    }
    if checkpoint.outputs != LOGITS:
        expected["r2.outputs"] = checkpoint.outputs
    found = {entry.key: entry.value for entry in file.metadata_props}
    for key in sorted({*expected, *found}):
        if key not in found:
            return Check("same metadata", False, f"the file lacks '{key}'")
        try:
            same = key in expected and schema.parsed(found[key]) == json.loads(json.dumps(expected[key]))
        except Malformed:
            same = False
        if not same:
            return Check("same metadata", False, f"'{key}' is not what the checkpoint says")
    return Check("same metadata", True, "input, classes, network and history as the checkpoint's")


def with_float(check: Check, decibels: float | None, *, stated: bool) -> Check:
    """`check` of parity, and how far the network is from the user's float one, or that this was not compared."""
    if not stated:
        return check
    told = "not compared with a float network" if decibels is None else f"{decibels:.0f} dB from your float network"
    return replace(check, detail=f"{check.detail}; {told}")
