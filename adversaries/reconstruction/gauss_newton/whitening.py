"""Images as independent standard normal numbers: the prior that regularises Gauss-Newton's steps."""

from __future__ import annotations

from dataclasses import dataclass

import scipy.fft
import torch
from torch import Tensor

from adversaries.reconstruction import priors
from fedattack.observation import Auxiliary


@dataclass(frozen=True)
class Whitening:
    """x = mean + S z with z ~ N(0, I): S scales cosine coefficients of principal colours by their deviations.

    The covariance of natural images is nearly diagonal in this basis, and unlike a full covariance's factor S costs
    a few small matrix products.

    Attributes
    ----------
    mean : Tensor
        (C, H, W).
    deviation : Tensor
        (C, H, W): of each coefficient, colours by rows.
    source : str
        Where they come from, in words.
    """

    mean: Tensor
    deviation: Tensor
    colours: Tensor
    down: Tensor
    across: Tensor
    source: str

    def turn(self, z: Tensor) -> Tensor:
        """S z: (..., C, H, W) -> (..., C, H, W)."""
        planes = self.colours @ (z * self.deviation).flatten(-2)
        return self.down.T @ planes.view_as(z) @ self.across

    def back(self, images: Tensor) -> Tensor:
        """S^T x, the adjoint of :meth:`turn`."""
        coefficients = self.down @ images @ self.across.T
        turned = self.colours.T @ coefficients.flatten(-2)
        return turned.view_as(images) * self.deviation

    def whiten(self, images: Tensor) -> Tensor:
        """z of images."""
        return self.back(images - self.mean) / self.deviation.square()


def whitening(
    auxiliary: Auxiliary | None, image_shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> Whitening:
    """Mean and deviations of public images, or those of all natural images where there are none.

    Few images say little about a variance: theirs are averaged with a 1/f^2 spectrum, which counts for
    :data:`adversaries.reconstruction.priors.SPECTRUM_WEIGHT` images.
    """
    channels, height, width = image_shape
    if auxiliary is not None and len(auxiliary) > 1:
        images = auxiliary.images.double().cpu()
        mean = images.mean(0)
        colours = priors._principal_colours(images)
        seen = priors._cosine(images - mean, colours).square().mean(0)
        smooth = priors._spectrum(image_shape)
        smooth = smooth * (seen.mean() / smooth.mean())
        weight = priors.SPECTRUM_WEIGHT / (len(images) + priors.SPECTRUM_WEIGHT)
        variance = (1 - weight) * seen + weight * smooth
        source = f"{len(images)} auxiliary images ({auxiliary.source or 'unnamed'})"
    else:
        prior = priors.smooth_prior(image_shape)
        mean, source = prior.mean.reshape(image_shape), prior.source
        correlations = torch.full((channels, channels), 0.9, dtype=torch.float64).fill_diagonal_(1.0)
        colours = torch.linalg.eigh(correlations)[1]
        variance = 0.25**2 * priors._spectrum(image_shape)
    deviation = (variance + priors.NUGGET).sqrt()
    parts = (mean, deviation, colours, _cosines(height), _cosines(width))
    mean, deviation, colours, down, across = (part.to(device, dtype).contiguous() for part in parts)
    return Whitening(mean, deviation, colours, down, across, source)


def uniform(around: Whitening, deviation: float) -> Whitening:
    """The same basis with one deviation for all coefficients: pixels that know nothing of each other."""
    return Whitening(
        around.mean,
        torch.full_like(around.deviation, deviation),
        around.colours,
        around.down,
        around.across,
        f"uniform deviation {deviation:g}",
    )


def _cosines(size: int) -> Tensor:
    """Orthonormal type-II cosine transform, float64 (size, size)."""
    return torch.from_numpy(scipy.fft.dct(torch.eye(size).double().numpy(), axis=0, norm="ortho"))
