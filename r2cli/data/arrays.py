"""Arrays by the names of the network's inputs: `npz:FILE`, or `npz:DIR` with train.npz and test.npz, or any .npz files.

An array called `target` is the target. The first axis of every array counts the samples. Arrays of Python objects are
pickles, and refused: nothing in such a file is ever run.
"""

import zipfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from r2cli.data import own
from r2cli.data.request import Data, Request
from r2cli.errors import InputError

HALVES = (("train.npz",), ("test.npz", "val.npz"))


def load(request: Request) -> Data:
    """Load arrays. Raises InputError for a missing or damaged file, and for one of pickled objects."""
    root, name = Path(request.where), f"npz:{request.where}"
    if not root.is_dir():
        return own.to_data(name, [_read(root)])
    files = [next((root / one for one in names if (root / one).is_file()), None) for names in HALVES]
    if all(files):
        return own.to_data(name, tuple([_read(file)] for file in files if file is not None))
    found: Sequence[Path] = sorted(root.glob("*.npz"))
    if not found:
        raise InputError(f"{root} holds no .npz file: npz:DIR wants train.npz and test.npz, or some .npz files")
    return own.to_data(name, [_read(file) for file in found])


def _read(path: Path) -> dict[str, Any]:
    """The arrays of one file, by name."""
    try:
        with zipfile.ZipFile(path) as file:
            found = {entry.filename.removesuffix(".npy"): _array(file, entry, path) for entry in file.infolist()}
    except InputError:
        raise
    except Exception as error:  # numpy and zipfile raise anything for a damaged header
        why = "it is damaged" if isinstance(error, MemoryError) else " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a readable .npz file ({why}): write it with numpy.savez") from error
    lengths = {name: len(array) if array.ndim else None for name, array in found.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        told = ", ".join(f"{name} {found[name].shape}" for name in list(found)[:5])
        raise InputError(f"{path} holds {told or 'no array'}: the first axis of every array counts the same samples")
    return found


def _array(file: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> Any:
    """One array, whose header is read first: what it says is checked before there is memory for it."""
    name = entry.filename.removesuffix(".npy")
    with file.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        if dtype.hasobject:
            raise InputError(f"{path}: '{name}' holds pickled objects, which r2 never loads: save it as numbers")
        if dtype.kind not in "biuf":
            raise InputError(f"{path}: '{name}' holds {dtype}: arrays are numbers or booleans")
        if min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != entry.file_size - stream.tell():
            raise InputError(f"{path}: '{name}' holds other bytes than {shape} of {dtype}: write it again")
    with file.open(entry) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)
