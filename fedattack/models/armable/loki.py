"""The imprint block behind convolution kernels, through which a server can keep clients apart in their sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.models.armable.imprint import CEILING, Imprinted
from fedattack.models.classifiers.lenet import tiny_cnn

KERNEL_SETS = 8
"""Where `model.kernel_sets` leaves it open: as many as a federation has clients by default."""


class KernelSets(Imprinted):
    """An :class:`~fedattack.models.armable.imprint.Imprinted` whose wide layer sees the image through kernels.

    There are S sets of as many 3 x 3 kernels as the image has channels, and the wide layer has columns of its own for
    each set: `kernels` map (C, H, W) to (S * C, H + 2, W + 2), set by set. Padding is one pixel more than keeps the
    size: the outermost ring of a kernel that passes its channel on holds nothing but the kernel's bias.
    """

    def __init__(self, rest: nn.Module, act: nn.Module, config: ModelConfig) -> None:
        super().__init__(rest, act, config)
        channels, side, _ = config.resolved
        self.sets = config.kernel_sets or KERNEL_SETS
        filters = self.sets * channels
        self.kernels = nn.Conv2d(channels, filters, 3, padding=2)
        self.measure = nn.Linear(filters * (side + 2) ** 2, self.measure.out_features)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.after(self.act(self.measure(self.kernels(images).flatten(1))), images)

    def columns(self, matrix: Tensor) -> Tensor:
        """A matrix like the wide layer's weight (width, columns), as (width, S, C, H + 2, W + 2)."""
        side = round((matrix.shape[1] / self.kernels.out_channels) ** 0.5)
        return matrix.unflatten(1, (self.sets, self.kernels.in_channels, side, side))


def loki(config: ModelConfig) -> nn.Module:
    """The tiny CNN behind a malicious server's kernels and clipped bins; `model.width` bins (256)."""
    return KernelSets(tiny_cnn(config), nn.Hardtanh(0.0, CEILING), config)


@torch.no_grad()
def identities(module: KernelSets) -> tuple[Tensor, Tensor]:
    """Kernels that pass each set its image on, plus one: weight (S * C, C, 3, 3) and bias (S * C,)."""
    weight, bias = torch.zeros_like(module.kernels.weight), torch.ones(module.kernels.out_channels)
    places = torch.arange(module.kernels.out_channels)
    weight[places, places % module.kernels.in_channels, 1, 1] = 1.0
    return weight, bias
