"""Foreign weights: a state_dict from a .safetensors or .pth file, matched to a network tensor by tensor.

    a state_dict under a key         {"state_dict": {...}, "epoch": 90}, as trainers save it
    a prefix on every name           module. (DataParallel), model. (Lightning), _orig_mod. (torch.compile), ...

All tensors of the network are found or none is loaded. No code in the file runs: safetensors has none, and torch reads
the others with weights_only=True.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2cli.errors import InputError
from r2cli.storage.checkpoint import load_tensors

SHOWN = 12  # names of each kind that a message lists

# Trainers' names for the weights, best first: an average of the weights is what they evaluate.
KEYS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net", "network", "weights")


def load(path: Path, model: nn.Module, what: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of `path` under the names and in the types of `model`, a network called `what`; and the names of what
    stands in the file beside that network, and was left there.

    Raises InputError for a file that is missing, corrupt or holds more than tensors, for NaN or infinite values, and
    for weights of another architecture, naming every tensor that is missing, left over or of another shape.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory: give --weights a file")
    if not path.exists():
        raise InputError(f"{path} does not exist: give --weights a .safetensors or .pth file")
    state = load_tensors(path)[0] if path.suffix == ".safetensors" else _load_pth(path)
    found, beside = matched(state, model.state_dict(), str(path), what)
    for name, tensor in found.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise InputError(f"{path}: tensor '{name}' has {bad} NaN or infinite values of {tensor.numel()}")
    return found, beside


def matched(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], file: str, what: str
) -> tuple[dict[str, Tensor], list[str]]:
    """`state` under the names of `own`, less the prefix that all of them share; and the names without that prefix.

    A count of batches that an older BatchNorm did not keep is 0. Raises InputError where the two differ, and where two
    prefixes fit.
    """
    prefix = _prefix(state, own, file)
    held = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    held = {name: t.zero_() for name, t in _counts(own).items() if name not in held} | held
    differ = [
        f"'{name}' {tuple(held[name].shape)} not {tuple(own[name].shape)}"
        for name in own
        if name in held and held[name].shape != own[name].shape
    ]
    told = [
        _listed("missing", [f"'{name}'" for name in own if name not in held]),
        _listed("left over", [f"'{name}'" for name in held if name not in own]),
        _listed("of another shape", differ),
    ]
    if any(told):
        raise InputError(
            f"{file} does not hold the weights of {what}, and nothing was loaded: {'; '.join(filter(None, told))}"
        )
    beside = [name for name in state if not name.startswith(prefix)]
    return {name: held[name].to(tensor.dtype) for name, tensor in own.items()}, beside


def _counts(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(t) for name, t in own.items() if name.endswith("num_batches_tracked")}


def _prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor], file: str) -> str:
    """The prefix under which `state` holds the most names of `own`. Raises InputError for two with all of them."""
    wanted = [name for name in own if not name.endswith("num_batches_tracked")]
    prefixes = {""}
    for name in state:
        parts = name.split(".")
        prefixes |= {"".join(f"{part}." for part in parts[:cut]) for cut in range(len(parts))}
    held = {prefix: sum(f"{prefix}{name}" in state for name in wanted) for prefix in sorted(prefixes)}
    best = max(held, key=lambda prefix: held[prefix])  # the first in order, so the shortest of nested ones
    whole = [prefix for prefix, count in held.items() if count == len(wanted)]
    if len(whole) > 1:
        raise InputError(f"{file} holds the network {len(whole)} times, under {whole}: save the one that is meant")
    return best


def _listed(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{kind}: {', '.join(names[:SHOWN])}{more}" if names else ""


def _load_pth(path: Path) -> dict[str, Tensor]:
    """The state_dict of a file that torch.save wrote, without running any code in it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises anything
        told = str(error)
        if "weights_only" in told or "Weights only" in told:
            raise InputError(
                f"{path} holds Python objects beside tensors, and loading them would run code from the file: save "
                "model.state_dict() alone, or as .safetensors"
            ) from error
        line = " ".join(told.split())[:200]
        raise InputError(f"{path} is not a readable PyTorch file ({line}): copy or write it again") from error
    state = _state(content)
    if not state:
        raise InputError(f"{path} holds no state_dict: save model.state_dict(), alone or under the key 'state_dict'")
    return state


def _state(content: Any) -> dict[str, Tensor]:
    """The tensors by name in `content` itself or under one of its keys; empty where there are none."""
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors
    nested = {str(key): _state(value) for key, value in content.items()}
    known = [key for key in KEYS if nested.get(key)]
    return nested[known[0]] if known else max(nested.values(), key=len, default={})
