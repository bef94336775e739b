"""Structural similarity of image pairs, as scikit-image computes it, and over several scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fedattack.errors import ConfigError, DataError
from fedattack.metrics.base import ImageMetric, Pairs
from fedattack.metrics.pixels import by_chunks, psnr

INFLATION_DB = 20 * math.log10(255)
"""48.13 dB: what ``10 log10(255^2 / mse)`` adds when the MSE is that of images in [0, 1]."""

SSIM_WINDOW = 7
"""Side of scikit-image's default uniform window."""

GAUSSIAN_WINDOW = 11
"""Side of Wang et al.'s window: 3.5 standard deviations of 1.5 pixels to either side, rounded."""

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, finest first (Wang, Simoncelli and Bovik, 2003)."""

CHUNK_VALUES = 2**16
"""Pixels of either side worked on at once: four maps of 256 KiB stay in the cache."""

TOLERANCE = 5e-7
"""Above such an estimate of its rounding error, a score in float32 is worked out again in float64."""

BLOCK = 32
"""Outputs of one matrix product where images are larger than 64 pixels, whose banded matrix is mostly zeros."""


def ssim(images: Tensor, truth: Tensor, data_range: float = 1.0, window: int = SSIM_WINDOW) -> Tensor:
    """Structural similarity of each pair, float64 (B,), as scikit-image's ``structural_similarity`` by default.

    Uniform window, sample covariance, averaged over the positions where the window fits and over channels (Wang et
    al., Image quality assessment: from error visibility to structural similarity, 2004). Other libraries average over
    a padded border or use the population covariance, and differ in the second digit. NaN where a pixel is not finite.
    Raises DataError as :func:`fedattack.metrics.mse`, or if `window`, its odd side, is larger than the image.
    """
    if window % 2 == 0 or window < 3:
        raise DataError(f"SSIM window {window}: must be odd and at least 3")
    return _similarity(images, truth, [1.0] * window, data_range, window**2 / (window**2 - 1))


def ssim_gaussian(images: Tensor, truth: Tensor, data_range: float = 1.0) -> Tensor:
    """:func:`ssim` with Wang et al.'s Gaussian window of 11 x 11 (sigma 1.5) and population covariance.

    As scikit-image's with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``.
    """
    return _similarity(images, truth, gaussian_weights(), data_range)


def gaussian_weights(side: int = GAUSSIAN_WINDOW, sigma: float = 1.5) -> list[float]:
    """Weights of a window along one axis; they sum to 1."""
    weights = [math.exp(-(((i - side // 2) / sigma) ** 2) / 2) for i in range(side)]
    return [weight / sum(weights) for weight in weights]


def multi_scale_ssim(images: Tensor, truth: Tensor, scales: int = len(SCALE_WEIGHTS)) -> Tensor:
    """Multi-scale SSIM of each pair, float64 (B,), data range 1: five scales are the published metric.

    Contrast and structure at every scale, luminance at the coarsest, Gaussian window of 11 (Wang, Simoncelli and
    Bovik, Multi-scale structural similarity for image quality assessment, 2003); fewer `scales` take the finest, with
    weights that again sum to 1. Scales are halved by 2 x 2 means, the last row or column of an odd side repeated;
    negative contrasts count as 0; channels are averaged last. Raises DataError as :func:`fedattack.metrics.mse`, or
    if an image is smaller than :func:`smallest_side`.
    """
    _refuse_window(images, smallest_side(scales), f"MS-SSIM of {scales} scales")
    window = gaussian_weights()
    weights = [weight / sum(SCALE_WEIGHTS[:scales]) for weight in SCALE_WEIGHTS[:scales]]

    def score(a: Tensor, b: Tensor) -> Tensor:
        product = a.new_ones(a.shape[:2])
        for scale, weight in enumerate(weights):
            if scale:
                a, b = _halved(a), _halved(b)
            local = _Local.of(a, b, window)
            value = local.similarity() if scale == scales - 1 else local.contrast()
            product = product * value.mean(dim=(2, 3)).clamp(min=0) ** weight
        return product.mean(1)

    return by_chunks(score, images, truth, CHUNK_VALUES)


def smallest_side(scales: int) -> int:
    """Side from which the window of 11 still fits the coarsest of so many scales."""
    return (GAUSSIAN_WINDOW - 1) * 2 ** (scales - 1) + 1


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


def _refuse_window(images: Tensor, side: int, what: str) -> None:
    """DataError where the images are smaller than a window."""
    if min(images.shape[-2:], default=0) < side:
        raise DataError(
            f"images of shape {tuple(images.shape)} are too small for {what}: it takes a window of at least "
            f"{side} x {side} pixels"
        )


def _similarity(
    images: Tensor, truth: Tensor, weights: Sequence[float], data_range: float, sample: float = 1.0
) -> Tensor:
    """Mean similarity of each pair, float64 (B,); `sample` is the factor of the window's variances.

    In float32, and once more in float64 where rounding could show: flat parts far from an image's mean.
    """
    _refuse_window(images, len(weights), "SSIM")

    def score(a: Tensor, b: Tensor) -> Tensor:
        local = _Local.of(a, b, weights, data_range, sample)
        scores = _mean(local.similarity())
        doubtful = _mean(local.rounding()) > TOLERANCE
        if doubtful.any():
            a, b = a[doubtful].double(), b[doubtful].double()
            scores[doubtful] = _mean(_Local.of(a, b, weights, data_range, sample).similarity())
        return scores

    return by_chunks(score, images, truth, CHUNK_VALUES, torch.float32)


def _mean(maps: Tensor) -> Tensor:
    """Mean of (N, C, H, W) over all but the first axis, float64 (N,)."""
    return maps.mean(dim=(1, 2, 3), dtype=torch.float64)


@dataclass
class _Local:
    """What a window sees of the sum s = a + b and the difference d = a - b, wherever it fits: (N, C, H', W').

    Luminance is 1 - m_d^2 / ((m_s^2 + m_d^2) / 2 + c1), contrast and structure 1 - v_d / ((v_s + v_d) / 2 + c2), in
    means m and variances v: the usual terms, exact where images are equal, of four maps instead of five.
    """

    means: Tensor  # of s and d (2, ...), without `level`
    level: Tensor
    apart: Tensor  # variance of d
    spread: Tensor  # (v_s + v_d) / 2 + c2
    c1: float
    c2: float

    @classmethod
    def of(
        cls, a: Tensor, b: Tensor, weights: Sequence[float], data_range: float = 1.0, sample: float = 1.0
    ) -> _Local:
        both = torch.stack((a + b, a - b))
        # Without its own mean, an image's variances are no longer differences of nearly equal numbers.
        level = both.mean(dim=(2, 3, 4), keepdim=True)
        both -= level
        sums = _sums(torch.cat((both, both * both)), weights)
        # Divided by what the weights add up to after rounding, or every position would be biased alike.
        total = float(sums.new_tensor(weights).double().sum()) ** 2
        means = sums[:2] / total
        added, apart = torch.addcmul(sums[2:], sums[:2], means, value=-1).mul_(sample / total)
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        return cls(means, level, apart, added.add_(apart).div_(2).add_(c2), c1, c2)

    def contrast(self) -> Tensor:
        return 1 - self.apart / self.spread

    def similarity(self) -> Tensor:
        together, apart = (self.means + self.level).square_()
        return (1 - apart / together.add_(apart).div_(2).add_(self.c1)).mul_(self.contrast())

    def rounding(self) -> Tensor:
        """Error of the contrast if its variances are wrong by roundings of the squares that they are made of.

        Weighted by how flat both images are: where they are noisy, roundings of neighbours cancel in the mean.
        """
        together, apart = self.means.square()
        error = self.apart.mul(together).div_(self.spread).div_(2).add_(apart).div_(self.spread)
        return error.div_(self.spread).mul_(2 * torch.finfo(torch.float32).eps * self.c2)


def _sums(maps: Tensor, weights: Sequence[float]) -> Tensor:
    """The window's weighted sums wherever it fits, (..., H, W), by products with banded matrices."""
    across = [maps[..., start:stop] @ band for start, stop, band in _bands(maps, -1, weights)]
    maps = across[0] if len(across) == 1 else torch.cat(across, dim=-1)
    down = [band.T @ maps[..., start:stop, :] for start, stop, band in _bands(maps, -2, weights)]
    return down[0] if len(down) == 1 else torch.cat(down, dim=-2)


