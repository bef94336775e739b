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

from fedattack.metrics.base import ImageMetric, Pairs
from fedattack.metrics.scale import clamped, refuse_unlike

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
