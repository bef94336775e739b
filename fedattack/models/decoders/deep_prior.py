"""An untrained network whose outputs look more like images than like noise: a deep image prior."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImagePrior(nn.Module):
    """A small hourglass from fixed noise to images in (0, 1), to be fitted to one measurement.

    Three scales of stride-2 convolutions down and bilinear upsampling back, with a thin skip at each scale (Ulyanov,
    Vedaldi, Lempitsky, "Deep Image Prior", CVPR 2018). GroupNorm instead of the original's BatchNorm, so that images
    of a batch do not depend on each other. Image sides and `width`, the channels of all hidden layers, are multiples
    of 8.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int = 32, inputs: int = 16) -> None:
        super().__init__()
        channels, height, side = image_shape
        if height % 8 or side % 8 or width % 8:
            raise ValueError(f"image sides {height}, {side} and width {width} must be divisible by 8")
        self.noise_shape = (inputs, height, side)
        self.down = nn.ModuleList(
            nn.Sequential(_convolution(inputs if scale == 0 else width, width, 2), _convolution(width, width))
            for scale in range(3)
        )
        self.skip = nn.ModuleList(
            _convolution(inputs if scale == 0 else width, 8, size=1) for scale in range(3)
        )
        self.up = nn.ModuleList(_convolution(width + 8, width) for _ in range(3))
        self.last = nn.Conv2d(width, channels, 1)

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Inputs for `count` images, float32 (count, inputs, H, W), uniform in [0, 0.1)."""
        return 0.1 * torch.rand(count, *self.noise_shape, generator=generator)

    def forward(self, noise: Tensor) -> Tensor:
        """Images (N, C, H, W) in (0, 1) of noise (N, inputs, H, W)."""
        x, skips = noise, []
        for down, skip in zip(self.down, self.skip, strict=True):
            skips.append(skip(x))
            x = down(x)
        for up, skipped in zip(self.up, reversed(skips), strict=True):
            wide = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = up(torch.cat([wide, skipped], 1))
        return torch.sigmoid(self.last(x))


def _convolution(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2),
        nn.GroupNorm(outputs // 8, outputs),
        nn.LeakyReLU(0.2),
    )
