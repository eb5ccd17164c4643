"""A checkpoint as an ONNX file with integer weights, in standard operators.

torch exports the network with its parameters under their own names and nothing folded; then the initializer of every
coded weight is replaced by what its codec says, so no float weight is left to be quantized again, and no second
description of the network exists. Opset 21, IR 10. The forms of codes are in `onnx_codes.py`; activations are UINT8,
with a Clip of codes below 8 bits.
"""

import json
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from r2cli.calibration import deployed
from r2cli.deploy import onnx_functions, onnx_text, weight_nodes
from r2cli.deploy.weight_nodes import initializer
from r2cli.errors import R2Error
from r2cli.graph import edit, operators, structure
from r2cli.graph.channel_clip import Clip
from r2cli.quantized.channels import per_channel
from r2cli.quantized.coded import Codec, Coded
from r2cli.quantized.grid import Grid
from r2cli.storage.checkpoint import Checkpoint

OPSET, IR_VERSION = 21, 10
INPUT, OUTPUT = "input", "logits"


def to_bytes(checkpoint: Checkpoint) -> bytes:
    """The ONNX file of `checkpoint`: input float32 (batch, channels, size, size), of text int64 (batch, 3, size) of
    tokens; logits float32 (batch, classes).

    The same bytes for equal checkpoints. Raises R2Error where torch cannot export the network, or a weight is lost.
    """
    net = deployed.network(checkpoint)
    coded = checkpoint.coded
    if isinstance(net, fx.GraphModule):
        _standard_operators(net)
    model = _export(net, checkpoint.input.blank(2))
    _simplify(model, coded)
    _put_codes(model, coded, read_as_float=not checkpoint.activations)
    _round_last_bias(model)
    _clean(model, checkpoint)
    file = ir.to_proto(model)
    onnx_text.shorten_integers(file)
    onnx_functions.outline(file, checkpoint.coded.keys())
    content: bytes = file.SerializeToString(deterministic=True)
    return content


# --- the float graph -----------------------------------------------------------------------------------------------


class _GlobalAveragePool(nn.Module):
    """The mean of every channel: (n, c, h, w) to (n, c, 1, 1), or to (n, c) where `flat`.

    torch would write a ReduceMean, which stays float.
    """

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            return x.mean((2, 3))
        mean = torch.onnx.ops.symbolic("GlobalAveragePool", (x,), dtype=x.dtype, shape=(*x.shape[:2], 1, 1))
        return mean.flatten(1) if self.flat else mean


class _QuantizeDequantize(nn.Module):
    """An `OnGrid` as QuantizeLinear, for less than 8 bits a Clip of the codes, and DequantizeLinear.

    `most` (channels,) are bounds of a `Clip` before it: rounding keeps order, so codes are clipped in their place, and
    runtimes stay in integers.
    """

    scale: Tensor
    zero_point: Tensor
    lowest: Tensor
    highest: Tensor
    most: Tensor

    def __init__(self, grid: Grid, most: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point.to(torch.uint8))
        self.register_buffer("lowest", torch.tensor(grid.lowest, dtype=torch.uint8))
        self.register_buffer("highest", torch.tensor(grid.highest, dtype=torch.uint8))
        self.register_buffer("most", torch.tensor(grid.highest) if most is None else grid.encode(most))
        self.clips, self.bounds = grid.bits < 8, bool((self.most < grid.highest).any())

    def forward(self, x: Tensor) -> Tensor:
        symbolic, shape = torch.onnx.ops.symbolic, x.shape
        codes = symbolic("QuantizeLinear", (x, self.scale, self.zero_point), dtype=torch.uint8, shape=shape)
        if self.clips:
            codes = symbolic("Clip", (codes, self.lowest, self.highest), dtype=torch.uint8, shape=shape)
        if self.bounds:
            most = per_channel(self.most, x.ndim - 1)
            codes = symbolic("Min", (codes, most), dtype=torch.uint8, shape=shape)
        return symbolic("DequantizeLinear", (codes, self.scale, self.zero_point), dtype=torch.float32, shape=shape)


