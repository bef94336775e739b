"""Small networks of torchvision's layouts, for tests; of transformers 16 patches of 8 x 8 pixels at 32 x 32."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import VisionTransformer


def vit(classes: int, image_size: int) -> nn.Module:
    """Tokens of 64 numbers: more than patches."""
    return VisionTransformer(image_size, 8, 2, 2, 64, 128, num_classes=classes)


def narrow_vit(classes: int, image_size: int) -> nn.Module:
    """Tokens of 12 numbers: fewer than patches."""
    return VisionTransformer(image_size, 8, 1, 2, 12, 24, num_classes=classes)


def without_positions(classes: int, image_size: int) -> nn.Module:
    """Patches, embedded and told apart by nothing but their order."""
    patches = (image_size // 8) ** 2
    return nn.Sequential(nn.Conv2d(3, 64, 8, 8), nn.Flatten(), nn.ReLU(), nn.Linear(64 * patches, classes))


class Pooled(nn.Module):
    """The beginning of an ImageNet ResNet: maximum pooling, and a sum in place."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 7, 2, 3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(6, 6, 3, 1, 1)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        x = self.pool(self.relu(self.stem(images)))
        y = self.conv(x)
        y += x
        return self.fc(self.mean(self.relu(y)).flatten(1))
