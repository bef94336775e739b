"""Ridge regression from what an update gives away of the features to the image, shared between victims."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidate ridge strengths, relative to the mean variance of a feature."""

_COMPONENTS = 32
"""Leading principal components of the images on which a strength is judged."""

_HELD_OUT = 10
"""Every tenth auxiliary image judges."""


class FeatureRegression:
    """Predicts an image from features of which only some are known, from auxiliary (N, F) and (N, C, H, W).

    An unsent feature is known to be below a cap. Both facts are told to the regression by censoring the
    auxiliary features in the same way, max(h_j, cap), so that it is fitted to exactly what it will be asked.
    Each victim has its own caps and so its own normal equations; what does not depend on them is computed
    once, and the matrix of coefficients, of which a victim needs one combination, is never formed.

    Wu et al., "Learning to Invert: Simple Adaptive Attacks for Gradient Inversion in Federated Learning", UAI
    2023 (regression through the defence; a perceptron there).
    """

    def __init__(self, features: Tensor, images: Tensor) -> None:
        self._features = features.double()
        self._shape = images.shape[1:]
        self._targets = images.flatten(1).double()
        self._mean = self._targets.mean(0)
        self._judges = torch.zeros(len(images), dtype=torch.bool)
        self._judges[::_HELD_OUT] = True

    @cached_property
    def _components(self) -> Tensor:
        """Principal components of the images, (N, <= 32): enough to tell a good strength from a bad one."""
        centred = (self._targets - self._mean).float()
        count = min(_COMPONENTS, *centred.shape)
        scatter = centred.T @ centred
        return (centred @ torch.linalg.eigh(scatter)[1][:, -count:]).double()

    def predict(self, values: Tensor, known: Tensor, caps: Tensor | float) -> Tensor:
        """One victim's image, float32 (C, H, W), not clamped, from features (F,), anything where not `known`.

        `caps`, scalar or (F,), bound what is not sent; very large ones, where it can have any value, shut it out.
        """
        bounds = torch.as_tensor(caps, dtype=torch.float64).expand(values.shape)
        inputs = torch.maximum(self._features, bounds)
        centre = inputs.mean(0)
        inputs = inputs - centre
        asked = torch.where(known, values.double(), bounds) - centre
        gram = inputs.T @ inputs
        damping = self._strength(inputs, gram) * float(gram.diagonal().mean()) + 1e-12
        gram.diagonal().add_(damping)
        dual = torch.cholesky_solve(asked[:, None], torch.linalg.cholesky(gram))[:, 0]
        prediction = self._mean + (inputs @ dual) @ (self._targets - self._mean)
        return prediction.reshape(self._shape).float()

    def _strength(self, inputs: Tensor, gram: Tensor) -> float:
        """The strength under which the held-out tenth is predicted best from the rest."""
        judges, targets = inputs[self._judges], self._components
        seen = gram - judges.T @ judges
        moment = inputs.T @ targets - judges.T @ targets[self._judges]
        curvatures, basis = torch.linalg.eigh(seen)
        turned, moment = judges @ basis, basis.T @ moment
        scale = float(seen.diagonal().mean())
        errors = []
        for strength in STRENGTHS:
            damped = curvatures.clamp(min=0) + strength * scale + 1e-12
            guess = turned @ (moment / damped[:, None])
            errors.append(float((guess - targets[self._judges]).square().sum()))
        return STRENGTHS[min(range(len(errors)), key=errors.__getitem__)]