class _Relu6(nn.Module):
    """Clip to [0, 6], any shape. What torch makes of its own under symbolic shapes takes most of an export's time."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(6.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic("Clip", (x, self.low, self.high), dtype=x.dtype, shape=x.shape)


class _HardSigmoid(nn.Module):
    """min(max(x / 6 + 1 / 2, 0), 1), any shape. On a grid: the sum x + 3 on six times that grid, which clips it."""

    three: Tensor
    third: Tensor
    scale: Tensor
    zero_point: Tensor
    sixfold: Tensor

    def __init__(self, grid: Grid | None) -> None:
        super().__init__()
        self.on_grid = grid is not None
        if grid is not None:
            self.register_buffer("three", torch.tensor(255, dtype=torch.uint8))
            self.register_buffer("third", torch.tensor(3 / 255))
            self.register_buffer("scale", grid.scale)
            self.register_buffer("zero_point", grid.zero_point.to(torch.uint8))
            self.register_buffer("sixfold", 6 * grid.scale)

    def forward(self, x: Tensor) -> Tensor:
        symbolic, shape = torch.onnx.ops.symbolic, x.shape
        if not self.on_grid:
            return symbolic("HardSigmoid", (x,), {"alpha": 1 / 6}, dtype=x.dtype, shape=shape)
        zero: Tensor = self.zero_point
        three = symbolic("DequantizeLinear", (self.three, self.third, zero), dtype=torch.float32, shape=())
        total = symbolic("Add", (x, three), dtype=torch.float32, shape=shape)
        codes = symbolic("QuantizeLinear", (total, self.sixfold, zero), dtype=torch.uint8, shape=shape)
        return symbolic("DequantizeLinear", (codes, self.scale, zero), dtype=torch.float32, shape=shape)


def _standard_operators(net: fx.GraphModule) -> None:
    """Put in place of modules the operators that runtimes have integer kernels for; in place."""

    def replacement(node: fx.Node) -> nn.Module | None:
        module = operators.module_of(net, node)
        if isinstance(module, deployed.OnGrid):
            return _QuantizeDequantize(module.grid, bounds.get(node))
        if isinstance(module, Clip) and all(user in bounds for user in node.users):
            return nn.ReLU()
        if operators.is_a(net, node, (nn.ReLU6, F.relu6)):
            return _Relu6()
        if operators.is_a(net, node, (nn.Hardsigmoid, F.hardsigmoid)):
            return _HardSigmoid(None)
        if _is_global_mean(net, node):
            return _GlobalAveragePool(flat=not operators.is_a(net, node, (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d)))
        return None

    _pool_on_grids(net)
    edit.repeat_grids(net)
    _join_hard_sigmoids(net)
    clips = {node: operators.module_of(net, node) for node in net.graph.nodes}
    on_grids = [node for node, module in clips.items() if isinstance(module, deployed.OnGrid)]
    bounds = {n: c.high for n in on_grids if isinstance(c := clips[n.all_input_nodes[0]], Clip)}
    edit.replace_calls(net, replacement)


def _pool_on_grids(net: fx.GraphModule) -> None:
    """Write a mean over an image that goes to a grid as a pooling, its grid, and a flatten: runtimes have the first on
    integers; in place."""
    for node in list(net.graph.nodes):
        user = structure.only_user(node)
        if user is None or not edit.is_grid(user) or not operators.is_a(net, node, (torch.mean, "mean")):
            continue
        if _is_global_mean(net, node):
            with net.graph.inserting_before(node):
                pooled = net.graph.call_function(F.adaptive_avg_pool2d, (node.args[0], 1))
                on_grid = net.graph.call_module(str(user.target), (pooled,))
                flat = net.graph.call_function(torch.flatten, (on_grid, 1))
            user.replace_all_uses_with(flat)
            net.graph.erase_node(user)
            net.graph.erase_node(node)


def _join_hard_sigmoids(net: fx.GraphModule) -> None:
    """Make one of every hard sigmoid and the 8-bit grid that alone reads it; in place."""
    for node in list(net.graph.nodes):
        user = structure.only_user(node)
        if user is None or not operators.is_a(net, node, (nn.Hardsigmoid, F.hardsigmoid)):
            continue
        module = operators.module_of(net, user)
        if isinstance(module, deployed.OnGrid) and module.grid.bits == 8 and edit.is_grid(node.all_input_nodes[0]):
            user.replace_input_with(node, node.all_input_nodes[0])
            net.graph.erase_node(node)
            net.add_submodule(f"replaced.{node.name}", _HardSigmoid(module.grid))
            user.target = f"replaced.{node.name}"


def _is_global_mean(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` takes the mean of every channel of an image (n, c, h, w)."""
    module, given = operators.module_of(net, node), (*node.args[1:], *node.kwargs.values())
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    if operators.is_a(net, node, (F.adaptive_avg_pool2d,)):
        return given[0] in (1, (1, 1), [1, 1])
    return operators.is_a(net, node, (torch.mean, "mean")) and given in (([2, 3],), ((2, 3),))


