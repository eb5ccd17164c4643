"""The residual networks for CIFAR: three stages of 16, 32 and 64 channels with n blocks each, 6n + 2 layers in all.

Paper: He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2. Here, shortcuts that change shape
are 1x1 convolutions with BatchNorm (option B of the paper), and the initial weights are PyTorch's.
"""

import torch
from torch import Tensor, nn

from r2cli.storage.checkpoint import ModelSpec


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (n, inputs, h, w) to (n, outputs, h/s, w/s)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))  # type: ignore[no-any-return]


class ResNetCifar(nn.Module):
    """Images (n, channels, h, w) to logits (n, classes). `blocks` is the number of blocks in each stage."""

    def __init__(self, *, blocks: int, classes: int, channels: int, stem_stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, stem_stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        inputs, stages = 16, []
        for outputs in (16, 32, 64):
            stage = []
            for index in range(blocks):
                stride = 2 if index == 0 and outputs != 16 else 1
                stage.append(BasicBlock(inputs, outputs, stride))
                inputs = outputs
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.norm(self.conv(x))))
        return self.classifier(torch.flatten(self.pool(x), 1))  # type: ignore[no-any-return]


def resnet8(spec: ModelSpec) -> nn.Module:
    return _resnet(spec, blocks=1)


def resnet20(spec: ModelSpec) -> nn.Module:
    return _resnet(spec, blocks=3)


def resnet32(spec: ModelSpec) -> nn.Module:
    return _resnet(spec, blocks=5)


def resnet44(spec: ModelSpec) -> nn.Module:
    return _resnet(spec, blocks=7)


def resnet56(spec: ModelSpec) -> nn.Module:
    return _resnet(spec, blocks=9)


def resnet110(spec: ModelSpec) -> nn.Module:
    return _resnet(spec, blocks=18)


def _resnet(spec: ModelSpec, blocks: int) -> nn.Module:
    stride = 1 if spec.stem == "small" else 2
    return ResNetCifar(blocks=blocks, classes=spec.classes, channels=spec.channels, stem_stride=stride)
