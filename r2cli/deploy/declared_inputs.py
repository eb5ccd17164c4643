"""Random inputs for any ONNX file, of the shapes that it declares itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from r2cli.deploy.engines import Array
from r2cli.errors import InputError, unknown

# Sizes of axes that a file leaves open: few samples, a short sequence, images that can be halved five times.
BATCH, LENGTH, SIDE = 8, 16, 64


@dataclass(frozen=True)
class Declared:
    """An input of a file: its type, and its shape, in which an open axis has a name or is None."""

    name: str
    kind: np.dtype[np.generic]
    axes: tuple[int | str | None, ...]


def declared(file: onnx.ModelProto, path: str) -> list[Declared]:
    """The inputs of a file that are given as it runs. Raises InputError for one that is no tensor."""
    held = {each.name for each in file.graph.initializer}
    found = []
    for each in file.graph.input:
        if each.name in held:
            continue
        if not each.type.HasField("tensor_type"):
            raise InputError(f"{path} wants '{each.name}', which is no tensor: only tensors can be given to it")
        tensor = each.type.tensor_type
        axes = tuple(_axis(one) for one in tensor.shape.dim)
        found.append(Declared(each.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), axes))
    return found


def _axis(one: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if one.HasField("dim_value"):
        return one.dim_value if one.dim_value > 0 else None
    return one.dim_param or None


def _fits(own: Declared, shape: tuple[int, ...]) -> bool:
    """Whether a shape has the axes of an input, and the sizes of those that are fixed."""
    return len(own.axes) == len(shape) and all(
        axis == size for axis, size in zip(own.axes, shape, strict=True) if isinstance(axis, int)
    )


def shapes(inputs: Sequence[Declared], given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A shape for each input: the one that is `given`, or the declared one with its open axes filled.

    The first open axis is the number of samples. Axes of one name have one size. Raises InputError for a name that no
    input has, or a shape of other axes.
    """
    for name, shape in given.items():
        own = next((each for each in inputs if each.name == name), None)
        if own is None:
            raise unknown("input of --shape", name, [each.name for each in inputs])
        if not _fits(own, shape):
            told = "x".join("?" if one is None else str(one) for one in own.axes)
            raise InputError(f"--shape {name}={'x'.join(map(str, shape))} does not fit the file, which wants {told}")
    sizes: dict[str, int] = {}
    for each in inputs:
        if each.name in given:
            sizes |= {axis: n for axis, n in zip(each.axes, given[each.name], strict=True) if isinstance(axis, str)}
    found = {}
    for each in inputs:
        filled: list[int] = []
        for place, axis in enumerate(each.axes):
            usual = BATCH if place == 0 else SIDE if len(each.axes) > 3 else LENGTH
            if isinstance(axis, str):
                usual = sizes.setdefault(axis, usual)
            filled.append(axis if isinstance(axis, int) else usual)
        found[each.name] = given.get(each.name, tuple(filled))
    return found


def drawn(inputs: Sequence[Declared], sizes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    """Normal floats, bytes of all values, and for other integers 0 or 1, which any table of tokens or types has."""
    generator = np.random.default_rng(seed)
    return {each.name: _random(generator, each.kind, sizes[each.name]) for each in inputs}


def _random(generator: np.random.Generator, kind: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
    if kind in (np.uint8, np.int8):
        return generator.integers(0, 256, shape).astype(np.uint8).view(kind)
    if kind.kind in "iub":
        return generator.integers(0, 2, shape).astype(kind)
    return generator.standard_normal(shape).astype(kind)


def told(inputs: Sequence[Declared], sizes: Mapping[str, tuple[int, ...]]) -> str:
    """In words: which inputs of which shapes, and that open axes were filled."""
    shown = ", ".join(f"{each.name} {'x'.join(map(str, sizes[each.name])) or 'scalar'}" for each in inputs)
    is_open = any(not isinstance(axis, int) for each in inputs for axis in each.axes)
    return f"random inputs {shown}{' (the file leaves axes open: --shape sets them)' if is_open else ''}"
