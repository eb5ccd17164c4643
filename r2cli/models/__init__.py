"""Networks by name: `build(spec)` makes one with fresh weights; the spec is what a checkpoint records.

A stem is 'imagenet' as its paper has it, or 'small' for images of at most 64 pixels: stride 1, and no pooling before
the first block.
"""

from collections.abc import Callable, Mapping

from torch import nn

from r2cli.checkpoint import ModelSpec
from r2cli.errors import InputError, unknown
from r2cli.models.mobilenet_v1 import mobilenet_v1
from r2cli.models.resnet_cifar import resnet8, resnet20
from r2cli.models.torchvision import mobilenet_v2, resnet18

SMALL_IMAGE = 64  # pixels; the largest image that gets the small stem

MODELS: Mapping[str, Callable[[ModelSpec], nn.Module]] = {
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet20": resnet20,
}
HAS_WIDTH = ("mobilenet_v1", "mobilenet_v2")


def spec(name: str, *, classes: int, channels: int, size: int, width: float | None) -> ModelSpec:
    """The spec of a network for images of `channels` x `size` x `size`. Raises InputError for what no network has."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    if width is not None and name not in HAS_WIDTH:
        raise InputError(f"--width does not apply to {name}: only {' and '.join(HAS_WIDTH)} have one")
    if width is not None and not 0 < width <= 4:
        raise InputError(f"--width {width:g} is out of range: give a factor above 0 and at most 4")
    stem = "small" if size <= SMALL_IMAGE else "imagenet"
    default = 0.25 if name == "mobilenet_v1" else 1.0
    return ModelSpec(name, classes, channels, stem, (default if width is None else width))


def build(spec: ModelSpec) -> nn.Module:
    """The network of `spec` with fresh weights: (batch, channels, size, size) to logits (batch, classes)."""
    if spec.name not in MODELS:
        raise unknown("model", spec.name, MODELS)
    return MODELS[spec.name](spec)
