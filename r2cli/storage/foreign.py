"""Weights that r2 did not write: a state_dict from a .safetensors or .pth file, matched to a network by name.

Two common forms are understood:

    a state_dict under a key         {"state_dict": {...}, "epoch": 90}, as trainers save it
    a prefix on every name           module. (DataParallel), model. (Lightning), _orig_mod. (torch.compile), ...

Either every tensor of the network is found, or nothing is loaded. No code in the file runs: safetensors files hold no
code, and torch reads .pth files with weights_only=True.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from r2cli.errors import InputError
from r2cli.storage import finite, pth
from r2cli.storage.checkpoint import load_tensors

SHOWN = 12  # a message lists at most this many names of each kind
STEM = "conv1.weight"  # of torchvision's residual networks, whose kernel --stem chooses
STEMS: Mapping[tuple[int, ...], str] = {(7, 7): "imagenet", (3, 3): "small"}


def fitted(state: Mapping[str, Tensor], file: str, model: nn.Module, what: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of `model` among the tensors `state` of `file`. Messages call the network `what`.

    Weights that are stored with a mask are masked, if the network has no masks. Returns the tensors by the names, and
    in the types, of `model`; and the names of tensors in the file that belong to something else, or are such masks.
    Raises InputError for NaN or infinite values, and for weights of another architecture. The message then names each
    tensor that is missing, left over or of another shape.
    """
    masks = [] if pth.masks(model.state_dict()) else [f"{name}_mask" for name in pth.masks(state)]
    weights, others = matched(pth.with_masks_applied(state) if masks else state, model.state_dict(), file, what)
    finite.require(weights, file, finite.OTHERS)
    return weights, masks + others


def read(path: Path, tell: Callable[[str], None] = lambda line: None) -> Mapping[str, Tensor]:
    """All tensors of a file, or those of one of several networks in it, which `tell` is told.

    Raises InputError for a file that is missing, damaged or holds other objects than tensors.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory: give --weights a file")
    if not path.exists():
        raise InputError(f"{path} does not exist: give --weights a .safetensors or .pth file")
    return load_tensors(path)[0] if path.suffix == ".safetensors" else pth.load(path, tell)


def classes_in(state: Mapping[str, Tensor], file: str, model: nn.Module, assumed: int) -> int:
    """How many classes the tensors `state` of `file` are for, where `model` was built for `assumed`: what its last
    layer has in the place of these; `assumed` where they do not tell."""
    expected = model.state_dict()
    prefix, found = _prefix(state, expected, file), set()
    for name, wanted in expected.items():
        given = state.get(f"{prefix}{name}")
        if given is not None and given.shape != wanted.shape:
            is_last = wanted.shape[:1] == (assumed,) and given.ndim and given.shape[1:] == wanted.shape[1:]
            found.add(len(given) if is_last else 0)
    return found.pop() if len(found) == 1 and 0 not in found else assumed


def matched(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: str, what: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of `state` by the names of `expected`, without a prefix, and the names without that prefix.

    Raises InputError where names or shapes differ, and where two prefixes fit.
    """
    prefix = _prefix(state, expected, file)
    given = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    given = _missing_counts(expected, given) | given
    differ = [
        f"'{name}' {tuple(given[name].shape)} not {tuple(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    problems = [
        _listed("missing", [f"'{name}'" for name in expected if name not in given]),
        _listed("left over", [f"'{name}'" for name in given if name not in expected]),
        _listed("of another shape", differ),
    ]
    if any(problems):
        found = "; ".join(filter(None, problems))
        if [name for name in expected if name not in given or given[name].shape != expected[name].shape] == [STEM]:
            found += _stem(given.get(STEM), expected[STEM], what)
        raise InputError(f"{file} does not hold the weights of {what}, and nothing was loaded: {found}")
    others = [name for name in state if not name.startswith(prefix)]
    return {name: given[name].to(tensor.dtype) for name, tensor in expected.items()}, others


def _stem(given: Tensor | None, expected: Tensor, what: str) -> str:
    """The way out where a network by its plain name, so one of torchvision, has another --stem than the weights."""
    if given is None or given.shape[:2] != expected.shape[:2] or not what.isidentifier():
        return ""
    stem = STEMS.get(tuple(given.shape[2:]))
    return f" (give --stem {stem})" if stem and tuple(expected.shape[2:]) in STEMS else ""


def _missing_counts(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros for the batch counts of BatchNorm that are not given: PyTorch before 0.4.1 did not save them."""
    counts = [name for name in expected if name.endswith("num_batches_tracked") and name not in given]
    return {name: torch.zeros_like(expected[name]) for name in counts}


def _prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: str) -> str:
    """Return the prefix under which `state` holds the most names of `expected`.

    Raises InputError where two prefixes have all of them.
    """
    wanted = [name for name in expected if not name.endswith("num_batches_tracked")]
    prefixes = {""}
    for name in state:
        parts = name.split(".")
        prefixes |= {"".join(f"{part}." for part in parts[:cut]) for cut in range(len(parts))}
    matches = {prefix: sum(f"{prefix}{name}" in state for name in wanted) for prefix in sorted(prefixes)}
    best = max(matches, key=lambda prefix: matches[prefix])  # of equal ones the first in order, so the shortest
    whole = [prefix for prefix, count in matches.items() if count == len(wanted)]
    if len(whole) > 1:
        raise InputError(f"{file} holds the network {len(whole)} times, under {whole}: save the one that is meant")
    return best


def _listed(kind: str, names: list[str]) -> str:
    """Return `names` as a part of a message, or an empty text if there are none."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{kind}: {', '.join(names[:SHOWN])}{more}" if names else ""
