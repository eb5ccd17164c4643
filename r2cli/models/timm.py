"""The networks of timm, as `timm:NAME`, if timm is installed.

Only the architecture is built: no pre-trained weights, no files, no downloads.
"""

import importlib.util
import re
from typing import Any

from torch import nn

from r2cli.errors import InputError, unknown
from r2cli.storage.checkpoint import ModelSpec
from r2cli.storage.keywords import require_safe

NAME = re.compile(r"[A-Za-z0-9_.]+")  # without a colon, since `hf-hub:` and `local-dir:` would load something


def has(name: str) -> bool:
    """Say whether `name` is a network of timm."""
    return name.startswith("timm:")


def build(spec: ModelSpec) -> nn.Module:
    """Build a network. Raises InputError if timm is not installed, lacks the name, or refuses the keywords."""
    if importlib.util.find_spec("timm") is None:
        raise InputError(f"{spec.name} needs timm, which is not installed: pip install timm")
    import timm

    name = spec.name.removeprefix("timm:")
    if not NAME.fullmatch(name) or not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    require_safe(spec.name, spec.args, "the network's description")
    # Given explicitly, so that `spec.args` cannot set them: Python refuses a keyword that is given twice.
    fixed: dict[str, Any] = {"pretrained": False, "pretrained_cfg": None, "checkpoint_path": None, "cache_dir": None}
    try:
        model = timm.create_model(name, num_classes=spec.classes, in_chans=spec.channels, **fixed, **spec.args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"{spec.name} cannot be made with {dict(spec.args)} ({error}): see its --model-arg") from error
    assert isinstance(model, nn.Module)
    return model
