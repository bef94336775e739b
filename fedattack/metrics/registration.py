"""Scores that forgive a shift, a mirror image and, where said, one gain and one offset.

A defence that moves and re-lights an image, or an attack whose answer is moved, misleads scores of unmoved pixels.
Here an image is compared with every shift of another at once: sums over the common part of two images are corner
sums of each image alone, and their product is one inverse Fourier transform (Padfield, Masked Object Registration in
the Fourier Domain, IEEE TIP 2012, with masks that cover the whole image).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn import functional

from fedattack.errors import ConfigError, DataError
from fedattack.metrics.base import ImageMetric, Pairs
from fedattack.metrics.pixels import by_chunks
from fedattack.metrics.scale import clamped, refuse_other_scales, refuse_unlike

OVERLAP = 0.25
"""Least share of the pixels that two images must have in common at a shift."""

FLAT = 1e-6
"""A common part of less variance is called constant."""

CHUNK_VALUES = 2**18
"""Complex numbers that a table works on at once, in each of a few buffers: 4 MiB."""

CHUNK_PIXELS = 2**15
"""Pixels of either side that pairs are worked on at once; their padded transforms are about twice as large."""


@dataclass(frozen=True)
class _Shifts:
    """All shifts up to `reach` = (rows, columns) of images of `size`, and the length of the transforms.

    A shift d lays pixel p of a private image on pixel p + d of a reconstruction.
    """

    size: tuple[int, int]
    reach: tuple[int, int]

    @classmethod
    def leaving(cls, size: tuple[int, int], overlap: float, most: int | None = None) -> _Shifts:
        """Shifts that can leave a share `overlap` of the pixels in common, up to `most` pixels a side."""
        if not 0 < overlap <= 1:
            raise ConfigError(f"overlap {overlap}: accepted is a share of the pixels above 0, up to 1")
        if most is not None and most < 0:
            raise ConfigError(f"shift {most}: accepted is a number of pixels, 0 or more")
        # The small sum guards shares that binary fractions miss, such as 0.9 of 10 pixels.
        rows, columns = (min(n - 1, math.floor((1 - overlap) * n + 1e-9)) for n in size)
        if most is not None:
            rows, columns = min(rows, most), min(columns, most)
        return cls(size, (rows, columns))

    @property
    def padded(self) -> tuple[int, int]:
        """Side lengths at which no product wraps around into a shift that is asked for."""
        rows, columns = (next_fast_len(n + m, real=True) for n, m in zip(self.size, self.reach, strict=True))
        return rows, columns

    def common(self, overlap: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Number of common pixels of each shift, and whether they are enough."""
        (h, w), (m, k) = self.size, self.reach
        rows = h - torch.arange(-m, m + 1, device=device).abs()
        columns = w - torch.arange(-k, k + 1, device=device).abs()
        count = (rows[:, None] * columns[None, :]).double()
        return count, count >= overlap * h * w - 1e-9

    def sums(self, values: Tensor) -> Tensor:
        """Sum of (N, H, W) over the common part at each shift, as the private image sees it."""
        (h, w), (m, k) = self.size, self.reach
        table = functional.pad(values.cumsum(-2).cumsum(-1), (1, 0, 1, 0))
        rows, columns = (torch.arange(-x, x + 1, device=values.device) for x in (m, k))
        top, bottom = (-rows).clamp(min=0), h - rows.clamp(min=0)
        left, right = (-columns).clamp(min=0), w - columns.clamp(min=0)
        strips = table.index_select(-2, bottom) - table.index_select(-2, top)
        return strips.index_select(-1, right) - strips.index_select(-1, left)

    def spectrum(self, images: Tensor, moved: bool) -> Tensor:
        """Transform of zero-padded images; `moved` by the reach, which puts the smallest shift at index 0."""
        (h, w), (m, k), (rows, columns) = self.size, self.reach, self.padded
        top, left = (m, k) if moved else (0, 0)
        padded = functional.pad(images, (left, columns - w - left, top, rows - h - top))
        return torch.fft.rfft2(padded)

    def products(self, spectra: Tensor, others: Tensor) -> Tensor:
        """Sum of products at each shift, from conjugated spectra of private images and those of reconstructions."""
        (m, k), padded = self.reach, self.padded
        summed = spectra[:, 0] * others[:, 0]
        for channel in range(1, spectra.shape[1]):
            summed.addcmul_(spectra[:, channel], others[:, channel])
        return torch.fft.irfft2(summed, s=padded)[..., : 2 * m + 1, : 2 * k + 1]


@dataclass
class _Side:
    """What a correlation needs to know of each image by itself: (N, ...) spectra, and sums at each shift."""

    spectra: Tensor
    mean: Tensor  # Sx / sqrt(n)
    scale: Tensor  # 1 / sqrt(Sxx - Sx^2 / n), NaN at shifts that do not count

    def __getitem__(self, part: slice) -> _Side:
        return _Side(self.spectra[part], self.mean[part], self.scale[part])


