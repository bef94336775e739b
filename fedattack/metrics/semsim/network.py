"""The nets of SemSim and of the classifiers that make proxy ratings."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.errors import ConfigError
from fedattack.models.classifiers.resnet import ResNet

NetworkName = Literal["resnet18", "small-cnn"]

SMALLEST = 8
"""Side below which three halvings leave nothing."""


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm, ReLU and 2x2 pooling, a 2x2 average, one linear layer.

    `width`, twice and four times it are the channels; `coarse`: the first convolution takes every second pixel, and
    is not pooled, which is some three times cheaper.
    """

    def __init__(self, channels: int, width: int, outputs: int, coarse: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage in range(3):
            wide, skips = width << stage, coarse and stage == 0
            layers += [
                nn.Conv2d(inputs, wide, 3, 2 if skips else 1, 1, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU(),
                nn.Identity() if skips else nn.MaxPool2d(2),
            ]
            inputs = wide
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2))
        self.head = nn.Linear(inputs * 4, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, outputs)."""
        return self.head(self.body(images).flatten(1))


def embedding_network(name: NetworkName, channels: int, width: int, dimensions: int) -> nn.Module:
    """(B, channels, H, W) -> (B, dimensions): `resnet18`, as published, or `small-cnn` of that width.

    The published one is a ResNet-18 with a 3x3 stem, 64 channels wide, without its head: 512 dimensions.
    """
    if name == "small-cnn":
        return SmallCNN(channels, width, dimensions, coarse=True)
    if (width, dimensions) != (64, 512):
        raise ConfigError(f"network 'resnet18' has width 64 and 512 dimensions; got {width} and {dimensions}")
    config = ModelConfig(name="resnet18", channels=channels, image_size=32, classes=1, activation="relu")
    return nn.Sequential(ResNet(config, (2, 2, 2, 2)).body, nn.Flatten())
