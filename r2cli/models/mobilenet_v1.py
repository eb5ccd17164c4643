"""MobileNet-V1: depthwise separable convolutions.

Paper: Howard et al., "MobileNets: Efficient CNNs for Mobile Vision Applications" (2017), table 1.
What the paper leaves open: ReLU, convolutions without bias, weights from He's normal distribution by fan-out. The small
stem has stride 1.
"""

from torch import Tensor, nn

from r2cli.storage.checkpoint import ModelSpec

# The output channels and the stride of each separable block at width 1.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class Separable(nn.Module):
    """Depthwise 3x3 and pointwise 1x1, each with BatchNorm and ReLU: (n, inputs, h, w) to (n, outputs, h/s, w/s)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(inputs)
        self.depthwise_relu = nn.ReLU()
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(outputs)
        self.pointwise_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise_relu(self.depthwise_norm(self.depthwise(x)))
        return self.pointwise_relu(self.pointwise_norm(self.pointwise(x)))  # type: ignore[no-any-return]


class MobileNetV1(nn.Module):
    """Images (n, channels, h, w) to logits (n, classes). `width` scales the channels of all layers."""

    def __init__(self, *, classes: int, channels: int, stem_stride: int, width: float) -> None:
        super().__init__()
        inputs = scaled(32, width)
        self.stem = nn.Conv2d(channels, inputs, 3, stem_stride, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(inputs)
        self.stem_relu = nn.ReLU()
        blocks = []
        for outputs, stride in BLOCKS:
            blocks.append(Separable(inputs, scaled(outputs, width), stride))
            inputs = scaled(outputs, width)
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(inputs, classes)
        _he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem_relu(self.stem_norm(self.stem(x))))
        return self.classifier(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


def scaled(channels: int, width: float) -> int:
    """Round `channels * width` to a multiple of 8: at least 8, and never more than 10 % below the exact number.

    This is the rule of Google's own code; processors work on 8 channels at once.
    """
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


def mobilenet_v1(spec: ModelSpec) -> nn.Module:
    stride = 1 if spec.stem == "small" else 2
    return MobileNetV1(classes=spec.classes, channels=spec.channels, stem_stride=stride, width=spec.width)


def _he_normal(model: nn.Module) -> None:
    """Initialise in place: convolutions with variance 2 / fan-out (He et al., 2015), linear layers with std 0.01."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
