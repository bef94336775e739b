"""Denoisers by name: networks that predict what is wrong with an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedattack.errors import ConfigError
from fedattack.registry import Registry

DENOISERS: Registry[type[nn.Module]] = Registry(
    "denoiser", {"dncnn": "fedattack.models.decoders.denoisers:DnCNN"}, group="fedattack.denoisers"
)


def build_denoiser(name: str, channels: int, depth: int, width: int) -> nn.Module:
    """A fresh denoiser; its weights come from torch's global stream, so fork and seed that around the call."""
    kind = DENOISERS.get(name)
    if depth < 2:
        raise ConfigError(f"setting 'denoiser.depth' = {depth}: must be at least 2 (published: 17)")
    if width < 1:
        raise ConfigError(f"setting 'denoiser.width' = {width}: must be at least 1 (published: 64)")
    return kind(channels, depth, width)


class DnCNN(nn.Module):
    """Residual learning of the noise (Zhang et al. 2017): conv-ReLU, (depth - 2) x conv-BN-ReLU, conv.

    Convolutions are 3 x 3 without bias, as published with depth 17 and width 64 ("Beyond a Gaussian Denoiser:
    Residual Learning of Deep CNN for Image Denoising", IEEE TIP 2017).
    """

    def __init__(self, channels: int, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1, bias=False))
        for layer in self.body:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        # A denoiser that has learned nothing should do nothing rather than harm.
        with torch.no_grad():
            last = self.body[-1]
            assert isinstance(last, nn.Conv2d)
            last.weight.mul_(0.1)

    def forward(self, noisy: Tensor) -> Tensor:
        """The predicted noise, shape and range of `noisy` (N, C, H, W) minus the clean image."""
        return self.body(noisy)
