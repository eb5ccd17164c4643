"""Networks by name: `build(spec)` makes one with fresh weights; the spec is what a checkpoint records.

    mobilenet_v1, resnet8 ... resnet110    ours
    resnet18, mobilenet_v2, vit_b_16 ...   every classification model of torchvision
    timm:NAME                              every model of timm, where it is installed
    mobilebert, text:DIR, text:HUB/NAME    sequence classifiers of transformers, where it is installed
    file.py:FACTORY, package.module:FACTORY    the user's own: imported only when named on the command line

A stem is 'imagenet' as its paper has it, or 'small' for images of at most 64 pixels: stride 1, and no pooling before
the first block.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from r2cli.errors import InputError, unknown
from r2cli.models import own, text, timm, torchvision
from r2cli.models.mobilenet_v1 import mobilenet_v1
from r2cli.models.resnet_cifar import resnet8, resnet20, resnet32, resnet44, resnet56, resnet110
from r2cli.storage.checkpoint import ModelSpec
from r2cli.storage.keywords import is_own, require_safe

SMALL_IMAGE = 64  # pixels; the largest image that gets the small stem
STEMS = ("small", "imagenet")

MODELS: Mapping[str, Callable[[ModelSpec], nn.Module]] = {
    "mobilenet_v1": mobilenet_v1,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
}
HAS_WIDTH = ("mobilenet_v1", "mobilenet_v2")


def spec(
    name: str,
    *,
    classes: int,
    channels: int,
    size: int,
    width: float | None = None,
    stem: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """The spec of a network for images of `channels` x `size` x `size`. Imports the user's own code if `name` is of it.

    Raises InputError for a name that nobody has, and for options that do not apply to it.
    """
    if text.has(name):
        for option, value in (("--width", width), ("--stem", stem)):
            if value is not None:
                raise InputError(f"{option} does not apply to {name}: it reads text")
        family, config = text.architecture(name, args or {}, size)
        return ModelSpec(family, classes, channels, args=config)
    factory = own.factory(name) if is_own(name) else None
    if factory is None:
        _require_known(name)
    if width is not None and name not in HAS_WIDTH:
        raise InputError(f"--width does not apply to {name}: only {' and '.join(HAS_WIDTH)} have one")
    if width is not None and not 0 < width <= 4:
        raise InputError(f"--width {width:g} is out of range: give a factor above 0 and at most 4")
    if args and name in MODELS:
        raise InputError(f"--model-arg does not apply to {name}: it has no keywords of its own")
    if stem is not None and (factory or timm.has(name)):
        raise InputError(f"--stem does not apply to {name}: its own code says what its first layer is")
    if stem is not None and stem not in STEMS:
        raise unknown("--stem", stem, STEMS)
    own_stem = stem or ("small" if size <= SMALL_IMAGE and not factory and not timm.has(name) else "imagenet")
    default = 0.25 if name == "mobilenet_v1" else 1.0
    if factory is None:
        require_safe(name, args or {}, "--model-arg")
    label = own.label(name) if factory else name
    return ModelSpec(label, classes, channels, own_stem, default if width is None else width, args or {}, factory)


def build(spec: ModelSpec) -> nn.Module:
    """The network of `spec` with fresh weights: (batch, channels, size, size) to logits (batch, classes).

    Raises InputError for a name that nobody has, for the user's own code that the command line did not name, and for a
    factory that raises, wants other arguments, or returns no module.
    """
    if spec.factory is not None:
        return own.build(spec)
    if text.has(spec.name):
        return text.build(spec)
    if is_own(spec.name):
        raise InputError(
            f"the network is made by {spec.name}, which is not r2's and runs only when you name it: "
            f"give --model FILE.py:{spec.name.rpartition(':')[2]}"
        )
    _require_known(spec.name)
    if spec.name in MODELS:
        return MODELS[spec.name](spec)
    return timm.build(spec) if timm.has(spec.name) else torchvision.build(spec)


@torch.inference_mode()
def require_fit(model: nn.Module, spec: ModelSpec, shape: tuple[int, ...]) -> None:
    """Run one black image, or an empty text, of `shape` through `model`.

    Raises InputError where it cannot pass or gives other logits.
    """
    size, kind = "x".join(map(str, shape)), torch.int64 if text.has(spec.name) else torch.float32
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        logits = model.eval()(torch.zeros(1, *shape, device=device, dtype=kind))
    except Exception as error:
        told = " ".join(str(error).split())
        raise InputError(f"{spec.name} cannot take images of {size} ({told}): give another --size or --data") from error
    if not isinstance(logits, Tensor):
        raise InputError(f"{spec.name} returns a {type(logits).__name__}: it must return one tensor of logits")
    if tuple(logits.shape) != (1, spec.classes):
        raise InputError(
            f"{spec.name} gives an image {tuple(logits.shape)[1:]} logits, the data has {spec.classes} classes: "
            "give the data that it was made for, or a --model-arg that sets its classes"
        )


def _require_known(name: str) -> None:
    if name not in MODELS and not timm.has(name) and name not in torchvision.names():
        raise unknown(
            "model", name, [*MODELS, *torchvision.names(), "timm:NAME", "mobilebert", "text:DIR", "file.py:FACTORY"]
        )
