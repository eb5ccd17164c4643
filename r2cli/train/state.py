"""The resume state of a training run: one safetensors file, replaced after every epoch.

It holds weights, buffers, optimizers, the regularizer's own parameters, the states of the random generators, the
history, and the options that a run which goes on must share.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2cli.errors import InputError
from r2cli.storage import checkpoint, schema
from r2cli.storage.manifest import OPTIONS
from r2cli.storage.schema import Malformed
from r2cli.train.hooks import Epoch

FORMAT = 2
# What torch's optimizers keep for a parameter: SGD the first, Adam and AdamW the others.
MOMENTUM, STEP, AVERAGES = "momentum_buffer", "step", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """Whatever changes while a run trains, and `identity`: what must be equal for a stopped run to go on."""

    path: Path
    identity: Mapping[str, Any]
    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]  # those that no module holds
    optimizers: Sequence[torch.optim.Optimizer]
    device: torch.device


@dataclass(frozen=True)
class StateEntry:
    """What the metadata of the file holds under `r2_resume`."""

    identity: Mapping[str, Any]
    history: tuple[Epoch, ...]


def save(state: State, history: Sequence[Epoch]) -> None:
    """Write the state after the epochs of `history`, atomically."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in state.modules.items():
        tensors |= {f"{prefix}.{name}": t for name, t in module.state_dict().items()}
    tensors |= {f"parameter.{name}": p for name, p in state.parameters.items()}
    for held, name, _, keys in _held(state):
        tensors |= {f"optimizer.{key}.{name}": held[key] for key in keys if isinstance(held.get(key), Tensor)}
    tensors["rng"] = torch.get_rng_state()
    if state.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(state.device)
    meta = {"format": FORMAT, "identity": state.identity, "history": [asdict(epoch) for epoch in history]}
    checkpoint.save_tensors(state.path, tensors, {"r2_resume": json.dumps(meta)})


def restore(state: State) -> list[Epoch]:
    """Set everything to what the file holds, and return its history.

    Raises InputError for a file that is no resume state, is damaged, or is of a run with other options.
    """
    tensors, metadata = checkpoint.load_tensors(state.path)
    if "r2_resume" not in metadata:
        raise InputError(f"{state.path} is not a resume state: remove it, or start again with --overwrite")
    try:
        meta = schema.parsed(metadata["r2_resume"])
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise InputError(f"{state.path} is another version's resume state: start again with --overwrite")
        entry = schema.read(StateEntry, meta)
        if [epoch.epoch for epoch in entry.history] != list(range(1, len(entry.history) + 1)):
            raise Malformed("its history is not that of epochs 1, 2, and so on")
        _require_same(state.path, entry.identity, json.loads(json.dumps(state.identity)))
        _load(state, tensors)
    except Malformed as error:
        raise InputError(f"{state.path} is damaged ({error}): remove it, or start again with --overwrite") from error
    return list(entry.history)


@torch.no_grad()
def _load(state: State, tensors: Mapping[str, Tensor]) -> None:
    """Set everything to the values of `tensors`. Raises Malformed, before anything is set, where one does not fit."""
    wanted = {
        f"{prefix}.{name}": own for prefix, module in state.modules.items() for name, own in module.state_dict().items()
    }
    wanted |= {f"parameter.{name}": own for name, own in state.parameters.items()}
    wanted["rng"] = torch.get_rng_state()
    trained = {f"{prefix}.{name}" for prefix, module in state.modules.items() for name, _ in module.named_parameters()}
    for name, own in wanted.items():
        found = tensors.get(name)
        if found is None or found.shape != own.shape or found.dtype != own.dtype:
            raise Malformed(f"the tensor '{name}' is missing, or of another shape or type")
        if name in trained and not bool(torch.isfinite(found).all()):
            raise Malformed(f"the tensor '{name}' has NaN or infinite values")
    held = list(_held(state))
    kept = [_of_optimizer(tensors, name, parameter, keys) for _, name, parameter, keys in held]
    for prefix, module in state.modules.items():
        start = f"{prefix}."
        checkpoint.into(module, {k.removeprefix(start): tensors[k] for k in wanted if k.startswith(start)})
    for name, parameter in state.parameters.items():
        parameter.copy_(tensors[f"parameter.{name}"])
    for (own, _, parameter, _), values in zip(held, kept, strict=True):
        own |= {key: _as_in(parameter, tensor) for key, tensor in values.items()}
    try:
        torch.set_rng_state(tensors["rng"])
        if "rng.cuda" in tensors and state.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], state.device)
    except (RuntimeError, TypeError) as error:
        raise Malformed("the state of the random generator is none") from error


def _of_optimizer(
    tensors: Mapping[str, Tensor], name: str, parameter: nn.Parameter, keys: Sequence[str]
) -> dict[str, Tensor]:
    """What the file holds of an optimizer's `keys` for a parameter: all of them, or none before its first gradient."""
    found = {key: tensors[place] for key in keys if (place := f"optimizer.{key}.{name}") in tensors}
    for key, tensor in found.items():
        fits = tensor.shape == parameter.shape or (key == STEP and tensor.shape == ())
        if not fits or not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise Malformed(f"the tensor 'optimizer.{key}.{name}' is of another shape, or has NaN or infinite values")
    if found and len(found) < len(keys):
        raise Malformed(f"the optimizer's values of '{name}' are not complete")
    return found


def _as_in(parameter: Tensor, tensor: Tensor) -> Tensor:
    """In the parameter's own layout: sums over memory then run in the same order as in an unbroken run."""
    if tensor.shape != parameter.shape:
        return tensor  # a count of steps
    return torch.empty_like(parameter.detach()).copy_(tensor)


def _held(state: State) -> Iterator[tuple[dict[str, Any], str, nn.Parameter, Sequence[str]]]:
    """Every parameter of an optimizer: what that holds for it, its name, itself, and the keys of the first."""
    names = {id(p): f"own.{name}" for name, p in state.parameters.items()}
    for module in state.modules.values():
        names |= {id(p): name for name, p in module.named_parameters()}
    for optimizer in state.optimizers:
        keys = (MOMENTUM,) if isinstance(optimizer, torch.optim.SGD) else (STEP, *AVERAGES)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer.state[parameter], names[id(parameter)], parameter, keys


def _require_same(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for part, value in wanted.items():
        if stored.get(part) == value:
            continue
        given = stored.get(part)
        old, new = given if isinstance(given, dict) else {}, value or {}
        changed = next((key for key in {**old, **new} if old.get(key) != new.get(key)), part)
        option = OPTIONS.get(changed, changed.replace("_", "-"))
        raise InputError(
            f"{path} was made with --{option} {old.get(changed)}, not {new.get(changed)}: "
            "resume with the same options, or start again with --overwrite and without --resume"
        )
