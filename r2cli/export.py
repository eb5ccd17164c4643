"""A checkpoint as an ONNX file with integer weights, in standard operators.

torch exports the network with its parameters under their own names and nothing folded; then the initializer of every
coded weight is replaced by what its codec says, so no float weight is left to be quantized again, and no second
description of the network exists. Opset 21, IR 10.

    8 to 5 bits          INT8 -> DequantizeLinear
    4 bits               INT4 -> Cast INT8 -> DequantizeLinear
    3 to 1 bits, odd     packed UINT8 -> Gather in a shared table of 256 bytes' codes -> Reshape -> DequantizeLinear

Runtimes fold everything before DequantizeLinear when they load, and run int8 kernels; INT4 straight into
DequantizeLinear would be unpacked at every inference. Activations are UINT8, with a Clip of codes below 8 bits.
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

from r2cli import attach, graph
from r2cli.checkpoint import Checkpoint
from r2cli.codec import Codec, Coded, Grid, pack, packed_bytes, unpack
from r2cli.errors import R2Error

OPSET, IR_VERSION = 21, 10
INPUT, OUTPUT = "input", "logits"


def to_bytes(checkpoint: Checkpoint) -> bytes:
    """The ONNX file of `checkpoint`: input float32 (batch, channels, size, size), logits float32 (batch, classes).

    The same bytes for equal checkpoints. Raises R2Error where torch cannot export the network, or a weight is lost.
    """
    net = attach.network(checkpoint)
    coded = dict(sorted(checkpoint.coded.items()))  # the same order whether it was just made or read from a file
    if isinstance(net, fx.GraphModule):
        _standard_operators(net)
    model = _export(net, checkpoint.input.shape)
    _simplify(model, coded)
    _put_codes(model, coded)
    _round_last_bias(model)
    _clean(model, checkpoint)
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


# --- the float graph -----------------------------------------------------------------------------------------------


class _GlobalAveragePool(nn.Module):
    """The mean of every channel: (n, c, h, w) to (n, c, 1, 1). torch would write a ReduceMean, which stays float."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic("GlobalAveragePool", (x,), dtype=x.dtype, shape=(*x.shape[:2], 1, 1))


class _QuantizeDequantize(nn.Module):
    """An `OnGrid` as QuantizeLinear, for less than 8 bits a Clip of the codes, and DequantizeLinear."""

    scale: Tensor
    zero_point: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point.to(torch.uint8))
        self.register_buffer("lowest", torch.tensor(grid.lowest, dtype=torch.uint8))
        self.register_buffer("highest", torch.tensor(grid.highest, dtype=torch.uint8))
        self.clips = grid.bits < 8

    def forward(self, x: Tensor) -> Tensor:
        symbolic, shape = torch.onnx.ops.symbolic, x.shape
        codes = symbolic("QuantizeLinear", (x, self.scale, self.zero_point), dtype=torch.uint8, shape=shape)
        if self.clips:
            codes = symbolic("Clip", (codes, self.lowest, self.highest), dtype=torch.uint8, shape=shape)
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


def _standard_operators(net: fx.GraphModule) -> None:
    """Put in place of modules the operators that runtimes have integer kernels for; in place."""

    def replacement(node: fx.Node) -> nn.Module | None:
        module = graph.module_of(net, node)
        if isinstance(module, attach.OnGrid):
            return _QuantizeDequantize(module.grid)
        if graph.is_a(net, node, (nn.ReLU6, F.relu6)):
            return _Relu6()
        if _is_global_mean(net, node):
            return _GlobalAveragePool()
        return None

    graph.repeat_grids(net)
    graph.replace_calls(net, replacement)


def _is_global_mean(net: fx.GraphModule, node: fx.Node) -> bool:
    module = graph.module_of(net, node)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    if graph.is_a(net, node, (F.adaptive_avg_pool2d,)):
        return (*node.args[1:], *node.kwargs.values())[0] in (1, (1, 1), [1, 1])
    return False


