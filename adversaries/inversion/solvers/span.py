"""The span of the private batch: the row space of the wide layer's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GAP = 2e3
"""A ratio s_B / s_{B+1} of at least this much is taken for the batch's end (float32 gradients give 1e4 and more)."""

DEPENDENT = 1e-6
"""Samples whose s_B / s_1 is below this are dependent as far as a float32 gradient can tell."""

_SPARE = 12
_POWERS = 2


@dataclass(frozen=True)
class Span:
    """Leading right singular vectors of a matrix."""

    values: Tensor  # float64 (k,), descending
    basis: Tensor  # float64 (d, k), orthonormal columns

    def rank(self, most: int | None = None) -> int | None:
        """The number of values before the first gap of :data:`GAP`, at most `most`; None where there is none."""
        if not float(self.values[0]) > 0:
            return None
        ratios = self.values[:-1] / self.values[1:].clamp_min(1e-300)
        # Beyond the noise floor of float32, ratios say nothing.
        ratios = torch.where(self.values[:-1] > 1e-8 * self.values[0], ratios, torch.zeros_like(ratios))[
            :most
        ]
        best = int(ratios.argmax())
        return best + 1 if float(ratios[best]) >= GAP else None


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
