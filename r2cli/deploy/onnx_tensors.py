"""The network's own tensors in an ONNX file: weights from their codes, biases on the scale of a layer's sums.

A layer whose input is on a grid and whose weight is on one too gets its bias as INT32 codes behind a DequantizeLinear,
with the scale of its sums: all runtimes then run it on integers. Those before ONNX Runtime 1.23 run a layer with a
float bias in float.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from r2cli.config.targets import Target
from r2cli.deploy import weight_nodes
from r2cli.deploy.onnx_sheet import Value
from r2cli.deploy.onnx_writer import Array, OnnxWriter
from r2cli.errors import R2Error
from r2cli.graph.transposed import exchanged
from r2cli.quantized.coded import Coded
from r2cli.quantized.grid import Grid
from r2cli.quantized.palette import Palette

FINE = 64  # units in the largest weight: then it changes little that a bias is rounded to a unit of the sums


class Weights:
    """The network's tensors in the file: each is written once, when the first node reads it."""

    def __init__(self, writer: OnnxWriter, coded: Mapping[str, Coded], target: Target) -> None:
        self.writer, self.coded, self.target = writer, coded, target
        self.float_activations = True
        # Weights of layers that give floats. ONNX Runtime does not fuse those, and on processors without VNNI it then
        # needs a zero point. OpenCV cannot read one beside a bias of INT32, so the others have none.
        self.unfused: set[str] = set()
        self.scales: dict[str, Array] = {}  # of values that a DequantizeLinear gives, by name
        self._written: dict[tuple[str, Any], str] = {}
        self._readers: dict[str, tuple[int, str]] = {}  # by the weight: how many layers read it, the last one's codes

    def tensor(self, name: str, content: Tensor, exchanges: int | None = None) -> str:
        """Write the tensor called `name` in the network, from its codes where it has some; return its name.

        `exchanges` are the groups of a transposed convolution, whose weight has its channels exchanged in ONNX. Raises
        R2Error where the network's own values are not those that the codes stand for.
        """
        one = self.coded.get(name)
        if (name, None) in self._written:
            return name if one is None or self.float_activations else self._again(name)
        if one is None:
            own = content.detach() if exchanges is None else exchanged(content.detach(), exchanges).contiguous()
            self.writer.initializer(name, own.numpy())
        else:
            if not torch.equal(content, one.decode()):
                raise R2Error(f"the weight '{name}' is not what its codes stand for: report this with the model's name")
            loose = name in self.unfused or self.target.signed  # ONNX Runtime fuses no ReLU with INT8
            weight_nodes.emit(
                self.writer,
                name,
                one,
                read_as_float=self.float_activations,
                with_zero=loose,
                exchanges=exchanges,
                target=self.target,
            )
        self._written[name, None] = name
        return name

    def _again(self, name: str) -> str:
        """Decode a weight once more for another layer, from the same codes.

        Each layer gets codes of its own when a file is loaded, by a Reshape that changes nothing, and a zero point.
        Where ONNX Runtime makes INT8 codes to UINT8 (on processors without VNNI), it cannot do so twice with one
        constant. A Reshape reads the one before it, since ONNX Runtime makes one of two that read the same.
        """
        node = self.writer.made(name)
        if node.op_type != "DequantizeLinear":
            return name
        count, codes = self._readers.get(name, (1, node.input[0]))
        shape = self.coded[name].decode().shape
        self.writer.enter(f"{name}.{count + 1}")
        own = self.writer.node("Reshape", [codes, self.writer.ints(shape)])
        self._readers[name] = count + 1, own
        axis = next((each.i for each in node.attribute if each.name == "axis"), None)
        scale, *zero = node.input[1:]
        if zero:
            content = onnx.numpy_helper.to_array(self.writer.initializers[zero[0]])
            zero = [self.writer.initializer(f"{name}.{count + 1}.zero_point", content)]
        return self.writer.node("DequantizeLinear", [own, scale, *zero], axis=axis)

    def blocks(self, name: str) -> str | None:
        """Write a weight with groups of inputs in blocks, (inputs, outputs), where opset 21 is asked for; else None."""
        one = self.coded.get(name)
        if one is None or (name, None) in self._written or not weight_nodes.is_blocks(one, self.writer.asked):
            return None
        if (name, "turned") not in self._written:
            assert isinstance(one.codec, Grid)
            self._written[name, "turned"] = weight_nodes.emit_blocks(self.writer, name, one, one.codec, self.target)
        return name

    def turned(self, name: str, content: Tensor) -> str:
        """The same, with its two axes exchanged."""
        if (name, "turned") not in self._written:
            own = self.tensor(name, content)
            self.writer.enter(f"{name}.transposed")
            self._written[name, "turned"] = self.writer.node("Transpose", [own], perm=[1, 0])
        return self._written[name, "turned"]

    def bias(self, name: str, weight: str, bias: Tensor | None, x: Value) -> str | None:
        """Write the bias `name` of the layer that reads `x` and `weight`: as codes where its sums are integers."""
        if bias is None:
            return None
        scale = self._unit(weight, x)
        if scale is None or not self.target.integer_biases:
            return self.float_bias(name, bias)
        # A layer that runs on two values has two units, and so its bias twice.
        if (name, x.name) not in self._written:
            codes = _integers(bias, scale)
            twice = any(key[0] == name for key in self._written)
            own = f"{name}.{x.name}" if twice else name
            if codes is None:  # calibration has not put it on the grid of these sums
                self._written[name, x.name] = self.writer.initializer(own, bias.detach().numpy())
                return own
            self.writer.enter(own)
            parts = [
                self.writer.initializer(f"{own}.codes", codes),
                self.writer.initializer(f"{own}.scale", scale),
            ]
            value = self.writer.node("DequantizeLinear", parts, axis=0 if scale.ndim else None)
            self._written[name, x.name] = self.writer.rename(value, own)
        return self._written[name, x.name]

    def float_bias(self, name: str, bias: Tensor) -> str:
        if (name, None) not in self._written:
            taken = any(key[0] == name for key in self._written)  # by a bias of codes, for another call of the layer
            own = self.writer.initializer(f"{name}.float" if taken else name, bias.detach().numpy())
            self._written[name, None] = own
        return self._written[name, None]

    def _unit(self, weight: str, x: Value) -> Array | None:
        """What 1 stands for in the layer's integer sums, () or (channels,); None where it computes in float."""
        one, scale = self.coded.get(weight), self.scales.get(x.name)
        if one is None or scale is None or (isinstance(one.codec, Palette) and one.codec.lut.is_floating_point()):
            return None
        return np.asarray(scale * weight_nodes.scale_of(one))

    def loses_bias(self, weight: str, bias: Tensor | None, x: Value) -> bool:
        """Whether a bias lies between two integers of its layer's sums, which are so coarse that rounding it counts.

        So it is where a layer runs again on another grid, with a weight of few bits. ONNX Runtime would round it.
        """
        scale = self._unit(weight, x)
        if bias is None or scale is None or _integers(bias, scale) is not None:
            return False
        one = self.coded[weight]
        return float(one.decode().abs().max()) < FINE * float(weight_nodes.scale_of(one).max())


def _integers(bias: Tensor, scale: Array) -> Array | None:
    """The INT32 codes of a bias in units of `scale`; None where it is between them."""
    exact = bias.detach().numpy().astype(np.float64)
    codes = np.rint(exact / scale)
    fits = np.abs(codes).max() < 2**31 and np.allclose(codes * scale, exact, rtol=1e-6, atol=0)
    return codes.astype(np.int32) if fits else None
