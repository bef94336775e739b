"""Scores of pixels: batched, per image, on one scale.

Everything takes float tensors of shape (B, C, H, W) with pixels meant for [0, 1] and clamps them first, with
a data range of 1. Per-image vectors are primary; means are left to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedattack.errors import DataError
from fedattack.metrics.base import ImageMetric, Pairs


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each pair, after clamping, float64 (B,); DataError if they are not both (B, C, H, W)."""
    a, b = pair_of(images, truth)
    return (a - b).square().mean(dim=(1, 2, 3))


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, data range 1; infinite for identical images. As :func:`mse`."""
    return -10 * torch.log10(mse(images, truth))


def out_of_range_share(images: Tensor) -> Tensor:
    """Share of each image's pixels outside [0, 1] (or not a number), before any clamping; float64, shape (B,)."""
    return (~((images >= 0) & (images <= 1))).double().mean(dim=(1, 2, 3))


def pair_of(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64, clamped; DataError if they are not both (B, C, H, W)."""
    if images.shape != truth.shape or images.ndim != 4:
        raise DataError(
            f"images of shape {tuple(images.shape)} cannot be scored against {tuple(truth.shape)}: both must be "
            "(B, C, H, W)"
        )
    # float64: at 60 dB the window's variances are differences of nearly equal numbers.
    a, b = (x.detach().to(dtype=torch.float64).clamp(0, 1) for x in (images, truth))
    return a, b.to(a.device)


@dataclass
class MeanSquaredError(ImageMetric):
    """Mean squared error of the pixels."""

    title: ClassVar[str] = "MSE"
    digits: ClassVar[int] = 4
    higher: ClassVar[bool] = False

    def scores(self, pairs: Pairs) -> Tensor:
        return mse(pairs.images, pairs.truth)


@dataclass
class PeakSignalToNoise(ImageMetric):
    """Peak signal-to-noise ratio of the pixels, data range 1; infinite for identical images."""

    title: ClassVar[str] = "PSNR"
    unit: ClassVar[str] = "dB"
    digits: ClassVar[int] = 1

    def scores(self, pairs: Pairs) -> Tensor:
        return psnr(pairs.images, pairs.truth)
