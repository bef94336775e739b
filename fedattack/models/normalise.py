"""Normalisation as a part of the model: images stay in [0, 1] everywhere, and the model takes mean and deviation off.

``x' = (x - mean) / std`` by channel, before the first layer and without a parameter or a buffer of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedattack.config import ModelConfig


class Normaliser:
    """A forward pre-hook that puts ``(images - mean) / std`` in the place of images (B, C, H, W)."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean, self.std = mean, std

    def columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (C, 1, 1), of a tensor's type and device."""
        given: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        mean, std = (torch.tensor(values, **given)[:, None, None] for values in (self.mean, self.std))
        return mean, std

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the module is given instead of its arguments."""
        mean, std = self.columns(inputs[0])
        return ((inputs[0] - mean) / std, *inputs[1:])


def attach(module: nn.Module, model: ModelConfig) -> nn.Module:
    """The module, which normalises what it is given where the configuration says so."""
    found = normaliser(model)
    if found is not None:
        module.register_forward_pre_hook(found)
        module.normaliser = found  # type: ignore[assignment]
    return module


def normalised(module: nn.Module, images: Tensor) -> Tensor:
    """What the parts of a module are given of images where they are called without it."""
    found = getattr(module, "normaliser", None)
    return images if found is None else found(module, (images,))[0]


def normaliser(model: ModelConfig) -> Normaliser | None:
    """What a resolved configuration has done to images; None: nothing."""
    if model.mean is None and model.std is None:
        return None
    channels = model.resolved[0]
    return Normaliser(model.mean or (0.0,) * channels, model.std or (1.0,) * channels)


def bare(model: ModelConfig) -> ModelConfig:
    """The same model without normalisation, which is given what :func:`shown` answers."""
    return model.model_copy(update={"mean": None, "std": None})


def shown(images: Tensor, model: ModelConfig) -> Tensor:
    """What the first layer sees of images (..., C, H, W) in [0, 1]."""
    found = normaliser(model)
    if found is None:
        return images
    mean, std = found.columns(images)
    return (images - mean) / std


def pixels(inputs: Tensor, model: ModelConfig) -> Tensor:
    """The images (..., C, H, W) of which the first layer sees `inputs`."""
    found = normaliser(model)
    if found is None:
        return inputs
    mean, std = found.columns(inputs)
    return inputs * std + mean


def per_pixel(model: ModelConfig, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of each pixel of a flattened image (d,); None without normalisation."""
    found = normaliser(model)
    if found is None:
        return None
    channels, side, _ = model.resolved
    mean, std = (one.expand(channels, side, side).flatten() for one in found.columns(like))
    return mean, std
