"""A file as OpenVINO's integer kernels compute it: one convolution of each sum is added before it is rounded.

OpenVINO adds the other value within the convolution's own kernel, where that one's result is still a float. It clips it
to the ends of its grid and leaves the rounding out, since the sum is rounded anyway ("do_rounding" in its convolution).
This is nearer to the float network than the file, and in a deep network on coarse grids it may be far from the file.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from r2cli.deploy import weight_roles


def unrounded(file: onnx.ModelProto) -> onnx.ModelProto | None:
    """The inlined `file` with the convolutions of its sums unrounded; None where it has no such sum."""
    found = onnx.ModelProto()
    found.CopyFrom(file)
    graph, held = _Graph(found), weight_roles.constants(found)
    clips: dict[str, onnx.NodeProto] = {}  # by the output of the node that goes
    for node in found.graph.node:
        if node.op_type != "Add" or not graph.is_rounded(node):
            continue
        place = next((place for place in range(2) if graph.is_fused(node, place)), None)
        if place is None:
            continue
        decode = graph.made[node.input[place]]
        code = graph.made[decode.input[0]]
        if not {*code.input[1:]} <= held.keys():
            continue
        scale, zero = (numpy_helper.to_array(held[name]) for name in code.input[1:])
        ends = np.iinfo(zero.dtype)
        bounds = [f"{decode.output[0]}.{end}" for end in ("least", "most")]
        for name, end in zip(bounds, (ends.min, ends.max), strict=True):
            value = (end - zero.astype(np.float32)) * scale
            found.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
        clips[decode.output[0]] = helper.make_node("Clip", [code.input[0], *bounds], [decode.output[0]])
    if not clips:
        return None
    nodes = [clips.get(node.output[0], node) if node.output else node for node in file.graph.node]
    found.graph.ClearField("node")
    found.graph.node.extend(nodes)
    return found


class _Graph:
    """Who makes a value, and who reads it."""

    def __init__(self, file: onnx.ModelProto) -> None:
        self.made = {name: node for node in file.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto | None]] = {each.name: [None] for each in file.graph.output}
        for node in file.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 else None

    def is_rounded(self, node: onnx.NodeProto) -> bool:
        """Whether what `node` gives, behind its ReLU perhaps, is put on a grid and read by nothing else."""
        reader = self.only_reader(node.output[0])
        if reader is not None and reader.op_type in ("Relu", "Clip"):
            reader = self.only_reader(reader.output[0])
        return reader is not None and reader.op_type == "QuantizeLinear"

    def is_fused(self, node: onnx.NodeProto, place: int) -> bool:
        """Whether the sum `node` runs in the kernel of a convolution, whose rounded result is its input at `place`."""
        name = node.input[place]
        for operator in ("DequantizeLinear", "QuantizeLinear", "Conv"):
            if self.only_reader(name) is None or name not in self.made or self.made[name].op_type != operator:
                return False
            name = self.made[name].input[0]
        # Where the convolution reads the other value itself, its kernel cannot write the sum in that one's place.
        return self._codes(name) != self._codes(node.input[1 - place])

    def _codes(self, name: str) -> str:
        maker = self.made.get(name)
        return maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else name