def _bands(maps: Tensor, axis: int, weights: Sequence[float]) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of an axis, first and last input, and the matrix from their inputs to their outputs."""
    reach = len(weights) - 1
    outputs = maps.shape[axis] - reach
    block = outputs if outputs <= 2 * BLOCK else BLOCK
    for start in range(0, outputs, block):
        count = min(block, outputs - start)
        band = maps.new_zeros(count + reach, count)
        for offset, weight in enumerate(weights):
            band.diagonal(-offset).fill_(weight)
        yield start, start + count + reach, band


def _halved(images: Tensor) -> Tensor:
    """Means of 2 x 2 pixels; of an odd side the last row or column counts twice."""
    height, width = images.shape[-2:]
    if height % 2 or width % 2:
        images = functional.pad(images, (0, width % 2, 0, height % 2), mode="replicate")
    return functional.avg_pool2d(images, 2)


@dataclass
class StructuralSimilarity(ImageMetric):
    """Structural similarity as scikit-image has it by default: uniform 7 x 7 window, sample covariance.

    Images of 3 to 6 pixels take the largest odd window that fits.
    """

    title: ClassVar[str] = "SSIM"

    def check(self, size: tuple[int, int, int]) -> None:
        ssim_window(*size[1:])

    def scores(self, pairs: Pairs) -> Tensor:
        return ssim(pairs.images, pairs.truth, window=ssim_window(*pairs.truth.shape[-2:]))


@dataclass
class GaussianStructuralSimilarity(ImageMetric):
    """Structural similarity with the original's Gaussian window of 11 x 11, sigma 1.5, population covariance."""

    title: ClassVar[str] = "SSIM, Gaussian"

    def check(self, size: tuple[int, int, int]) -> None:
        if min(size[1:]) < GAUSSIAN_WINDOW:
            raise ConfigError(
                f"metric 'ssim-gaussian': its window of {GAUSSIAN_WINDOW} pixels does not fit images of "
                f"{size[1]} x {size[2]}; 'ssim' takes images from 3 x 3"
            )

    def scores(self, pairs: Pairs) -> Tensor:
        return ssim_gaussian(pairs.images, pairs.truth)


