"""From the features behind a convolutional stem back to pixels."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import jacrev

from adversaries.inversion.evidence.priors import GaussianPrior, gaussian_prior
from fedattack.observation import Auxiliary

_LEVELS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
"""Assumed errors of a feature, relative to the features' deviation from the mean image's, one after the other."""

_CHUNK = 256


def invert_stem(
    stem: nn.Module, features: Tensor, shape: tuple[int, int, int], auxiliary: Auxiliary | None
) -> tuple[Tensor, dict[str, float]]:
    """Images (N, C, H, W) of given features (N, F); where the stem loses something, the likeliest of them.

    Gauss-Newton on ``|stem(x) - f|^2 / tau^2 + |z|^2`` with x = mean + A z under a Gaussian prior of the public
    images, tau falling to the features' rounding: the data then decide everything that they determine, the prior
    the rest. Features are float64 on the CPU; "feature_residual" among the figures is the worst |stem(x) - f| / |f|.
    """
    exact = copy.deepcopy(stem).double().cpu().eval()
    prior = gaussian_prior(auxiliary, shape)
    distinct, place = features.unique(dim=0, return_inverse=True)
    images = torch.stack([_inverted(exact, target, shape, prior) for target in distinct])[place]
    with torch.no_grad():
        residual = (exact(images) - features).norm(dim=1) / features.norm(dim=1).clamp_min(1e-300)
    return images, {"feature_residual": float(residual.max())}


def _inverted(stem: nn.Module, target: Tensor, shape: tuple[int, int, int], prior: GaussianPrior) -> Tensor:
    factor = prior.factor()

    def answer(x: Tensor) -> Tensor:
        return stem(x.reshape(1, *shape))[0]

    def objective(z: Tensor, tau: float) -> float:
        left = (answer(prior.mean + factor @ z) - target) / tau
        return float(left.square().sum() + z.square().sum())

    x = prior.mean.clone()
    z = torch.zeros(factor.shape[1], dtype=x.dtype)
    with torch.no_grad():
        spread = float((target - answer(x)).square().mean().sqrt())
        for level in _LEVELS:
            tau = max(level * spread, 1e-9)
            for _ in range(2):
                jacobian = jacrev(answer, chunk_size=_CHUNK)(x) @ factor / tau
                wanted = (target - answer(x)) / tau + jacobian @ z
                # (J'J + I)^-1 J' b = J' (J J' + I)^-1 b: whichever is smaller
                if jacobian.shape[0] <= jacobian.shape[1]:
                    gram = jacobian @ jacobian.T
                    gram.diagonal().add_(1.0)
                    z_new = jacobian.T @ torch.linalg.solve(gram, wanted)
                else:
                    gram = jacobian.T @ jacobian
                    gram.diagonal().add_(1.0)
                    z_new = torch.linalg.solve(gram, jacobian.T @ wanted)
                before = objective(z, tau)
                length = 1.0
                while length > 1e-3:
                    trial = z + length * (z_new - z)
                    if objective(trial, tau) <= before:
                        z = trial
                        break
                    length /= 2
                x = prior.mean + factor @ z
    return x.reshape(shape)
