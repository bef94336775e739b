"""The span of the private batch: the row space of the wide layer's gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GAP = 2e3
"""A ratio s_B / s_{B+1} of at least this much is taken for the batch's end (float32 gradients give 1e4 and more)."""

ROUNDING = 1e-8
"""Share of the largest singular value below which a float32 matrix says nothing."""

CLEAR = 3.0
"""How many times the noise's largest singular value one of the batch's clearly is."""

NOISY = 1e-6
"""Share of the largest singular value above which noise is more than the rounding of float32."""

DEPENDENT = 1e-6
"""Samples whose s_B / s_1 is below this are dependent as far as a float32 gradient can tell."""

_ROUNDED = 2.0**-24 / 3**0.5
"""Deviation of a float32 number's rounding, relative to it."""

_SPARE = 12
_POWERS = 2
_FLIPS = 2
_PROBES, _STEPS = 4, 12


@dataclass(frozen=True)
class Span:
    """Leading right singular vectors of a matrix."""

    values: Tensor  # float64 (k,), descending
    basis: Tensor  # float64 (d, k), orthonormal columns

    def rank(self, most: int | None = None) -> int | None:
        """The number of values before the first gap of :data:`GAP`, at most `most`; None where there is none.

        Of a gradient without noise; with it, see :func:`rank_under_noise`.
        """
        if not float(self.values[0]) > 0:
            return None
        ratios = self.values[:-1] / self.values[1:].clamp_min(1e-300)
        # Beyond the noise floor of float32, ratios say nothing.
        loud = self.values[:-1] > ROUNDING * self.values[0]
        ratios = torch.where(loud, ratios, torch.zeros_like(ratios))[:most]
        best = int(ratios.argmax())
        return best + 1 if float(ratios[best]) >= GAP else None

    def above(self, limit: float, most: int | None = None) -> int:
        """How many of the first `most` values are above a limit, and above what float32 can tell."""
        return int((self.values[:most] > max(limit, ROUNDING * float(self.values[0]))).sum())


def rank_under_noise(matrix: Tensor, span: Span, most: int, generator: torch.Generator) -> tuple[int, float]:
    """How many of the leading `most` singular values of a float64 (m, d) stand out of noise, and the noise's largest.

    Values below ``lambda sqrt(max(m, d))`` deviations, a factor of 1.15 to 1.41 above the noise's edge, lose more to
    noise than they give (Gavish, Donoho, "The optimal hard threshold for singular values is 4/sqrt(3)", IEEE Trans.
    Inf. Theory 2014, equation 11). The edge is that of what the values clearly above it leave.
    """
    factor = _optimal(min(matrix.shape) / max(matrix.shape))
    edge = noise_edge(matrix, span, most, generator)
    rank = span.above(CLEAR * edge, most)
    while rank < most:
        edge = noise_edge(matrix, span, rank, generator)
        # The rounding of sums in float32 is not quite random: a direction or two stand out of it.
        limit = max(factor * edge, min(2 * edge, NOISY * float(span.values[0])))
        before, rank = rank, span.above(limit, most)
        if rank <= before:
            break
    return rank, edge


def _optimal(ratio: float) -> float:
    """Gavish and Donoho's threshold over Marchenko and Pastur's edge for a matrix of this ratio of its sides."""
    inner = (ratio + 1) + math.sqrt(ratio**2 + 14 * ratio + 1)
    return math.sqrt(2 * (ratio + 1) + 8 * ratio / inner) / (1 + math.sqrt(ratio))


def noise_edge(matrix: Tensor, span: Span, rank: int, generator: torch.Generator) -> float:
    """The largest singular value of the noise in a float64 (m, d) that is of `rank` at most without it.

    Of what the leading `rank` directions leave, with signs at random: entries keep their sizes, which rounding and
    quantisation make unequal, and lose what they have in common (Hong, Sheng, Dobriban, "Selecting the number of
    components in PCA via random signflips", 2020). For equal sizes it is Marchenko and Pastur's sigma (sqrt(m) +
    sqrt(d)). Where the rank may be full, that of float32's rounding.
    """
    filled = matrix != 0
    m, d = int(filled.any(1).sum()), int(filled.any(0).sum())  # black pixels have no noise
    rounded = _ROUNDED * float(matrix.norm()) * (m**-0.5 + d**-0.5)
    rank = min(rank, len(span.values))
    if rank >= min(m, d):
        return rounded
    basis = span.basis[:, :rank]
    left = matrix - (matrix @ basis) @ basis.T
    lost = (1 - rank / m) * (
        1 - rank / d
    )  # the share of the noise's energy that the leading directions leave
    edge = 0.0
    for _ in range(_FLIPS):
        flips = torch.randint(0, 2, matrix.shape, generator=generator, dtype=torch.int8).to(matrix.device)
        edge = max(edge, largest(torch.where(flips > 0, left, -left), generator))
    return max(edge / math.sqrt(lost), rounded)


def largest(matrix: Tensor, generator: torch.Generator) -> float:
    """The largest singular value of a matrix (m, d), by subspace iteration: hardly ever more than 2 % too low."""
    probe = torch.randn(matrix.shape[1], _PROBES, dtype=matrix.dtype, generator=generator).to(matrix.device)
    for _ in range(_STEPS):
        probe = matrix.T @ (matrix @ torch.linalg.qr(probe).Q)
    return float(torch.linalg.matrix_norm(matrix @ torch.linalg.qr(probe).Q, 2))


def row_space(matrix: Tensor, most: int, generator: torch.Generator) -> Span:
    """The leading singular values and right singular vectors of a float64 (m, d), by a randomised range finder.

    A few more than `most` are computed, so that the gap after the last one shows; the generator is on the
    CPU. Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 2011, algorithm 4.4, with
    power steps.
    """
    m, d = matrix.shape
    width = most + _SPARE
    if width >= 0.6 * min(m, d):
        _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
        return Span(values, vectors.T.contiguous())
    probe = torch.randn(d, width, dtype=matrix.dtype, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(_POWERS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    _, values, vectors = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Span(values, vectors.T.contiguous())
