"""Small models for quick tests; named as ``rigged_models:batch_norm_net``."""

from __future__ import annotations

from torch import nn

from fedattack.config import ModelConfig


def batch_norm_net(config: ModelConfig) -> nn.Module:
    """Convolution, BatchNorm, head."""
    assert config.channels is not None
    assert config.image_size is not None
    assert config.classes is not None
    return nn.Sequential(
        nn.Conv2d(config.channels, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * ((config.image_size + 1) // 2) ** 2, config.classes),
    )
