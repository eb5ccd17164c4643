"""Export a checkpoint as an ONNX file with integer weights, in standard operators (opset 21, IR 10).

torch exports the network with float weights under their own names. Then the initializer of each quantized weight is
replaced by nodes that compute it from its codes (`weight_nodes.py`). So the codes are never computed again from floats,
and the network is described only once. Activations are UINT8; below 8 bits their codes are clipped.

The order of the steps in `to_bytes` matters: constants are folded before the codes are in the graph, or the folding
would turn them into float weights again.
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
    """Return the bytes of the ONNX file of `checkpoint`. Equal checkpoints give equal bytes.

    Its input is float32 (batch, channels, size, size), or int64 tokens (batch, 3, size); its output is the logits,
    float32 (batch, classes). Raises R2Error where torch cannot export the network, or loses a weight.
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
    """Average each channel: (n, c, h, w) to (n, c, 1, 1), or to (n, c) with `flat`.

    torch would write a ReduceMean, for which ONNX Runtime has no integer kernel.
    """

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:  # GlobalAveragePool would average other axes
            return x.mean((2, 3))
        mean = torch.onnx.ops.symbolic("GlobalAveragePool", (x,), dtype=x.dtype, shape=(*x.shape[:2], 1, 1))
        return mean.flatten(1) if self.flat else mean


class _QuantizeDequantize(nn.Module):
    """A `FakeQuantize` in ONNX: QuantizeLinear, below 8 bits a Clip of the codes, and DequantizeLinear.

    `most` (channels,) are the bounds of a `Clip` before it. Rounding keeps the order of values, so clipping the codes
    gives the same result as clipping the values, and runtimes stay in integers.
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
    """Clip values of any shape to [0, 6]. With torch's own ReLU6 the export takes more than twice as long."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(6.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic("Clip", (x, self.low, self.high), dtype=x.dtype, shape=x.shape)


class _HardSigmoid(nn.Module):
    """Compute min(max(x / 6 + 1 / 2, 0), 1) for x of any shape.

    No runtime has an integer kernel for it, but with an 8-bit grid after it, it is a sum. Quantizing x + 3 with six
    times the scale gives the codes of (x + 3) / 6, and clips them to the range.
    """

    three: Tensor
    third: Tensor
    scale: Tensor
    zero_point: Tensor
    sixfold: Tensor

    def __init__(self, grid: Grid | None) -> None:
        super().__init__()
        self.on_grid = grid is not None
        if grid is not None:
            # The constant 3 as a code too, so that the sum runs on integers: 255 * (3 / 255).
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
    """Replace modules by operators for which runtimes have integer kernels, in place."""

    def replacement(node: fx.Node) -> nn.Module | None:
        module = operators.module_of(net, node)
        if isinstance(module, deployed.FakeQuantize):
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
    on_grids = [node for node, module in clips.items() if isinstance(module, deployed.FakeQuantize)]
    bounds = {n: c.high for n in on_grids if isinstance(c := clips[n.all_input_nodes[0]], Clip)}
    edit.replace_calls(net, replacement)


def _pool_on_grids(net: fx.GraphModule) -> None:
    """Replace a mean over an image that has a grid by a pooling, the grid and a flatten, in place.

    Runtimes have an integer kernel for the pooling, but none for the mean.
    """
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
    """Join every hard sigmoid with the 8-bit grid after it, if nothing else reads it; in place."""
    for node in list(net.graph.nodes):
        user = structure.only_user(node)
        if user is None or not operators.is_a(net, node, (nn.Hardsigmoid, F.hardsigmoid)):
            continue
        module = operators.module_of(net, user)
        if (
            isinstance(module, deployed.FakeQuantize)
            and module.grid.bits == 8
            and edit.is_grid(node.all_input_nodes[0])
        ):
            user.replace_input_with(node, node.all_input_nodes[0])
            net.graph.erase_node(node)
            net.add_submodule(f"replaced.{node.name}", _HardSigmoid(module.grid))
            user.target = f"replaced.{node.name}"