def _export(net: nn.Module, shape: tuple[int, ...]) -> ir.Model:
    images = torch.zeros(2, *shape)
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


def _put_codes(model: ir.Model, coded: Mapping[str, Coded]) -> None:
    """Replace the initializer of each coded weight by the graph that makes it from its codes."""
    tables: dict[str, ir.Value] = {}
    for name, one in coded.items():
        value = model.graph.initializers.get(name)
        if value is None or value.const_value is None or not value.uses():
            raise R2Error(f"the weight '{name}' was lost in torch's export: report this with the model's name")
        written = torch.from_numpy(value.const_value.numpy().copy())
        if not torch.equal(written, one.decode()):
            raise R2Error(f"torch's export changed the weight '{name}': it is not the decoded codes any more")
        decoded, nodes = _emit(model.graph, name, one, tables)
        value.replace_all_uses_with(decoded)
        del model.graph.initializers[name]
        first = next(iter(model.graph))
        model.graph.insert_before(first, nodes)


def _emit(graph_: ir.Graph, name: str, coded: Coded, tables: dict[str, ir.Value]) -> tuple[ir.Value, list[ir.Node]]:
    """The float value of a coded weight, and the nodes that make it."""
    grid = coded.codec
    if not isinstance(grid, Grid):
        raise R2Error(f"the weight '{name}' is palettized, and palettes have no ONNX form yet")
    packed_width = grid.bits <= 3 or (grid.odd and grid.bits <= 4)
    if packed_width:
        integers, nodes = _packed(graph_, name, coded, grid, tables)
    elif grid.bits == 4:
        narrow = _initializer(graph_, f"{name}.codes", _int4(coded.codes))
        cast = ir.node("Cast", [narrow], {"to": ir.DataType.INT8})
        integers, nodes = cast.outputs[0], [cast]
    elif grid.odd and grid.bits == 8:
        raise R2Error(f"the weight '{name}' has an 8-bit grid without a zero level, whose codes leave int8: use 7 bits")
    else:
        stored = grid.integers(coded.codes) if grid.odd else coded.codes
        integers, nodes = _initializer(graph_, f"{name}.codes", stored.to(torch.int8).numpy()), []
    inputs = [integers, _initializer(graph_, f"{name}.scale", grid.scale.numpy())]
    if bool(grid.zero_point.any()) or coded.codes.ndim == 2:  # ONNX Runtime's QGemm wants one, though it be zero
        inputs.append(_initializer(graph_, f"{name}.zero_point", grid.zero_point.to(torch.int8).numpy()))
    axis = {} if grid.axis is None else {"axis": grid.axis}
    dequantize = ir.node("DequantizeLinear", inputs, axis)
    nodes.append(dequantize)
    for position, node in enumerate(nodes):
        # Short names: in a small network at few bits the text of the graph is most of what is left of the file.
        node.name, node.outputs[0].name = "", f"w{len(tables)}.{len(graph_)}.{position}"
    dequantize.outputs[0].name = f"{name}.decoded"
    return dequantize.outputs[0], nodes


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
            _initializer(model.graph, f"{bias.name}.codes", codes.astype(np.int32)),
            _initializer(model.graph, f"{bias.name}.scale", scale),
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