@dataclass
class MultiScaleSSIM(ImageMetric):
    """Multi-scale structural similarity over the five published scales, for images from 161 x 161 pixels."""

    title: ClassVar[str] = "MS-SSIM"

    def check(self, size: tuple[int, int, int]) -> None:
        least = smallest_side(len(SCALE_WEIGHTS))
        if min(size[1:]) < least:
            raise ConfigError(
                f"metric 'ms-ssim': its five scales need images of at least {least} x {least} pixels, and these are "
                f"{size[1]} x {size[2]}; 'ms-ssim-short' takes fewer scales"
            )

    def scores(self, pairs: Pairs) -> Tensor:
        return multi_scale_ssim(pairs.images, pairs.truth)


@dataclass
class ShortMultiScaleSSIM(ImageMetric):
    """Multi-scale structural similarity over the finest scales only, their weights again summing to 1.

    Not the published metric, and not comparable with it.

    Parameters
    ----------
    scales : int
        How many, 1 to 4; 2 need images of 21 pixels, 3 of 41, 4 of 81.
    """

    scales: int = 2

    title: ClassVar[str] = "MS-SSIM, short"

    @property
    def heading(self) -> str:
        return f"MS-SSIM ({self.scales} of {len(SCALE_WEIGHTS)} scales)"

    def check(self, size: tuple[int, int, int]) -> None:
        if not 1 <= self.scales < len(SCALE_WEIGHTS):
            raise ConfigError(
                f"setting 'metric.ms-ssim-short.scales' is {self.scales}: accepted are 1 to "
                f"{len(SCALE_WEIGHTS) - 1}; all five are the metric 'ms-ssim'"
            )
        least = smallest_side(self.scales)
        if min(size[1:]) < least:
            raise ConfigError(
                f"setting 'metric.ms-ssim-short.scales' is {self.scales}: so many scales need images of at least "
                f"{least} x {least} pixels, and these are {size[1]} x {size[2]}"
            )

    def scores(self, pairs: Pairs) -> Tensor:
        return multi_scale_ssim(pairs.images, pairs.truth, self.scales)
