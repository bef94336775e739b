"""Networks behind a block that a malicious server put in front: the server chooses the architecture too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.models.classifiers.layers import kaiming_uniform
from fedattack.models.classifiers.lenet import tiny_cnn

CEILING = 2.0**-10
"""Of the clipped ReLU. Low, for the smaller the wide layer, the larger its gradient against all others."""


class Imprinted(nn.Module):
    """A network `rest` that sees its image plus what a wide layer on the same image adds to it.

    With ``x`` the flattened image (C * H * W), `rest` is given ``x + back(act(measure(x)))``. `measure` has a bias:
    in an armed round its rows are bins of one or more measurements. `act` is the ReLU, or the clipped ReLU
    min(max(u, 0), :data:`CEILING`), which only moves inside its own bin.
    """

    def __init__(self, rest: nn.Module, act: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        assert config.width is not None
        channels, side, _ = config.resolved
        pixels = channels * side**2
        self.measure = nn.Linear(pixels, config.width)
        self.act = act
        self.back = nn.Linear(config.width, pixels, bias=False)
        self.rest = rest

    def after(self, hidden: Tensor, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) whose wide layer answered `hidden` (B, width)."""
        return self.rest(images + self.back(hidden).reshape(images.shape))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.after(self.act(self.measure(images.flatten(1))), images)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Kaiming-uniform weights and zero biases; `back` at a tenth, so that the image leads at first."""
        kaiming_uniform(self, generator)
        self.back.weight.mul_(0.1)


def imprint(config: ModelConfig) -> nn.Module:
    """The tiny CNN behind a malicious server's ReLU block on the image; `model.width` bins (1024)."""
    return Imprinted(tiny_cnn(config), nn.ReLU(), config)


def imprint_sparse(config: ModelConfig) -> nn.Module:
    """The same with a clipped ReLU, whose neurons each see the images of one bin alone; `model.width` bins (1024)."""
    return Imprinted(tiny_cnn(config), nn.Hardtanh(0.0, CEILING), config)
