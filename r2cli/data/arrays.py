"""Arrays by the names of the network's inputs: `npz:FILE`, or `npz:DIR` with train.npz and test.npz, or any .npz files.

An array called `target` is the target. The first axis of every array counts the samples. Arrays of Python objects are
pickles, and refused: nothing in such a file is ever run.
"""

import zipfile
from collections.abc import Sequence
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
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError(f"{path} is one array: npz:FILE wants arrays by name, as numpy.savez writes them")
            return {name: _array(file, name, path) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise InputError(f"{path} is not a readable .npz file ({error}): write it with numpy.savez") from error


def _array(file: Any, name: str, path: Path) -> Any:
    try:
        array = file[name]
    except ValueError as error:
        if "pickle" in str(error).lower() or "object" in str(error).lower():
            raise InputError(
                f"{path}: '{name}' holds pickled objects, which r2 never loads: save it as numbers"
            ) from error
        raise
    if array.dtype.kind not in "biuf":
        raise InputError(f"{path}: '{name}' holds {array.dtype}: arrays are numbers or booleans")
    return array
