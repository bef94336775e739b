"""Images as independent standard normal numbers: the prior that regularises Gauss-Newton's steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import scipy.fft
import torch
from torch import Tensor

from adversaries.inversion.evidence import priors
from fedattack.observation import Auxiliary
from fedattack.rng import torch_rng

MODES = 128
"""Directions that are looked at for correlations between coefficients."""

SMOOTH_DEVIATION = 0.25
"""Of a pixel where there are no public images."""


@dataclass(frozen=True)
class Whitening:
    """x = mean + S z with z ~ N(0, I).

    S scales cosine coefficients of principal colours by their deviations, for in that basis the covariance of
    natural images is nearly diagonal; before that it stretches the few directions in which scaled coefficients of
    aligned images (faces) vary together. Unlike a full covariance's factor it costs a few small matrix products.

    Attributes
    ----------
    mean, deviation : Tensor
        (C, H, W): of pixels, and of each coefficient, colours by rows.
    modes, gains : Tensor
        Common directions of scaled coefficients, orthonormal (M, C * H * W), and deviations along them, (M,).
    bulk : float
        Deviation of scaled coefficients in all other directions.
    """

    mean: Tensor
    deviation: Tensor
    colours: Tensor
    down: Tensor
    across: Tensor
    modes: Tensor
    gains: Tensor
    bulk: float
    source: str

    def turn(self, z: Tensor) -> Tensor:
        """S z: (..., C, H, W) -> (..., C, H, W)."""
        scaled = self._stretch(z, 1) * self.deviation
        planes = self.colours @ scaled.flatten(-2)
        return self.down.T @ planes.view_as(z) @ self.across

    def back(self, images: Tensor) -> Tensor:
        """S^T x, the adjoint of :meth:`turn`."""
        return self._stretch(self._coefficients(images) * self.deviation, 1)

    def whiten(self, images: Tensor) -> Tensor:
        """z of images."""
        return self._stretch(self._coefficients(images - self.mean) / self.deviation, -1)

    def unwhiten_adjoint(self, z: Tensor) -> Tensor:
        """S^-T z, the adjoint of :meth:`whiten` less its mean."""
        planes = self.colours @ (self._stretch(z, -1) / self.deviation).flatten(-2)
        return self.down.T @ planes.view_as(z) @ self.across

    def _coefficients(self, images: Tensor) -> Tensor:
        coefficients = self.down @ images @ self.across.T
        return (self.colours.T @ coefficients.flatten(-2)).view_as(images)

    def _stretch(self, z: Tensor, power: int) -> Tensor:
        """The symmetric map with :attr:`gains` along :attr:`modes` and :attr:`bulk` elsewhere, to the `power`."""
        bulk = self.bulk**power
        if not len(self.gains):
            return z * bulk
        flat = z.reshape(-1, self.modes.shape[1])
        along = (flat @ self.modes.T) * (self.gains**power - bulk)
        return (flat * bulk + along @ self.modes).view_as(z)


def whitening(
    auxiliary: Auxiliary | None, image_shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> Whitening:
    """Mean, deviations and common directions of public images, or what all natural images share without any.

    Few images say little about a variance: theirs are averaged with a 1/f^2 spectrum, which counts for
    :data:`adversaries.inversion.evidence.priors.SPECTRUM_WEIGHT` images. They say less still about
    covariances; see :func:`common_directions`.
    """
    channels, height, width = image_shape
    modes, gains, bulk = torch.zeros(0, math.prod(image_shape)), torch.zeros(0), 1.0
    if auxiliary is not None and len(auxiliary) > 1:
        images = auxiliary.images.double().cpu()
        mean = images.mean(0)
        colours = priors._principal_colours(images)
        coefficients = priors._cosine(images - mean, colours)
        seen = coefficients.square().mean(0)
        smooth = priors._spectrum(image_shape)
        smooth = smooth * (seen.mean() / smooth.mean())
        weight = priors.SPECTRUM_WEIGHT / (len(images) + priors.SPECTRUM_WEIGHT)
        variance = (1 - weight) * seen + weight * smooth + priors.NUGGET
        scaled = (coefficients / variance.sqrt()).flatten(1).float()
        modes, gains, bulk = common_directions(scaled)
        source = f"{len(images)} auxiliary images ({auxiliary.source or 'unnamed'}), {len(gains)} common directions"
    else:
        # What priors.smooth_prior says too, without its covariance matrix, which takes longer than a short attack.
        mean = torch.full(image_shape, 0.5, dtype=torch.float64)
        source = f"no auxiliary images: mid-grey, power 1/f^2, deviation {SMOOTH_DEVIATION:g}"
        correlations = torch.full((channels, channels), 0.9, dtype=torch.float64).fill_diagonal_(1.0)
        colours = torch.linalg.eigh(correlations)[1]
        variance = SMOOTH_DEVIATION**2 * priors._spectrum(image_shape) + priors.NUGGET
    parts = (mean, variance.sqrt(), colours, _cosines(height), _cosines(width), modes, gains)
    mean, deviation, colours, down, across, modes, gains = (
        part.to(device, dtype).contiguous() for part in parts
    )
    return Whitening(mean, deviation, colours, down, across, modes, gains, bulk, source)


def common_directions(scaled: Tensor) -> tuple[Tensor, Tensor, float]:
    """Directions in which numbers `scaled`, float32 (N, D), centred, of unit variance vary together beyond chance.

    With N samples of D numbers the sample covariance of independent ones has eigenvalues up to (1 + sqrt(D /
    N))^2 (Marchenko and Pastur 1967). Those above are kept, shrunk to the variance that a fresh sample has
    along the sample's eigenvector (Donoho, Gavish and Johnstone 2018). Returns orthonormal rows (M, D), M at
    most :data:`MODES`, the deviations (M,) along them, and the deviation in all other directions.
    """
    count, size = scaled.shape
    few = min(MODES, count, size)
    basis = torch.randn(size, few, generator=torch_rng(0, "common-directions", size))
    for _ in range(6):
        basis = torch.linalg.qr(scaled.T @ (scaled @ basis)).Q
    _, singular, rows = torch.linalg.svd(scaled @ basis, full_matrices=False)
    values, modes = singular.double().square() / count, rows @ basis.T
    ratio, total = size / count, float(scaled.double().square().sum()) / count
    bulk = 1.0
    for _ in range(20):
        above = values > bulk * (1 + math.sqrt(ratio)) ** 2
        if int(above.sum()) == size:
            break
        spiked = _fresh_variance(values[above] / bulk, ratio) * bulk
        bulk = max(1e-3, (total - float(spiked.sum())) / (size - int(above.sum())))
    kept = modes[: len(spiked)]
    return kept, spiked.sqrt().float(), math.sqrt(bulk)


def _fresh_variance(values: Tensor, ratio: float) -> Tensor:
    """Variance along sample eigenvectors with the given eigenvalues, all in units of the bulk's variance."""
    centred = values + 1 - ratio
    true = (centred + (centred.square() - 4 * values).clamp(min=0).sqrt()) / 2
    excess = (true - 1).clamp(min=1e-12)
    aligned = (1 - ratio / excess.square()) / (1 + ratio / excess)
    return 1 + excess * aligned.clamp(min=0)


def relaxed(around: Whitening, deviation: float) -> Whitening:
    """The same basis, half as coloured: roots of the deviations, scaled to a pixel's `deviation`; no directions.

    Where the data determine an image its fine detail moves faster so than under the prior, and coarse errors
    still faster than in plain pixels.
    """
    roots = around.deviation.sqrt()
    return dataclasses.replace(
        around,
        deviation=roots * (deviation / roots.square().mean().sqrt()),
        modes=around.modes[:0],
        gains=around.gains[:0],
        bulk=1.0,
        source=f"relaxed, deviation {deviation:g}",
    )


def _cosines(size: int) -> Tensor:
    """Orthonormal type-II cosine transform, float64 (size, size)."""
    return torch.from_numpy(scipy.fft.dct(torch.eye(size).double().numpy(), axis=0, norm="ortho"))
