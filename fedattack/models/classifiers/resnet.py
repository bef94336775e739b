"""Residual networks for 32x32 images: as HCGLA uses them (sigmoid) and as people use them (any other activation)."""

from __future__ import annotations

from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.models.classifiers.layers import activation


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a projected shortcut where shapes differ (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, name: str | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act = activation(name)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR-style residual network: 3x3 stem, stages whose width doubles and side halves, pool, linear head.

    `blocks` of each stage, `width` of stem and first stage; `hcgla`: all strides 1 and the head on 4x4-pooled
    features.
    """

    def __init__(
        self, config: ModelConfig, blocks: tuple[int, ...], width: int = 64, hcgla: bool = False
    ) -> None:
        super().__init__()
        channels, size, classes = config.resolved
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            activation(config.activation),
        ]
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width << stage
            for block in range(count):
                stride = 2 if stage and block == 0 and not hcgla else 1
                layers.append(BasicBlock(inputs, outputs, stride, config.activation))
                inputs = outputs
        side = size // 4 if hcgla else 1
        self.body = nn.Sequential(*layers, nn.AvgPool2d(4) if hcgla else nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(inputs * side * side, classes)

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, shape (B, head.in_features)."""
        return self.body(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.head(self.features(images))


def resnet20(config: ModelConfig) -> nn.Module:
    """ResNet-20 for 32x32 (He et al. 2016): 16, 32, 64 channels, projected shortcuts, 272,474 parameters."""
    return ResNet(config, (3, 3, 3), width=16)


def resnet20_4(config: ModelConfig) -> nn.Module:
    """ResNet20-4 of the SemSim benchmark: ResNet-20 with 64, 128, 256 channels; `model.width` is the first (64)."""
    return ResNet(config, (3, 3, 3), width=config.width or 64)


def resnet18(config: ModelConfig) -> nn.Module:
    """ResNet-18 for 32x32: with sigmoid, HCGLA's (all strides 1, 500-way head on 32,768 features); else the usual."""
    return ResNet(config, (2, 2, 2, 2), hcgla=config.activation == "sigmoid")


def resnet34(config: ModelConfig) -> nn.Module:
    """ResNet-34 for 32x32: with sigmoid, HCGLA's (all strides 1, 500-way head on 32,768 features); else the usual."""
    return ResNet(config, (3, 4, 6, 3), hcgla=config.activation == "sigmoid")
