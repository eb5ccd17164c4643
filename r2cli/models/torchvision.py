"""The classification networks of torchvision, with a stem that fits the images.

The small stem of a ResNet is that for CIFAR (3x3, stride 1, no pooling). In any other network the first convolution
gets stride 1. For images that do not have three channels, the first convolution is replaced.
"""

from functools import cache

import torchvision
from torch import nn

from r2cli.storage.checkpoint import ModelSpec
from r2cli.storage.keywords import require_safe

# Without the second head that these networks have in training, since a graph has one output. `init_weights` is given
# because torchvision warns about its default.
ARGS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


@cache
def names() -> tuple[str, ...]:
    """Return the names of all classification networks."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def build(spec: ModelSpec) -> nn.Module:
    """Build a network. Raises InputError for keywords that could load something."""
    width = {"width_mult": spec.width} if spec.name == "mobilenet_v2" else {}
    require_safe(spec.name, spec.args, "the network's description")
    args = {**ARGS.get(spec.name, {}), **width, **spec.args}
    model: nn.Module = torchvision.models.get_model(spec.name, weights=None, num_classes=spec.classes, **args)
    if spec.stem == "small" or spec.channels != 3:
        _adapt(model, spec)
    return model


def _adapt(model: nn.Module, spec: ModelSpec) -> None:
    """Replace the first convolution of `model` by one that fits the images, in place."""
    small = spec.stem == "small"
    if isinstance(model, torchvision.models.ResNet):
        model.conv1 = _stem(model.conv1, spec.channels, kernel=3 if small else 7, stride=1 if small else 2)
        if small:
            model.maxpool = nn.Identity()
        return
    name, first = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    # A transformer's first convolution cuts patches. Its stride is their size, and must stay.
    patches = first.kernel_size == first.stride
    stride = 1 if small and not patches else first.stride[0]
    if (stride, spec.channels) != (first.stride[0], first.in_channels):
        model.set_submodule(name, _stem(first, spec.channels, kernel=first.kernel_size[0], stride=stride))


def _stem(old: nn.Conv2d, channels: int, *, kernel: int, stride: int) -> nn.Conv2d:
    padding = kernel // 2 if old.padding != (0, 0) else 0
    conv = nn.Conv2d(channels, old.out_channels, kernel, stride, padding, bias=old.bias is not None)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
