"""torchvision's networks, with the stem that the image asks for.

The small stem of ResNet-18 is the CIFAR one (3x3, stride 1, no pooling); that of MobileNet-V2 has stride 1.
"""

import torchvision
from torch import nn

from r2cli.checkpoint import ModelSpec


def resnet18(spec: ModelSpec) -> nn.Module:
    model: nn.Module = torchvision.models.resnet18(weights=None, num_classes=spec.classes)
    if spec.stem == "small":
        model.conv1 = _stem(spec.channels, 64, kernel=3, stride=1)
        model.maxpool = nn.Identity()
    elif spec.channels != 3:
        model.conv1 = _stem(spec.channels, 64, kernel=7, stride=2)
    return model


def mobilenet_v2(spec: ModelSpec) -> nn.Module:
    model: nn.Module = torchvision.models.mobilenet_v2(weights=None, num_classes=spec.classes, width_mult=spec.width)
    if spec.stem == "small" or spec.channels != 3:
        old = model.get_submodule("features.0.0")
        assert isinstance(old, nn.Conv2d)
        stride = 1 if spec.stem == "small" else 2
        model.set_submodule("features.0.0", _stem(spec.channels, old.out_channels, kernel=3, stride=stride))
    return model


def _stem(channels: int, outputs: int, *, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