def _side(images: Tensor, shifts: _Shifts, overlap: float, truth: bool) -> _Side:
    """One side of the pairs, of images (N, C, H, W) in float64."""
    images = images - images.mean(dim=(1, 2, 3), keepdim=True)
    spectra = shifts.spectrum(images, moved=not truth)
    count, enough = shifts.common(overlap, images.device)
    n = images.shape[1] * count
    total, squares = shifts.sums(images.sum(1)), shifts.sums(images.square().sum(1))
    if not truth:  # seen from the other image, a shift has the opposite sign
        total, squares = total.flip(-2, -1), squares.flip(-2, -1)
    spread = squares - total.square() / n
    scale = spread.rsqrt().masked_fill(~enough | ~(spread >= FLAT * n), torch.nan)
    return _Side(spectra.conj().resolve_conj() if truth else spectra, total / n.sqrt(), scale)


def _mirrored(side: _Side, images: Tensor, shifts: _Shifts) -> _Side:
    """The side of the mirror images, of which only the transform is new."""
    images = images - images.mean(dim=(1, 2, 3), keepdim=True)
    return _Side(shifts.spectrum(images.flip(-1), moved=True), side.mean.flip(-1), side.scale.flip(-1))


def _best(truth: _Side, images: _Side, shifts: _Shifts) -> Tensor:
    """Greatest correlation over the shifts of broadcast pairs; -infinity where no shift counts."""
    found = shifts.products(truth.spectra, images.spectra)
    found = torch.addcmul(found, truth.mean, images.mean, value=-1).mul_(truth.scale).mul_(images.scale)
    return found.nan_to_num_(nan=-math.inf).amax(dim=(-2, -1))


