"""The scale of images that are scored: floats in [0, 1], of equal number, channels and size."""

from __future__ import annotations

import torch
from torch import Tensor

from fedattack.errors import DataError


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
    clamps it first, and reports :func:`fedattack.metrics.out_of_range_share`.
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
