"""A wide two-layer head: what a server must be given to read whole batches off one gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.models.classifiers.layers import activation
from fedattack.models.classifiers.lenet import halved


class TwoLayer(nn.Module):
    """`stem`: images to features (B, d) -> `wide` linear layer -> activation -> linear `head`, both without bias."""

    def __init__(self, stem: nn.Module, features: int, config: ModelConfig) -> None:
        super().__init__()
        assert config.width is not None
        self.stem = stem
        self.wide = nn.Linear(features, config.width, bias=False)
        self.act = activation(config.activation)
        self.head = nn.Linear(config.width, config.resolved[2], bias=False)

    def inputs(self, images: Tensor) -> Tensor:
        """What the wide layer sees, shape (B, d)."""
        return self.stem(images)

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, shape (B, width)."""
        return self.act(self.wide(self.stem(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.head(self.features(images))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Kaiming-uniform convolutions and head with zero biases; wide layer N(0, 1/d), so that w.x stays near 1.

        Cubic activations grow with the third power of their input, and a wider draw diverges in training.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name == "wide.weight":
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                limit = (3.0 / parameter[0].numel()) ** 0.5
                parameter.uniform_(-limit, limit, generator=generator)


def two_layer(config: ModelConfig) -> nn.Module:
    """Two-layer network on the flattened image without biases; `model.width` hidden neurons (1024)."""
    channels, side, _ = config.resolved
    return TwoLayer(nn.Flatten(), channels * side**2, config)


def lenet_two_layer(config: ModelConfig) -> nn.Module:
    """The two-layer network behind two 5x5 convolutions of 12 channels with stride 2 and sigmoid, LeNet's stem."""
    channels, side, _ = config.resolved
    stem = nn.Sequential(
        nn.Conv2d(channels, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
    )
    return TwoLayer(stem, 12 * halved(side, 2) ** 2, config)
