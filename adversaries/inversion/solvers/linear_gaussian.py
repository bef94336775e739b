"""A linear model with Gaussian errors, fitted to pairs and read backwards under a prior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CONSTANT = 1e-9
"""A feature that varies by less than this share of its size is none."""


@dataclass(frozen=True)
class LinearGaussian:
    """``x = y B + e``, e of covariance S, x standardised (Bishop, "Pattern Recognition and Machine Learning", 2.3.3).

    `kept` bool (F,): features that vary; `centre`, `spread` float64 (F',); `slopes` B float64 (K, F'); `errors` S
    float64 (F', F').
    """

    kept: Tensor
    centre: Tensor
    spread: Tensor
    slopes: Tensor
    errors: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, shrinkage: float) -> LinearGaussian:
        """By least squares on float64 x (n, F) and y (n, K), whose rows have one sum, so that no constant is fitted.

        `shrinkage` in (0, 1] moves the errors' covariance towards its diagonal, which few pairs need.
        """
        spread = x.std(0)
        kept = spread > _CONSTANT * x.abs().amax(0)
        centre, spread = x.mean(0)[kept], spread[kept]
        z = (x[:, kept] - centre) / spread
        slopes = torch.linalg.pinv(y) @ z
        left = z - y @ slopes
        errors = left.T @ left / max(1, len(y) - y.shape[1])
        sizes = errors.diagonal().clone()
        errors = (1 - shrinkage) * errors + torch.diag(shrinkage * sizes + 1e-9 * sizes.mean() + 1e-30)
        return cls(kept, centre, spread, slopes, errors)

    def posterior(self, x: Tensor, mean: Tensor, covariance: Tensor, scales: Sequence[float]) -> Tensor:
        """Posterior means (n, K) of y given x (n, F), under the prior N(mean, scale * covariance).

        The covariance is to keep the rows' sum, which x does not tell. Each row has the scale under which its x is
        likeliest.
        """
        residual = (x[:, self.kept] - self.centre) / self.spread - mean @ self.slopes
        through = covariance @ self.slopes
        spread = self.slopes.T @ through
        found, best = mean.expand(len(x), -1).clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype)
        for scale in scales:
            factor = torch.linalg.cholesky(scale * spread + self.errors)
            solved = torch.cholesky_solve(residual.T, factor).T
            likelihood = -0.5 * (residual * solved).sum(1) - factor.diagonal().log().sum()
            better = likelihood > best
            found[better] = mean + scale * solved[better] @ through.T
            best = torch.maximum(best, likelihood)
        return found
