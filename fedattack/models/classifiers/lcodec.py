"""The models on which deep unlearning by L-CODEC was published (Mehta et al., CVPR 2022)."""

from __future__ import annotations

from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.errors import ConfigError
from fedattack.models.classifiers.layers import activation


class LcodecCnn(nn.Module):
    """Two 5x5 convolutions (10 and 20 channels), each halved by max-pooling, and three linear layers."""

    def __init__(self, channels: int, side: int, classes: int, name: str | None) -> None:
        super().__init__()
        left = ((side - 4) // 2 - 4) // 2
        self.conv1, self.conv2 = nn.Conv2d(channels, 10, 5), nn.Conv2d(10, 20, 5)
        self.fc1, self.fc2, self.head = (
            nn.Linear(20 * left**2, 250),
            nn.Linear(250, 100),
            nn.Linear(100, classes),
        )
        self.pool, self.act = nn.MaxPool2d(2), activation(name)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        x = self.pool(self.act(self.conv1(images)))
        x = self.pool(self.act(self.conv2(x))).flatten(1)
        return self.head(self.act(self.fc2(self.act(self.fc1(x)))))


def lcodec_cnn(config: ModelConfig) -> nn.Module:
    """CNN of L-CODEC (Mehta et al., 2022): two convolutions and linear layers of 250 and 100; 16 pixels or more."""
    channels, side, classes = config.resolved
    if side < 16:
        raise ConfigError(
            f"setting 'model.name' = 'lcodec-cnn': needs images of 16 x 16 pixels or more, not {side}"
        )
    return LcodecCnn(channels, side, classes, config.activation)