def _chunk(shifts: _Shifts, channels: int) -> int:
    """Pairs worked on at once."""
    rows, columns = shifts.padded
    return max(1, CHUNK_VALUES // (channels * rows * (columns // 2 + 1)))


def registered_correlation(
    images: Tensor, truth: Tensor, overlap: float = OVERLAP, mirror: bool = True
) -> Tensor:
    """Greatest correlation of each pair over shifts and the mirror image, in [-1, 1], float64 (N,).

    At every shift that leaves at least a share `overlap` of the pixels in common, the Pearson correlation of the
    common pixels, all channels together: one gain and one offset are forgiven. Shifts at which the common part of
    either image has a variance below 1e-6 are left out; a constant image, or one whose numbers are not all finite,
    has no score (NaN). The greatest of some thousand shifts is large by chance: read it beside that of other images.
    Raises DataError as :func:`fedattack.metrics.mse`.
    """
    refuse_unlike(images, truth)
    shifts = _Shifts.leaving((truth.shape[-2], truth.shape[-1]), overlap)

    def greatest(y: Tensor, x: Tensor) -> Tensor:
        private, found = _side(x, shifts, overlap, True), _side(y, shifts, overlap, False)
        best = _best(private, found, shifts)
        if mirror:
            best = torch.maximum(best, _best(private, _mirrored(found, y, shifts), shifts))
        return best

    best = by_chunks(greatest, images, truth, CHUNK_PIXELS)
    return best.masked_fill(best.isinf(), torch.nan)


def correlation_table(images: Tensor, truth: Tensor, overlap: float = OVERLAP, mirror: bool = True) -> Tensor:
    """:func:`registered_correlation` of each of A images with each of B others, float64 (A, B).

    Transforms and sums of an image are worked out once, so that a pair costs one inverse transform, or two with
    `mirror`. Raises DataError if they are not (A, C, H, W) and (B, C, H, W), or on another scale than [0, 1].
    """
    if images.ndim != 4 or truth.ndim != 4 or images.shape[1:] != truth.shape[1:] or 0 in truth.shape[1:]:
        raise DataError(
            f"images of shape {tuple(images.shape)} cannot be compared with {tuple(truth.shape)}: both must be "
            "(N, C, H, W), with the same channels and size"
        )
    refuse_other_scales(images)
    refuse_other_scales(truth)
    truth = truth.to(images.device)
    shifts = _Shifts.leaving((truth.shape[-2], truth.shape[-1]), overlap)
    step = _chunk(shifts, truth.shape[1])
    table = truth.new_empty(len(images), len(truth), dtype=torch.float64)
    # Spectra of two blocks are held at a time, 32 MiB each (and of mirror images), however many images there are.
    block = 8 * step
    for row in range(0, len(images), block):
        part = clamped(images[row : row + block])
        sides = [_side(part, shifts, overlap, False)]
        if mirror:
            sides.append(_mirrored(sides[0], part, shifts))
        for column in range(0, len(truth), block):
            private = _side(clamped(truth[column : column + block]), shifts, overlap, True)
            for i in range(len(part)):
                for j in range(0, len(private.mean), step):
                    others = private[j : j + step]
                    best = torch.stack([_best(others, side[i : i + 1], shifts) for side in sides]).amax(0)
                    table[row + i, column + j : column + j + len(best)] = best
    return table.masked_fill_(table.isinf(), torch.nan)


def registered_psnr(
    images: Tensor, truth: Tensor, shift: int = 4, overlap: float = OVERLAP, mirror: bool = True
) -> Tensor:
    """Greatest PSNR of each pair over shifts of at most `shift` pixels and the mirror image, dB, float64 (N,).

    Over the pixels that both have in common, at least a share `overlap` of them, without gain or offset. A shift
    other than 0 that leaves only a constant part of the private image is left out, or a black border would score as
    a perfect answer. Infinite for identical images; NaN where a number is not finite. Raises DataError as
    :func:`fedattack.metrics.mse`.
    """
    refuse_unlike(images, truth)
    shifts = _Shifts.leaving((truth.shape[-2], truth.shape[-1]), overlap, shift)
    count, enough = shifts.common(overlap, images.device)
    n, (m, k) = truth.shape[1] * count, shifts.reach

    def least_error(y: Tensor, x: Tensor) -> Tensor:
        # The error of a pair does not change if both lose the same number, and the sums get smaller.
        level = x.mean(dim=(1, 2, 3), keepdim=True)
        x, y = x - level, y - level
        squares = shifts.sums(x.square().sum(1))
        counts = enough & (squares - shifts.sums(x.sum(1)).square() / n >= FLAT * n)
        counts[:, m, k] = True
        spectra = shifts.spectrum(x, moved=False).conj().resolve_conj()
        errors = []
        for other in (y, y.flip(-1)) if mirror else (y,):
            theirs = shifts.sums(other.square().sum(1)).flip(-2, -1)
            error = (squares + theirs - 2 * shifts.products(spectra, shifts.spectrum(other, moved=True))) / n
            place = error.masked_fill(~counts, torch.inf).flatten(1).argmin(1)
            # Again at the best shift, from the differences: sums of squares cannot tell 150 dB from identical.
            rows, columns = place // (2 * k + 1) - m, place % (2 * k + 1) - k
            errors.append(_error_at(x, other, rows, columns))
        return torch.stack(errors).amin(0)

    return -10 * torch.log10(by_chunks(least_error, images, truth, CHUNK_PIXELS))


def _error_at(truth: Tensor, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Mean squared error over the common part, of each pair at its own shift."""
    n, c, h, w = truth.shape
    row = torch.arange(h, device=truth.device) + rows[:, None]
    column = torch.arange(w, device=truth.device) + columns[:, None]
    inside = ((row >= 0) & (row < h))[:, :, None] & ((column >= 0) & (column < w))[:, None, :]
    place = row.clamp(0, h - 1)[:, :, None] * w + column.clamp(0, w - 1)[:, None, :]
    moved = images.flatten(2).gather(2, place.flatten(1)[:, None].expand(n, c, h * w)).view_as(truth)
    error = (truth - moved).square().sum(1).where(inside, 0.0)
    return error.sum(dim=(1, 2)) / (c * inside.sum(dim=(1, 2)))


@dataclass
class RegisteredCorrelation(ImageMetric):
    """Correlation with the private image at the best shift, mirrored or not; one gain and one offset forgiven.

    Parameters
    ----------
    overlap : float
        Least share of the pixels in common, above 0, up to 1.
    mirror : bool
        Whether the mirror image counts too.
    """

    overlap: float = OVERLAP
    mirror: bool = True

    title: ClassVar[str] = "registered correlation"

    def check(self, size: tuple[int, int, int]) -> None:
        _Shifts.leaving((size[1], size[2]), self.overlap)

    def scores(self, pairs: Pairs) -> Tensor:
        return registered_correlation(pairs.images, pairs.truth, self.overlap, self.mirror)


@dataclass
class RegisteredPSNR(ImageMetric):
    """Peak signal-to-noise ratio of the common pixels at the best small shift, mirrored or not.

    Parameters
    ----------
    shift : int
        Largest shift in pixels, up and down, left and right.
    overlap : float
        Least share of the pixels in common, above 0, up to 1.
    mirror : bool
        Whether the mirror image counts too.
    """

    shift: int = 4
    overlap: float = OVERLAP
    mirror: bool = True

    title: ClassVar[str] = "registered PSNR"
    unit: ClassVar[str] = "dB"
    digits: ClassVar[int] = 1

    def check(self, size: tuple[int, int, int]) -> None:
        _Shifts.leaving((size[1], size[2]), self.overlap, self.shift)

    def scores(self, pairs: Pairs) -> Tensor:
        return registered_psnr(pairs.images, pairs.truth, self.shift, self.overlap, self.mirror)