def _packed(
    graph_: ir.Graph, name: str, coded: Coded, grid: Grid, tables: dict[str, ir.Value]
) -> tuple[ir.Value, list[ir.Node]]:
    """Packed codes through their table: the int8 integers of the weight. Three bits are the sum of two planes."""
    count, planes = coded.codes.numel(), coded.packed()
    nodes: list[ir.Node] = []
    parts = []
    split = packed_bytes(count, 1)
    for part, bits, content in (
        [("high", 1, planes[:split]), ("low", 2, planes[split:])] if grid.bits == 3 else [("codes", grid.bits, planes)]
    ):
        kind = f"{'odd' if grid.odd else 'plain'}{grid.bits}.{part}"
        if kind not in tables:
            tables[kind] = _initializer(graph_, f"table.{kind}", _table(grid, part, bits))
        packed = _initializer(graph_, f"{name}.{part}", content.numpy())
        index = ir.node("Cast", [packed], {"to": ir.DataType.INT32})
        gather = ir.node("Gather", [tables[kind], index.outputs[0]], {"axis": 0})
        nodes += [index, gather]
        parts.append(gather.outputs[0])
        if content.numel() * (8 // bits) != count:  # drop the zeros that filled the last byte
            flat = _shape(graph_, tables, (-1,))
            ends = [_shape(graph_, tables, (0,)), _shape(graph_, tables, (count,))]
            nodes.append(ir.node("Reshape", [parts[-1], flat]))
            nodes.append(ir.node("Slice", [nodes[-1].outputs[0], *ends]))
            parts[-1] = nodes[-1].outputs[0]
        nodes.append(ir.node("Reshape", [parts[-1], _shape(graph_, tables, tuple(coded.codes.shape))]))
        parts[-1] = nodes[-1].outputs[0]
    if len(parts) == 2:
        nodes.append(ir.node("Add", parts))
    return nodes[-1].outputs[0], nodes


def _table(grid: Grid, part: str, bits: int) -> np.ndarray[Any, Any]:
    """(256, 8 // bits) int8: the integers that every byte of packed codes stands for."""
    every = unpack(torch.arange(256, dtype=torch.uint8), bits, 256 * (8 // bits), signed=False).to(torch.int16)
    if part == "high":  # worth 4, or -4 where the codes are two's complement
        integers = every * 8 - 7 if grid.odd else every * -4
    elif part == "low":
        integers = every * 2 if grid.odd else every
    elif grid.odd:
        integers = every * 2 - (2**bits - 1)
    else:
        integers = torch.where(every >= 2 ** (bits - 1), every - 2**bits, every)
    return integers.reshape(256, 8 // bits).to(torch.int8).numpy()


def _shape(graph_: ir.Graph, shared: dict[str, ir.Value], sizes: tuple[int, ...]) -> ir.Value:
    name = "shape." + "x".join(map(str, sizes))
    if name not in shared:
        shared[name] = _initializer(graph_, name, np.array(sizes, dtype=np.int64))
    return shared[name]


def _int4(codes: Tensor) -> "ir.PackedTensor[Any]":
    """Codes (any shape, int8 in -8 .. 7) as an ONNX INT4 tensor: our packing is ONNX's."""
    return ir.PackedTensor(pack(codes, 4).numpy(), ir.DataType.INT4, shape=ir.Shape(codes.shape))


def _initializer(graph_: ir.Graph, name: str, content: "np.ndarray[Any, Any] | ir.PackedTensor[Any]") -> ir.Value:
    tensor = ir.tensor(content) if isinstance(content, np.ndarray) else content
    tensor.name = name
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph_.initializers[name] = value
    return value


# --- the file ------------------------------------------------------------------------------------------------------


def _clean(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Drop what torch notes of its own run (stack traces, paths), so that bytes depend on the checkpoint alone."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            if not output.is_graph_output():  # runtimes infer types and shapes; here they are a tenth of a small file
                output.type, output.shape = None, None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
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
    spec = checkpoint.input
    entries = {
        "r2.class_names": json.dumps(checkpoint.class_names),
        "r2.history": json.dumps(checkpoint.history, sort_keys=True),
        "r2.input": json.dumps({k: getattr(spec, k) for k in ("channels", "size", "resize", "mean", "std")}),
        "r2.model": json.dumps(checkpoint.model.described(), sort_keys=True),
    }
    return dict(sorted(entries.items()))


def stored_bits(codec: Codec) -> int:
    """Bits that a code takes in the file: INT8 carries 5 to 7 bits."""
    return codec.bits if codec.bits <= 4 else 8
