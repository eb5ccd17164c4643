"""The resume state of a training run: one safetensors file, replaced after every epoch.

It holds weights, buffers, optimizers, the regularizer's own parameters, the states of the random generators, the
history, and the options that a run which goes on must share.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2cli.errors import InputError
from r2cli.storage import checkpoint
from r2cli.storage.run_files import OPTIONS

FORMAT = 2


@dataclass(frozen=True)
class State:
    """Whatever changes while a run trains, and `identity`: what must be equal for a stopped run to go on."""

    path: Path
    identity: Mapping[str, Any]
    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]  # those that no module holds
    optimizers: Sequence[torch.optim.Optimizer]
    device: torch.device


def save(state: State, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the state after the epochs of `history`, atomically."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in state.modules.items():
        tensors |= {f"{prefix}.{name}": t for name, t in module.state_dict().items()}
    tensors |= {f"parameter.{name}": p for name, p in state.parameters.items()}
    for name, _, held in _held(state):
        tensors |= {f"optimizer.{key}.{name}": t for key, t in held.items() if isinstance(t, Tensor)}
    tensors["rng"] = torch.get_rng_state()
    if state.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(state.device)
    meta = {"format": FORMAT, "identity": state.identity, "history": list(history)}
    checkpoint.save_tensors(state.path, tensors, {"r2_resume": json.dumps(meta)})


def restore(state: State) -> list[dict[str, Any]]:
    """Set everything to what the file holds, and return its history.

    Raises InputError for a file that is no resume state, is damaged, or is of a run with other options.
    """
    tensors, metadata = checkpoint.load_tensors(state.path)
    if "r2_resume" not in metadata:
        raise InputError(f"{state.path} is not a resume state: remove it, or start again with --overwrite")
    try:
        meta = json.loads(metadata["r2_resume"])
        if meta["format"] != FORMAT:
            raise InputError(f"{state.path} is another version's resume state: start again with --overwrite")
        _require_same(state.path, meta["identity"], json.loads(json.dumps(state.identity)))
        _load(state, tensors)
        return list(meta["history"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{state.path} is damaged ({error}): remove it, or start again with --overwrite") from error


@torch.no_grad()
def _load(state: State, tensors: Mapping[str, Tensor]) -> None:
    for prefix, module in state.modules.items():
        start = f"{prefix}."
        checkpoint.into(module, {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)})
    for name, parameter in state.parameters.items():
        parameter.copy_(tensors[f"parameter.{name}"])
    stored: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        kind, _, rest = full.partition(".")
        if kind == "optimizer":
            key, _, name = rest.partition(".")
            stored.setdefault(name, {})[key] = tensor
    for name, parameter, held in _held(state):
        held |= {key: _as_in(parameter, tensor) for key, tensor in stored.get(name, {}).items()}
    torch.set_rng_state(tensors["rng"])
    if "rng.cuda" in tensors and state.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], state.device)


def _as_in(parameter: Tensor, tensor: Tensor) -> Tensor:
    """In the parameter's own layout: sums over memory then run in the same order as in an unbroken run."""
    if tensor.shape != parameter.shape:
        return tensor  # a count of steps
    return torch.empty_like(parameter.detach()).copy_(tensor)


def _held(state: State) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    """Every parameter of an optimizer: its name, itself, and what the optimizer holds for it."""
    names = {id(p): f"own.{name}" for name, p in state.parameters.items()}
    for module in state.modules.values():
        names |= {id(p): name for name, p in module.named_parameters()}
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter, optimizer.state[parameter]


def _require_same(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for part, value in wanted.items():
        if stored.get(part) == value:
            continue
        old, new = stored.get(part) or {}, value or {}
        changed = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        option = OPTIONS.get(changed, changed.replace("_", "-"))
        raise InputError(
            f"{path} was made with --{option} {old.get(changed)}, not {new.get(changed)}: "
            "resume with the same options, or start again with --overwrite and without --resume"
        )
