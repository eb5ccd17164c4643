"""timm's networks, as `timm:NAME`, where timm is installed."""

import importlib.util

from torch import nn

from r2cli.checkpoint import ModelSpec
from r2cli.errors import InputError, unknown


def has(name: str) -> bool:
    return name.startswith("timm:")


def build(spec: ModelSpec) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise InputError(f"{spec.name} needs timm, which is not installed: pip install timm")
    import timm

    name = spec.name.removeprefix("timm:")
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    try:
        model = timm.create_model(name, num_classes=spec.classes, in_chans=spec.channels, **spec.args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"{spec.name} cannot be made with {dict(spec.args)} ({error}): see its --model-arg") from error
    assert isinstance(model, nn.Module)
    return model
