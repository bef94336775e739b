"""Fréchet distance between two sets of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, eigvalsh, svdvals

from fedattack.errors import DataError


def frechet_distance(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of the means and covariances of two sets (n, d), (m, d).

    The squared 2-Wasserstein distance of two normal distributions (Dowson and Landau, 1982); of Inception's features
    it is the "FID" (Heusel et al., 2017). Biased upwards, the more the smaller the sets: compare with that of two
    real sets of the same sizes. DataError with fewer than 2 of a kind.
    """
    if min(len(one), len(other)) < 2:
        raise DataError(
            f"Fréchet distance of {len(one)} and {len(other)} feature vectors: at least 2 each are needed"
        )
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    if max(len(a), len(b)) <= a.shape[1]:
        # C1 = A^T A and C2 = B^T B of the centred rows: the roots of C1 C2's eigenvalues are the singular values of
        # A B^T, which has a row and a column an image, not a feature.
        rows, columns = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
        traces = np.square(rows).sum() + np.square(columns).sum()
        return max(0.0, float(shift + traces - 2 * svdvals(rows @ columns.T).sum()))
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), whose roots are stable where C1 is singular.
    cross = np.sqrt(eigvalsh(root @ second @ root).clip(0)).sum()
    return max(0.0, float(shift + np.trace(first) + np.trace(second) - 2 * cross))
