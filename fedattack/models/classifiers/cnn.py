"""Convolutional networks with hidden linear layers, as federations in the literature and in tutorials train them."""

from __future__ import annotations

from torch import nn

from fedattack.config import ModelConfig
from fedattack.errors import ConfigError
from fedattack.models.classifiers.layers import activation
from fedattack.models.classifiers.lenet import ConvChain


def cnn_mcmahan(config: ModelConfig) -> nn.Module:
    """CNN of McMahan et al. (FedAvg, 2017): 5x5 convolutions (32, 64) with pooling, `model.width` (512) neurons."""
    channels, size, classes = config.resolved
    if size < 4:
        raise ConfigError(
            f"setting 'model.name' = 'cnn-mcmahan': needs images of 4 x 4 pixels or more, not {size}"
        )
    hidden = config.width or 512
    body = nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        activation(config.activation),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        activation(config.activation),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (size // 4) ** 2, hidden),
        activation(config.activation),
    )
    return ConvChain(body, nn.Linear(hidden, classes))


def cnn_flower(config: ModelConfig) -> nn.Module:
    """Network of PyTorch's and Flower's tutorials: 5x5 convolutions (6, 16) with pooling, 120 and 84 neurons."""
    channels, size, classes = config.resolved
    side = ((size - 4) // 2 - 4) // 2
    if side < 1:
        raise ConfigError(
            f"setting 'model.name' = 'cnn-flower': needs images of 16 x 16 pixels or more, not {size}"
        )
    body = nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        activation(config.activation),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        activation(config.activation),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * side**2, 120),
        activation(config.activation),
        nn.Linear(120, 84),
        activation(config.activation),
    )
    return ConvChain(body, nn.Linear(84, classes))