def _is_global_mean(net: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether `node` averages each channel of an image (n, c, h, w)."""
    module, given = operators.module_of(net, node), (*node.args[1:], *node.kwargs.values())
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    if operators.is_a(net, node, (F.adaptive_avg_pool2d,)):
        return given[0] in (1, (1, 1), [1, 1])
    return operators.is_a(net, node, (torch.mean, "mean")) and given in (([2, 3],), ((2, 3),))


def _export(net: nn.Module, images: Tensor) -> ir.Model:
    """Let torch export the float network. Raises R2Error where it cannot."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")  # torch's exporter warns about its own deprecated parts
        try:
            program = torch.onnx.export(
                net,
                (images,),
                dynamo=True,
                optimize=False,  # it would merge equal initializers and rename others, and we look for them by name
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise R2Error(
                f"torch cannot export this network to ONNX ({type(error).__name__}: {first}): change the layer that it "
                "names"
            ) from error
    assert program is not None
    return program.model


def _simplify(model: ir.Model, coded: Mapping[str, Coded]) -> None:
    """Fold constants, except the quantized weights. As inputs of the graph they are no constants for a while."""
    from onnxscript import optimizer

    weights = {name: model.graph.initializers.pop(name) for name in coded if name in model.graph.initializers}
    model.graph.inputs.extend(weights.values())
    optimizer.optimize_ir(model)
    for name, value in weights.items():
        model.graph.inputs.remove(value)
        model.graph.initializers[name] = value


# --- the codes -----------------------------------------------------------------------------------------------------


def _put_codes(model: ir.Model, coded: Mapping[str, Coded], *, read_as_float: bool) -> None:
    """Replace the initializer of each quantized weight by nodes that compute it from its codes, in place.

    Raises R2Error where a weight is not the one that the codes stand for, or is missing.
    """
    shared: dict[str, ir.Value] = {}
    initializers = model.graph.initializers
    for node in list(model.graph):
        for name in [value.name for value in node.inputs if value is not None]:
            if name is not None and name in coded and name in initializers:
                value, weight = initializers.pop(name), coded[name]
                assert value.const_value is not None
                if not torch.equal(torch.from_numpy(value.const_value.numpy().copy()), weight.decode()):
                    raise R2Error(
                        f"torch's export changed the weight '{name}', so its codes do not fit it: report this with the "
                        "model's name"
                    )
                decoded, nodes = weight_nodes.emit(model.graph, name, weight, shared, read_as_float=read_as_float)
                value.replace_all_uses_with(decoded)
                decoded.name = name
                model.graph.insert_before(node, nodes)
    made = {value.name for node in model.graph for value in node.outputs}
    lost = [name for name in coded if name not in made]
    if lost:
        raise R2Error(f"the weight '{lost[0]}' was lost in torch's export: report this with the model's name")


def _round_last_bias(model: ir.Model) -> None:
    """Write the bias of the layer that gives the logits as int32 codes with a DequantizeLinear, in place.

    Runtimes round the bias of a layer with a quantized output by themselves. The logits are float, and with a float
    bias runtimes would run that layer in float. `calibrate.round_biases` has rounded the bias already, so no value
    changes.
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
    """Return the scale, () or (channels,), of the DequantizeLinear that computes `value`; None for another operator."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    scale = producer.inputs[1]
    return None if scale is None or scale.const_value is None else scale.const_value.numpy()


# --- the file ------------------------------------------------------------------------------------------------------


def _clean(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Remove what torch writes about its own run (stack traces, paths): the bytes depend on the checkpoint alone."""
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
    """Return the metadata of the file, sorted by key: its preprocessing, its classes, its network and its history."""
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
    """Return the bits that a code takes in the file. Codes of 5 to 7 bits take 8, since ONNX has no such types."""
    return codec.bits if codec.bits <= 4 else 8
