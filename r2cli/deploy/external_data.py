"""ONNX files whose tensors lie in other files beside them."""

from pathlib import Path

import onnx
from onnx import TensorProto

from r2cli.errors import InputError


def load(path: Path) -> onnx.ModelProto:
    """The model at `path`, checked by onnx, with the tensors that it keeps in other files.

    Raises InputError where such a file is missing, too short, or not in the model's folder, and protobuf's own errors.
    """
    model = onnx.load(path, load_external_data=False)
    tensors = _external(model)
    for tensor, place in tensors:
        _require(path, tensor, place)
    onnx.checker.check_model(str(path) if tensors else model)  # by its path it may be larger than a protobuf
    if tensors:
        onnx.load_external_data_for_model(model, str(path.parent))
    return model


def size(path: Path) -> int:
    """Bytes of an ONNX file and of the files that it keeps tensors in."""
    model = onnx.load(path, load_external_data=False)
    beside = {place["location"] for _, place in _external(model)}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in beside)


def _external(model: onnx.ModelProto) -> list[tuple[TensorProto, dict[str, str]]]:
    """The initializers that lie elsewhere, and what they say about the place: location, offset, length."""
    return [
        (each, {entry.key: entry.value for entry in each.external_data})
        for each in model.graph.initializer
        if each.data_location == TensorProto.EXTERNAL
    ]


def _require(path: Path, tensor: TensorProto, place: dict[str, str]) -> None:
    """Raise InputError where a tensor is not in a plain file of the model's own folder."""
    location = place.get("location", "")
    file, folder = path.parent / location, path.parent.resolve()
    if not location or Path(location).is_absolute() or not file.resolve().is_relative_to(folder) or file.is_symlink():
        raise InputError(f"{path} keeps '{tensor.name}' in '{location}', outside its folder: it is not read from there")
    if not file.is_file():
        raise InputError(f"{path} keeps '{tensor.name}' in {file}, which is not there: copy both files together")
    end = int(place.get("offset", 0)) + int(place.get("length", 0))
    if end > file.stat().st_size:
        raise InputError(f"{file} is too short for '{tensor.name}' of {path}: copy it again")
