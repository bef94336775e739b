"""The plain convolutional network of the gradient-inversion and SemSim benchmarks."""

from __future__ import annotations

from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.errors import ConfigError
from fedattack.models.classifiers.layers import activation


class ConvNet(nn.Module):
    """Eight 3x3 convolutions with BatchNorm, of 1, 2, 2, 4, 4, 4, 4, 4 times `width` channels, and a linear head.

    Two 3x3 max-poolings of stride 3: after the sixth and after the eighth convolution.
    """

    def __init__(self, channels: int, side: int, classes: int, width: int, name: str | None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for number, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
            outputs = factor * width
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), activation(name)]
            if number in (5, 7):
                layers.append(nn.MaxPool2d(3))
            inputs = outputs
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs * (side // 9) ** 2, classes)

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, shape (B, head.in_features)."""
        return self.body(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.head(self.features(images))


def convnet(config: ModelConfig) -> nn.Module:
    """ConvNet of the SemSim benchmark: eight convolutions with BatchNorm, `model.width` (64); 9 pixels or more."""
    channels, side, classes = config.resolved
    if side < 9:
        raise ConfigError(
            f"setting 'model.name' = 'convnet': needs images of 9 x 9 pixels or more, not {side}"
        )
    return ConvNet(channels, side, classes, config.width or 64, config.activation)
