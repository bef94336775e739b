"""What an adversary knows about images before it sees an update: a Gaussian, from public images or in their place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import scipy.fft
import torch
from torch import Tensor

from fedattack.errors import DataError
from fedattack.observation import Auxiliary

NUGGET = 1e-5
"""Variance of independent pixel noise added to every prior: 8-bit rounding alone is 1.3e-6."""

SHRINKAGES = (0.01, 0.05, 0.2, 0.35, 0.5, 0.7, 1.0)
"""Candidates between the sample covariance (0) and its diagonal in the cosine basis (1)."""

HELD_OUT = 300
"""Auxiliary images held out for these choices; a fifth where there are fewer than five times as many."""

SPECTRUM_WEIGHT = 5.0
"""Auxiliary images that the 1/f spectrum counts for, where a coefficient's variance is estimated."""


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Images as draws from N(mean, covariance): float64 (D,) and (D, D), positive definite, D = C * H * W."""

    mean: Tensor
    covariance: Tensor
    image_shape: tuple[int, int, int]
    source: str

    @property
    def size(self) -> int:
        """Numbers in one image (D)."""
        return self.mean.numel()

    @cached_property
    def _cholesky(self) -> Tensor:
        return torch.linalg.cholesky(self.covariance)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.covariance)
        return values.flip(0).clamp(min=0), vectors.flip(1)

    def factor(self, modes: int | None = None) -> Tensor:
        """A with x = mean + A z, z ~ N(0, I): float64 (D, D or modes), computed once and kept, for all victims.

        Without `modes` the Cholesky factor, which is cheaper to get than eigenvectors. Otherwise the
        eigenvectors of so many largest eigenvalues, scaled by their square roots.
        """
        if modes is None:
            return self._cholesky
        values, vectors = self._eigen
        return vectors[:, :modes] * values[:modes].sqrt()


def gaussian_prior(
    auxiliary: Auxiliary | None, image_shape: tuple[int, int, int], shrinkage: float | None = None
) -> GaussianPrior:
    """Mean and covariance of the auxiliary images, usable from two images up; without any, :func:`smooth_prior`.

    Few images say little about D (D + 1) / 2 covariances, but enough about D variances. In the basis of the cosine
    transform (and of the principal colours) the covariance of natural images is nearly diagonal, so the
    off-diagonal entries are shrunk towards zero there by a factor 1 - `shrinkage` in [0, 1), chosen as the one
    under which auxiliary images that were held out are most likely (Ledoit and Wolf 2004); so is whether mirror
    images count as images too. The variances themselves are averaged with those of :func:`smooth_prior`, which
    counts for :data:`SPECTRUM_WEIGHT` images. With thousands of images that hardly changes anything; with tens it
    is what makes the covariance invertible and honest. DataError if the auxiliary images have another shape.
    """
    if auxiliary is None or len(auxiliary) < 2:
        return smooth_prior(image_shape)
    if tuple(auxiliary.images.shape[1:]) != image_shape:
        raise DataError(
            f"auxiliary images of shape {tuple(auxiliary.images.shape[1:])} do not fit the federation's {image_shape}"
        )
    images = auxiliary.images.double().cpu()
    colours = _principal_colours(images)
    coefficients = _cosine(images, colours).flatten(1)
    estimators = [_Estimator(image_shape, mirrored) for mirrored in (False, True)]
    candidates = [(e, *e.choose(coefficients, shrinkage)) for e in estimators]
    estimator, chosen, _ = min(candidates, key=lambda candidate: candidate[2])
    mean, covariance = estimator.moments(coefficients)
    covariance = estimator.shrink(covariance, len(coefficients), chosen)
    source = f"{len(auxiliary)} auxiliary images ({auxiliary.source or 'unnamed'}), shrinkage {chosen:g}"
    return GaussianPrior(
        _pixels(mean.reshape(1, *image_shape), colours).flatten(),
        _in_pixels(covariance, colours, image_shape),
        image_shape,
        source + (", mirrored" if estimator.mirrored else ""),
    )


def smooth_prior(
    image_shape: tuple[int, int, int], deviation: float = 0.25, exponent: float = 2.0, colour: float = 0.9
) -> GaussianPrior:
    """A prior for an adversary without auxiliary data: mid-grey, power falling as 1 / frequency^exponent.

    `deviation` is a pixel's, `exponent` 2 the average of natural images (Field 1987), `colour` the
    correlation between colour channels.
    """
    channels = image_shape[0]
    variances = deviation**2 * _spectrum(image_shape, exponent, colour).flatten()
    correlations = torch.full((channels, channels), colour, dtype=torch.float64).fill_diagonal_(1.0)
    colours = torch.linalg.eigh(correlations)[1]
    covariance = _in_pixels(torch.diag(variances + NUGGET), colours, image_shape)
    mean = torch.full((len(variances),), 0.5, dtype=torch.float64)
    source = f"no auxiliary images: mid-grey, power 1/f^{exponent:g}, deviation {deviation:g}"
    return GaussianPrior(mean, covariance, image_shape, source)


def _spectrum(image_shape: tuple[int, int, int], exponent: float = 2.0, colour: float = 0.9) -> Tensor:
    """Variances (C, H, W) of cosine coefficients by principal colour, the main one last; a pixel's is 1."""
    channels, height, width = image_shape
    vertical = torch.arange(height, dtype=torch.float64)[:, None] / height
    horizontal = torch.arange(width, dtype=torch.float64)[None, :] / width
    lowest = 1 / max(height, width)
    power = (vertical**2 + horizontal**2 + lowest**2) ** (-exponent / 2)
    by_colour = torch.full((channels,), 1 - colour, dtype=torch.float64)
    by_colour[-1] = 1 + (channels - 1) * colour
    return by_colour[:, None, None] * power / power.mean()


