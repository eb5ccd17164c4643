"""Files that torch.save wrote, read without running code in them; and what another file is, with the way out.

A trainer's file holds the state_dict itself or under a key: {"state_dict": {...}, "epoch": 90, "args": Namespace(...)}.
"""

import argparse
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2cli.errors import InputError

# The keys under which trainers save weights. Averaged weights (EMA) come first: those are the ones that were evaluated.
KEYS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net", "network", "weights")
DEEPEST = 6  # levels of dicts in which tensors are looked for
SAVE_ALONE = "save model.state_dict() alone, or as .safetensors"
# First bytes of files of other programs, what they are, and what to do.
OTHERS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"GGUF", "a GGUF file of llama.cpp", "give the .safetensors that it was made from"),
    (
        0,
        b"\x89HDF",
        "an HDF5 file, as Keras writes them",
        "export the network as ONNX, or save its arrays as .safetensors",
    ),
    (4, b"TFL3", "a TensorFlow Lite file", "give the network that it was made from"),
)
# The same by the end of the name of a member of a zip archive.
MEMBERS = (
    ("constants.pkl", "a TorchScript file", "write torch.jit.load(FILE).state_dict() with torch.save"),
    ("model.weights.h5", "a Keras file", "export the network as ONNX, or save its arrays as .safetensors"),
    ("archive_format", "a program of torch.export", "write torch.export.load(FILE).state_dict with torch.save"),
    ("exported_program.json", "a program of torch.export", "write torch.export.load(FILE).state_dict with torch.save"),
)


def require_known(path: Path) -> None:
    """Raise InputError, with the way out, for a file of a known form that r2 does not read."""
    with path.open("rb") as file:
        start = file.read(16)
    known = next(((what, do) for at, magic, what, do in OTHERS if start[at:].startswith(magic)), None)
    if path.suffix == ".onnx":
        known = "an ONNX file", "r2 analyze and r2 evaluate read it; here give the PyTorch weights"
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        known = next(((what, do) for end, what, do in MEMBERS if any(each.endswith(end) for each in names)), known)
    if known is not None:
        raise InputError(f"{path} is {known[0]}, which holds no state_dict alone: {known[1]}")


def is_saved_by_torch(path: Path) -> bool:
    """Return whether a file is a zip archive or a pickle, as torch.save writes them."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:  # told by who reads it next
        return False
    # A safetensors file begins with the length of its header, which may look like a pickle, and with the header itself.
    return start.startswith((b"PK\x03\x04", b"\x80")) and not start.endswith(b"{")


def load(path: Path, tell: Callable[[str], None] = lambda line: None) -> dict[str, Tensor]:
    """Return the state_dict in a file that torch.save wrote, by name. `tell` is told where it holds several.

    Raises InputError for a damaged file, one of another form, and one that holds objects beside tensors.
    """
    try:
        require_known(path)
        # Its options are the most common beside weights, and hold no code.
        # Warnings are about tensors that are refused below.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise any exception
        message = str(error)
        if "weights_only" in message or "Weights only" in message:
            if _holds_module(path):
                raise InputError(
                    f"{path} is a whole pickled module, as torch.save(model, FILE) writes it, and loading it would run "
                    "code from the file: write its weights alone, torch.save(model.state_dict(), FILE)"
                ) from error
            raise InputError(
                f"{path} holds Python objects beside tensors, and loading them would run code from the file: "
                f"{SAVE_ALONE}"
            ) from error
        if is_saved_by_torch(path) and not zipfile.is_zipfile(path):
            raise InputError(f"{path} is cut off or damaged: copy or write it again") from error
        line = " ".join(message.split())[:200] or "it is empty"
        raise InputError(f"{path} is not a readable PyTorch file ({line}): copy or write it again") from error
    state = _state(content, DEEPEST)
    others = [key for key in KEYS if _is_another(_state(_under(content, key), DEEPEST - 1), state)]
    if others:
        tell(f"{path} holds this network more than once: {', '.join(map(repr, others))} is not what is read")
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not plain or tensor.is_quantized or tensor.is_complex():
            raise InputError(
                f"{path}: tensor '{name}' is not a dense one of real numbers (it is sparse, quantized, complex or "
                "without values): save the dense tensor"
            )
    if not state:
        raise InputError(f"{path} holds no state_dict: save model.state_dict(), alone or under the key 'state_dict'")
    return state


def _holds_module(path: Path) -> bool:
    """Say whether a pickle holds an nn.Module: the names of what each of them has. Its pickle stands at the start."""
    with path.open("rb") as file:
        start = file.read(2**20)
    return b"_parameters" in start and b"_modules" in start


def masks(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the weights that `state` holds as torch.nn.utils.prune does: apart, with a mask."""
    names = [name.removesuffix("_mask") for name in state if name.endswith("_mask")]
    return [name for name in names if f"{name}_orig" in state and name not in state]


def with_masks_applied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with those weights as the network computes with them, under their own names."""
    applied = {name: state[f"{name}_orig"] * state[f"{name}_mask"] for name in masks(state)}
    used = {f"{name}{end}" for name in applied for end in ("_orig", "_mask")}
    return {name: tensor for name, tensor in state.items() if name not in used} | applied


def _is_another(one: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    """Whether `one` has other tensors by the names of `state`."""
    shared = one.keys() & state.keys()
    return len(shared) > len(state) / 2 and any(one[name] is not state[name] for name in shared)


def _under(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, Mapping) else None


def _state(content: Any, depth: int) -> dict[str, Tensor]:
    """Return the tensors in `content` itself or under its keys, `depth` levels deep, by name; or nothing."""
    if not isinstance(content, Mapping) or not depth:
        return {}
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors
    nested = {str(key): _state(value, depth - 1) for key, value in content.items()}
    known = [key for key in KEYS if nested.get(key)]
    # Without a known key, the largest dict is more likely the network than an optimizer's state.
    return nested[known[0]] if known else max(nested.values(), key=len, default={})
