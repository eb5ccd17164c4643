"""timm's networks, as `timm:NAME`, where timm is installed.

Nothing but an architecture is made here: no pre-trained weights, no file, no hub.
"""

import importlib.util
import re
from typing import Any

from torch import nn

from r2cli.errors import InputError, unknown
from r2cli.storage.checkpoint import ModelSpec
from r2cli.storage.keywords import require_safe

NAME = re.compile(r"[A-Za-z0-9_.]+")  # no `hf-hub:` or `local-dir:` before it


def has(name: str) -> bool:
    return name.startswith("timm:")


def build(spec: ModelSpec) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise InputError(f"{spec.name} needs timm, which is not installed: pip install timm")
    import timm

    name = spec.name.removeprefix("timm:")
    if not NAME.fullmatch(name) or not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    require_safe(spec.name, spec.args, "the network's description")
    # Stated, so that no keyword can say otherwise: a second value for one of them is an error.
    alone: dict[str, Any] = {"pretrained": False, "pretrained_cfg": None, "checkpoint_path": None, "cache_dir": None}
    try:
        model = timm.create_model(name, num_classes=spec.classes, in_chans=spec.channels, **alone, **spec.args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"{spec.name} cannot be made with {dict(spec.args)} ({error}): see its --model-arg") from error
    assert isinstance(model, nn.Module)
    return model
