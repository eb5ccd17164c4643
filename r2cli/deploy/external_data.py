"""ONNX files whose tensors lie in other files beside them."""

from pathlib import Path

import onnx

from r2cli.models import onnx_file


def load(path: Path) -> onnx.ModelProto:
    """The model at `path`, checked by onnx, with the tensors that it keeps in other files.

    Raises InputError where such a file is missing, too short, or not in the model's folder, and protobuf's own errors.
    """
    model = onnx.load(path, load_external_data=False)
    tensors = onnx_file.external(model)
    onnx_file.require_beside(path, tensors)
    onnx.checker.check_model(str(path) if tensors else model)  # by its path it may be larger than a protobuf
    onnx_file.read_beside(path, tensors)
    return model


def size(path: Path) -> int:
    """Bytes of an ONNX file and of the files that it keeps tensors in."""
    model = onnx.load(path, load_external_data=False)
    beside = {place["location"] for _, place in onnx_file.external(model)}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in beside)
