"""Structural similarity of image pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from fedattack.errors import DataError
from fedattack.metrics.base import ImageMetric, Pairs
from fedattack.metrics.pixels import pair_of, psnr

INFLATION_DB = 20 * math.log10(255)
"""48.13 dB: what ``10 log10(255^2 / mse)`` adds when the MSE is that of images in [0, 1]."""

SSIM_WINDOW = 7
"""Side of scikit-image's default uniform window."""


def ssim(images: Tensor, truth: Tensor, data_range: float = 1.0, window: int = SSIM_WINDOW) -> Tensor:
    """Structural similarity of each pair, float64 (B,), as scikit-image's ``structural_similarity`` by default.

    Uniform window, sample covariance, averaged over the positions where the window fits and over channels (Wang et
    al., Image quality assessment: from error visibility to structural similarity, 2004). Other libraries average over
    a padded border or use the population covariance, and differ in the second digit. Raises DataError as :func:`mse`,
    or if `window`, its odd side, is larger than the image.
    """
    a, b = pair_of(images, truth)
    if window % 2 == 0 or window < 3 or window > min(a.shape[-2:]):
        raise DataError(
            f"SSIM window {window}: must be odd, at least 3 and fit into {tuple(a.shape[-2:])} pixels"
        )
    sample = window**2 / (window**2 - 1)
    mean_a, mean_b = (functional.avg_pool2d(x, window, stride=1) for x in (a, b))
    var_a = sample * (functional.avg_pool2d(a * a, window, stride=1) - mean_a * mean_a)
    var_b = sample * (functional.avg_pool2d(b * b, window, stride=1) - mean_b * mean_b)
    covariance = sample * (functional.avg_pool2d(a * b, window, stride=1) - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    )
    return similarity.mean(dim=(1, 2, 3))


def ssim_window(height: int, width: int) -> int:
    """scikit-image's window of 7, or the largest odd one that fits a smaller image; DataError below 3 pixels."""
    fitting = min(SSIM_WINDOW, height, width)
    fitting -= 1 - fitting % 2
    if fitting < 3:
        raise DataError(f"images of {height} x {width} pixels are too small for SSIM: at least 3 x 3")
    return fitting


def paper_scale(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in dB and SSIM, float64 (B,), as HCGLA's code prints them: only for comparison with published tables.

    That code divides 255^2 by the MSE of images in [0, 1], which adds 48.13 dB, and takes SSIM with a data range of 2
    (the range scikit-image assumes for float images), which raises it (Yang, Ge, Xiang and Li, Using Highly
    Compressed Gradients in Federated Learning for Data Reconstruction Attacks, IEEE TIFS 2023).
    """
    window = ssim_window(*images.shape[-2:])
    return psnr(images, truth) + INFLATION_DB, ssim(images, truth, data_range=2.0, window=window)


@dataclass
class StructuralSimilarity(ImageMetric):
    """Structural similarity as scikit-image has it by default: uniform 7 x 7 window, sample covariance."""

    title: ClassVar[str] = "SSIM"

    def scores(self, pairs: Pairs) -> Tensor:
        return ssim(pairs.images, pairs.truth, window=ssim_window(*pairs.truth.shape[-2:]))
