"""Small networks: the LeNet of the gradient-leakage literature, a tiny CNN, a perceptron and a linear model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedattack.config import ModelConfig
from fedattack.models.classifiers.layers import activation, kaiming_uniform


class ConvChain(nn.Module):
    """Convolutions with one activation after each (`body`), flattened into one linear `head`."""

    def __init__(self, body: nn.Sequential, head: nn.Linear, bound: float | None = None) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self._bound = bound

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, shape (B, head.in_features)."""
        return self.body(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        return self.head(self.features(images))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """U(-bound, bound) in every tensor, or Kaiming-uniform with zero biases where no bound was published."""
        if self._bound is None:
            kaiming_uniform(self, generator)
            return
        for parameter in self.parameters():
            parameter.uniform_(-self._bound, self._bound, generator=generator)


def halved(size: int, times: int) -> int:
    """Side of an image after `times` convolutions of stride 2 with padding."""
    for _ in range(times):
        size = (size + 1) // 2
    return size


def lenet_zhu(config: ModelConfig) -> nn.Module:
    """LeNet of Zhu et al. (DLG, 2019) and HCGLA: three 5x5 convolutions of 12 channels, strides 2, 2, 1.

    Weights start at U(-0.5, 0.5) as published, each layer from its own draws (the original re-seeds every layer, so
    that its second and third convolutions are equal).
    """
    channels, size, classes = config.resolved
    body = nn.Sequential(
        nn.Conv2d(channels, 12, 5, stride=2, padding=2),
        activation(config.activation),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        activation(config.activation),
        nn.Conv2d(12, 12, 5, stride=1, padding=2),
        activation(config.activation),
    )
    return ConvChain(body, nn.Linear(12 * halved(size, 2) ** 2, classes), bound=0.5)


def tiny_cnn(config: ModelConfig) -> nn.Module:
    """Two 3x3 convolutions (8 and 16 channels, stride 2) and a head: for many clients and quick tests."""
    channels, size, classes = config.resolved
    body = nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1),
        activation(config.activation),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        activation(config.activation),
    )
    return ConvChain(body, nn.Linear(16 * halved(size, 2) ** 2, classes))


def mlp(config: ModelConfig) -> nn.Module:
    """Perceptron with one hidden layer on the flattened image; `model.width` hidden neurons (64)."""
    channels, size, classes = config.resolved
    hidden = config.width or 64
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size * size, hidden),
        activation(config.activation),
        nn.Linear(hidden, classes),
    )


def logistic(config: ModelConfig) -> nn.Module:
    """Logistic regression: one linear layer on the pixels, the softmax of several classes."""
    channels, size, classes = config.resolved
    return ConvChain(nn.Sequential(), nn.Linear(channels * size * size, classes))
