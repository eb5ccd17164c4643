"""The networks of timm, as `timm:NAME`, if timm is installed.

`build` makes the architecture alone: no pre-trained weights, no files, no downloads. `pretrained` downloads weights.
"""

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from r2cli.errors import InputError, unknown
from r2cli.storage.checkpoint import ModelSpec
from r2cli.storage.keywords import require_safe

NAME = re.compile(r"[A-Za-z0-9_.]+")  # without a colon, since `hf-hub:` and `local-dir:` would load something


def has(name: str) -> bool:
    """Say whether `name` is a network of timm."""
    return name.startswith("timm:")


def build(spec: ModelSpec) -> nn.Module:
    """Build a network. Raises InputError if timm is not installed or lacks the name."""
    timm, name = _found(spec.name)
    require_safe(spec.name, spec.args, "the network's description")
    # Given explicitly, so that `spec.args` cannot set them: Python refuses a keyword that is given twice.
    fixed: dict[str, Any] = {"pretrained": False, "pretrained_cfg": None, "checkpoint_path": None, "cache_dir": None}
    model = timm.create_model(name, num_classes=spec.classes, in_chans=spec.channels, **fixed, **spec.args)
    assert isinstance(model, nn.Module)
    return model


def published(name: str) -> Any:
    """Return what timm says of its pre-trained weights of a network; None where it has none."""
    timm, own = _found(name)
    config = timm.get_pretrained_cfg(own, allow_unregistered=False) if timm.is_model_pretrained(own) else None
    return config


def pretrained(spec: ModelSpec) -> Mapping[str, Tensor]:
    """Download timm's weights of a network, with its own code. Raises what that raises."""
    timm, name = _found(spec.name)
    model = timm.create_model(name, pretrained=True, num_classes=spec.classes, in_chans=spec.channels, **spec.args)
    state: Mapping[str, Tensor] = model.state_dict()
    return state


def _found(name: str) -> tuple[Any, str]:
    """Return timm, and the name of a network in it. Raises InputError if timm is not installed or lacks the name."""
    if importlib.util.find_spec("timm") is None:
        raise InputError(f"{name} needs timm, which is not installed: pip install timm")
    import timm

    own = name.removeprefix("timm:")
    if not NAME.fullmatch(own) or not timm.is_model(own):
        raise unknown("timm model", own, timm.list_models())
    return timm, own