def _principal_colours(images: Tensor) -> Tensor:
    """Orthogonal (C, C), columns are the principal colours of images (N, C, H, W), the main one last."""
    by_channel = (images - images.mean(0)).transpose(0, 1).flatten(1)
    return torch.linalg.eigh(by_channel @ by_channel.T)[1]


def _cosine(images: Tensor, colours: Tensor) -> Tensor:
    """Pixels (N, C, H, W) -> coefficients in the orthonormal cosine and colour basis, same shape."""
    turned = torch.einsum("nchw,cd->ndhw", images, colours).contiguous()
    return torch.from_numpy(scipy.fft.dctn(turned.numpy(), axes=(2, 3), norm="ortho"))


def _pixels(coefficients: Tensor, colours: Tensor) -> Tensor:
    """The inverse of :func:`_cosine`."""
    planes = torch.from_numpy(scipy.fft.idctn(coefficients.numpy(), axes=(2, 3), norm="ortho"))
    return torch.einsum("ndhw,cd->nchw", planes, colours).contiguous()


def _in_pixels(covariance: Tensor, colours: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Covariance (D, D) of cosine coefficients -> of pixels."""
    half = _pixels(covariance.unflatten(1, image_shape), colours).flatten(1)
    whole = _pixels(half.T.contiguous().unflatten(1, image_shape), colours).flatten(1)
    return 0.5 * (whole + whole.T)


@dataclass(frozen=True)
class _Estimator:
    """Mean and predictive covariance in the cosine basis; `mirrored`: an image and its mirror are equally likely."""

    image_shape: tuple[int, int, int]
    mirrored: bool

    def moments(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D), not shrunk yet, of coefficients (N, D)."""
        count = len(coefficients)
        odd = (torch.arange(coefficients.shape[1]) % self.image_shape[2]) % 2 == 1
        mean = coefficients.mean(0)
        if self.mirrored:
            mean = torch.where(odd, 0.0, mean)
        centred = coefficients - mean
        covariance = centred.T @ centred / (count - 1)
        if self.mirrored:
            covariance *= odd[:, None] == odd
        return mean, covariance

    def shrink(self, covariance: Tensor, count: int, shrinkage: float) -> Tensor:
        """Predictive covariance: see :func:`gaussian_prior`; with the nugget."""
        variances = covariance.diagonal()
        spectrum = _spectrum(self.image_shape).flatten()
        smooth = spectrum * variances.mean() / spectrum.mean()
        weight = SPECTRUM_WEIGHT / (count + SPECTRUM_WEIGHT)
        shrunk = covariance * ((1 - shrinkage) * (1 - weight))
        shrunk.diagonal().copy_((1 - weight) * variances + weight * smooth)
        # A fresh image also misses the estimated mean by 1 / N of its variance.
        shrunk *= 1 + 1 / count
        shrunk.diagonal().add_(NUGGET)
        return shrunk

    def choose(self, coefficients: Tensor, shrinkage: float | None) -> tuple[float, float]:
        """The likeliest shrinkage on held-out images (or the given one) and its negative log-likelihood."""
        held_out = torch.zeros(len(coefficients), dtype=torch.bool)
        held_out[:: max(5, len(coefficients) // HELD_OUT)] = True
        seen, unseen = coefficients[~held_out], coefficients[held_out]
        if len(seen) < 3:
            return shrinkage or SHRINKAGES[-1], math.inf
        mean, covariance = self.moments(seen)
        best, best_score = SHRINKAGES[-1], math.inf
        for candidate in SHRINKAGES if shrinkage is None else (shrinkage,):
            factor = torch.linalg.cholesky(self.shrink(covariance, len(seen), candidate))
            white = torch.linalg.solve_triangular(factor, (unseen - mean).T, upper=False)
            score = float(white.pow(2).sum() / len(unseen) + 2 * factor.diagonal().log().sum())
            if score > best_score:
                break
            best, best_score = candidate, score
        return best, best_score
