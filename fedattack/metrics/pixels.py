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
    """Both by :func:`unit_range`; DataError if they are not both (B, C, H, W), alike in every number."""
    if images.shape != truth.shape or images.ndim != 4:
        raise DataError(
            f"images of shape {tuple(images.shape)} cannot be scored against {tuple(truth.shape)}: both must be "
            "(B, C, H, W), with the same number, channels and size"
        )
    a, b = unit_range(images, "the scored images"), unit_range(truth, "the private images")
    return a, b.to(a.device)


def unit_range(images: Tensor, what: str = "images") -> Tensor:
    """Images (B, C, H, W) as float64, clamped to [0, 1]; every pixel NaN where an image has one that is not finite.

    Raises DataError for integers, and where more than half of the images exceed 2: pixels from 0 to 255 would be
    clamped to white, and score well.
    """
    if not images.is_floating_point():
        raise DataError(
            f"{what} are {images.dtype}: a score of images takes floats in [0, 1]; divide by 255?"
        )
    # float64: at 60 dB the window's variances are differences of nearly equal numbers.
    values = images.detach().double()
    if not len(values):
        return values
    flat = values.flatten(1)
    lowest, highest = flat.amin(1), flat.amax(1)
    beyond = int((highest > 2).sum())
    if 2 * beyond > len(values):
        raise DataError(
            f"{beyond} of {len(values)} of {what} have pixels above 2 (up to {highest.nan_to_num().max():.4g}): a "
            "score of images takes floats in [0, 1]; divide by 255?"
        )
    unknown = ~(lowest.isfinite() & highest.isfinite())
    values = values.clamp(0, 1)
    return values.masked_fill_(unknown[:, None, None, None], torch.nan) if unknown.any() else values


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
