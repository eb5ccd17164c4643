"""An integer network as a TensorFlow Lite file, code for code.

It is written from the ONNX file of the target `tflite`, whose operators are few and whose shapes are fixed, and not
from the network's graph: so both files have the same codes, scales, biases and rounded values, and one is checked
beside the other. Activations are INT8; weights are INT8 with a scale for each channel; biases are INT32.
"""

import onnx

from r2cli.deploy import tflite_operators, tflite_tables
from r2cli.deploy.onnx_sheet import Unwritable
from r2cli.deploy.tflite_operators import END_ORDERS
from r2cli.deploy.tflite_sheet import LiteSheet, plain
from r2cli.errors import InputError


def to_bytes(content: bytes) -> bytes:
    """Return the bytes of the .tflite file of an ONNX file, given as bytes too, for the target `tflite`.

    Metadata and names stay as they are. Images are INT8 (1, height, width, channels), logits INT8 (1, classes), each
    with its scale and zero point. Raises InputError for an operator without a form, or one in float, by its node.
    """
    model = onnx.load_from_string(content)
    loose = next((each.name for each in model.graph.input if not all(_lengths(each))), None)
    if loose is not None:
        raise InputError(f"the size of '{loose}' is not fixed, which a file of TensorFlow Lite wants: give --batch 1")
    lite = LiteSheet(onnx.shape_inference.infer_shapes(model, data_prop=True))
    tables = tflite_tables.find(lite)
    for node in lite.graph.node:
        try:
            tflite_operators.write(lite, node, tables)
        except Unwritable as why:
            what = f"'{node.output[0]}' ({node.op_type})"
            raise InputError(
                f"{what} cannot be written as TensorFlow Lite: {why}. Write it another way in the network's code, or "
                "take another --target"
            ) from why
    inputs, outputs = ([each.name for each in own] for own in (lite.graph.input, lite.graph.output))
    bare = next((name for name in inputs if name not in lite.given), None)
    bare = bare or next((name for name in outputs if not lite.has_codes(name)), None)
    if bare is not None:
        raise InputError(f"'{bare}' has no codes, which a file of TensorFlow Lite wants: take another --target")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    ends = {name: lite.values[name] for name in outputs}
    results = {name: lite.laid(x, END_ORDERS.get(len(x.shape), plain(len(x.shape)))).tensor for name, x in ends.items()}
    return lite.writer.to_bytes([lite.given[name].tensor for name in inputs], results, metadata)


def _lengths(value: onnx.ValueInfoProto) -> list[int]:
    return [length.dim_value for length in value.type.tensor_type.shape.dim]
