"""Scores of pixels: batched, per image, on one scale.

Everything takes float tensors of shape (B, C, H, W) with pixels meant for [0, 1] and clamps them first, with
a data range of 1. Per-image vectors are primary; means are left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedattack.errors import DataError
from fedattack.metrics.base import ImageMetric, Pairs

CHUNK_VALUES = 2**18
"""Pixels of either side that are worked on at once: 2 MiB in float64."""


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each pair, after clamping, float64 (B,); NaN where a pixel is not finite.

    Raises DataError if they are not both (B, C, H, W), alike in every number, or not floats in [0, 1]
    (:func:`refuse_other_scales`).
    """
    return by_chunks(lambda a, b: (a - b).square().mean(dim=(1, 2, 3)), images, truth)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, data range 1; infinite for identical images. As :func:`mse`."""
    return -10 * torch.log10(mse(images, truth))


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, down plus across, (B, C, H, W) -> (B,); not clamped.

    The usual form of the regulariser (Geiping et al., Inverting Gradients, 2020).
    """
    down, across = images.diff(dim=-2).abs(), images.diff(dim=-1).abs()
    return down.mean(dim=(1, 2, 3)) + across.mean(dim=(1, 2, 3))


def out_of_range_share(images: Tensor) -> Tensor:
    """Share of each image's pixels outside [0, 1] (or not a number), before any clamping; float64, shape (B,)."""
    return (~((images >= 0) & (images <= 1))).double().mean(dim=(1, 2, 3))


def by_chunks(
    score: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    truth: Tensor,
    values: int = CHUNK_VALUES,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Scores, float64 (B,), of clamped pairs in `dtype`, some `values` pixels at once. Raises as :func:`mse`."""
    refuse_unlike(images, truth)
    truth = truth.to(images.device)
    step = max(1, values // max(1, images[:1].numel()))
    scores = torch.empty(len(truth), dtype=torch.float64, device=images.device)
    for start in range(0, len(truth), step):
        part = slice(start, start + step)
        scores[part] = score(clamped(images[part], dtype), clamped(truth[part], dtype))
    return scores


def pair_of(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64, clamped, every pixel NaN where one of the image is not finite. Raises as :func:`mse`."""
    refuse_unlike(images, truth)
    return clamped(images), clamped(truth).to(images.device)


def refuse_unlike(images: Tensor, truth: Tensor) -> None:
    """DataError if they are not both (B, C, H, W) and alike in every number, or by :func:`refuse_other_scales`."""
    if images.shape != truth.shape or images.ndim != 4 or 0 in images.shape[1:]:
        raise DataError(
            f"images of shape {tuple(images.shape)} cannot be scored against {tuple(truth.shape)}: both must be "
            "(B, C, H, W), with the same number, channels and size"
        )
    refuse_other_scales(images, "the scored images")
    refuse_other_scales(truth, "the private images")


def refuse_other_scales(images: Tensor, what: str = "the images") -> None:
    """DataError for images (B, C, H, W) that are integers, or more than half of which exceed 2.

    Pixels from 0 to 255 would be clamped to white, and score well. Whoever scores what an attack left unbounded
    clamps it first, and reports :func:`out_of_range_share`.
    """
    if not images.is_floating_point():
        raise DataError(f"{what} are {images.dtype}: a score takes floats in [0, 1]; divide by 255?")
    highest = images.detach().flatten(1).amax(1)
    beyond = int((highest > 2).sum())
    if 2 * beyond > len(images):
        raise DataError(
            f"{beyond} of {len(images)} of {what} have pixels above 2 (up to {highest[highest > 2].max():.4g}): "
            "a score takes floats in [0, 1]; divide by 255?"
        )


def clamped(images: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images (B, C, H, W) in [0, 1], not to be written to; every pixel NaN where one of the image is not finite."""
    flat = images.detach().flatten(1)
    lowest, highest = flat.amin(1), flat.amax(1)
    values = images.detach().to(dtype)
    if ((lowest >= 0) & (highest <= 1)).all():
        return values
    unknown = ~(lowest.isfinite() & highest.isfinite())
    return values.clamp(0, 1).masked_fill_(unknown[:, None, None, None], torch.nan)


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


@dataclass
class TotalVariation(ImageMetric):
    """How far the total variation is from that of the private image: noise raises it, blur lowers it.

    It compares roughness, and no content: 0 for every image that is as rough as the private one.
    """

    title: ClassVar[str] = "TV difference"
    digits: ClassVar[int] = 4
    higher: ClassVar[bool] = False

    def scores(self, pairs: Pairs) -> Tensor:
        return by_chunks(
            lambda a, b: (total_variation(a) - total_variation(b)).abs(), pairs.images, pairs.truth
        )