def _export(net: nn.Module, images: Tensor) -> ir.Model:
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")  # of torch's exporter about its own parts
        try:
            program = torch.onnx.export(
                net,
                (images,),
                dynamo=True,
                optimize=False,  # it merges equal initializers, and renames what is left
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise R2Error(f"torch cannot export this network to ONNX ({type(error).__name__}: {first})") from error
    assert program is not None
    return program.model


def _simplify(model: ir.Model, coded: Mapping[str, Coded]) -> None:
    """Fold constants, without touching the coded weights: as inputs of the graph they are out of reach."""
    from onnxscript import optimizer

    held = {name: model.graph.initializers.pop(name) for name in coded if name in model.graph.initializers}
    model.graph.inputs.extend(held.values())
    optimizer.optimize_ir(model)
    for name, value in held.items():
        model.graph.inputs.remove(value)
        model.graph.initializers[name] = value


# --- the codes -----------------------------------------------------------------------------------------------------


def _put_codes(model: ir.Model, coded: Mapping[str, Coded], *, read_as_float: bool) -> None:
    """Put the graph that makes each coded weight from its codes in place of its initializer, before its layer."""
    tables: dict[str, ir.Value] = {}
    initializers = model.graph.initializers
    for node in list(model.graph):
        for name in [value.name for value in node.inputs if value is not None]:
            if name is not None and name in coded and name in initializers:
                value, one = initializers.pop(name), coded[name]
                assert value.const_value is not None
                if not torch.equal(torch.from_numpy(value.const_value.numpy().copy()), one.decode()):
                    raise R2Error(f"torch's export changed the weight '{name}': it is not the decoded codes any more")
                decoded, nodes = weight_nodes.emit(model.graph, name, one, tables, read_as_float=read_as_float)
                value.replace_all_uses_with(decoded)
                decoded.name = name
                model.graph.insert_before(node, nodes)
    made = {value.name for node in model.graph for value in node.outputs}
    lost = [name for name in coded if name not in made]
    if lost:
        raise R2Error(f"the weight '{lost[0]}' was lost in torch's export: report this with the model's name")


def _round_last_bias(model: ir.Model) -> None:
    """Give a layer that ends in the logits its bias as int32, DequantizeLinear with the scale of its products.

    Runtimes round the bias of a layer with a quantized output by themselves, and to the same grid; one with a float
    output they would run in float. `ptq.round_biases` has put the bias on that grid, so no value changes.
    """
    for node in list(model.graph):
        if node.op_type not in ("Gemm", "Conv") or len(node.inputs) < 3 or not node.outputs[0].is_graph_output():
            continue
        bias, scales = node.inputs[2], [_scale_of(value) for value in node.inputs[:2]]
        if bias is None or bias.name is None or bias.const_value is None or scales[0] is None or scales[1] is None:
            continue
        scale = np.asarray(scales[0] * scales[1])
        codes = np.rint(bias.const_value.numpy().astype(np.float64) / scale)
        parts = [
            initializer(model.graph, f"{bias.name}.codes", codes.astype(np.int32)),
            initializer(model.graph, f"{bias.name}.scale", scale),
        ]
        decoded = ir.node("DequantizeLinear", parts, {"axis": 0} if scale.ndim else {})
        decoded.outputs[0].name = f"{bias.name}.decoded"
        model.graph.insert_before(node, decoded)
        node.replace_input_with(2, decoded.outputs[0])
        del model.graph.initializers[bias.name]


def _scale_of(value: ir.Value | None) -> "np.ndarray[Any, Any] | None":
    """The scale of the DequantizeLinear that makes `value`, () or (channels,); None where nothing of the kind does."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    scale = producer.inputs[1]
    return None if scale is None or scale.const_value is None else scale.const_value.numpy()


# --- the file ------------------------------------------------------------------------------------------------------


def _clean(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Drop what torch notes of its own run (stack traces, paths), so that bytes depend on the checkpoint alone."""
    onnx_text.shorten(model, checkpoint.coded.keys())
    model.graph.metadata_props.clear()
    model.graph.name, model.graph.doc_string, model.doc_string = "r2", None, None
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION, "r2cli", None
    model.metadata_props.clear()
    model.metadata_props.update(metadata(checkpoint))
    model.functions.clear()
    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    for domain in [domain for domain in model.opset_imports if domain not in used and domain != ""]:
        del model.opset_imports[domain]


def metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the file says of itself: how to feed it, what its outputs are, and how it was made. Sorted by key."""
    entries = {
        "r2.class_names": _json(checkpoint.class_names),
        "r2.history": _json(checkpoint.history),
        "r2.input": _json(checkpoint.input.described()),
        "r2.model": _json(checkpoint.model.described()),
    }
    return dict(sorted(entries.items()))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def stored_bits(codec: Codec) -> int:
    """Bits that a code takes in the file: INT8 carries 5 to 7 bits."""
    return codec.bits if codec.bits <= 4 else 8
