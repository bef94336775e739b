"""Samples whose removal uses up what a certificate allows, so that the server trains anew again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from adversaries.needs import Needs
from adversaries.seats import ClientView
from adversaries.unlearning.planted.base import Planted


@dataclass
class SlowDown(Planted):
    """Trains on samples that are costly to remove with a certificate, and has them removed.

    ``attack.requests`` of its samples are changed a little, their labels kept, so that the Newton steps that
    remove them are longest: projected gradient on ``sum_j |H^-1 grad_j|`` in an l-infinity ball, H and the
    weights of logistic models of its own, one class against the rest, on all of its samples' pixels. It costs the
    server time and the model next to nothing.

    Parameters
    ----------
    costliest : bool
        Change the samples that are costliest as they are, and not any.
    radius : float
        Most change of a pixel.
    steps : int
        Of the gradient.
    l2 : float, optional
        Of its own models' mean loss; None: ``training.weight_decay``, or .01 where there is none.

    References
    ----------
    Marchant, Rubinstein, Alfeld, "Hard to Forget: Poisoning Attacks on Certified Machine Unlearning", AAAI 2022.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, certificate=True)
    reason: ClassVar[str] = "costly to remove"
    goal: ClassVar[str] = "removals that made the server train anew"

    costliest: bool = True
    radius: Annotated[float, Field(ge=0, le=1)] = 0.1
    steps: Annotated[int, Field(ge=1)] = 20
    l2: Annotated[float, Field(gt=0)] | None = None

    def make(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The changed samples."""
        inverse, weights, targets = self._models(view, images, labels)

        def cost(x: Tensor, signs: Tensor) -> Tensor:
            slopes = -torch.sigmoid(-signs * (weights @ x.T)) * signs  # (K, n), times x: the gradients
            return (slopes[:, :, None] * torch.einsum("kij,nj->kni", inverse, x)).norm(dim=2).sum(0)

        parts = [
            cost(_inputs(x), y)
            for x, y in zip(images.double().split(512), targets.split(512, 1), strict=True)
        ]
        order = torch.cat(parts).argsort(descending=True, stable=True)
        costly = (order if self.costliest else torch.arange(len(labels)))[: view.requests]
        start, signs = images[costly].double(), targets[:, costly]
        made = start
        for _ in range(self.steps):
            point = made.clone().requires_grad_()
            (slope,) = torch.autograd.grad(cost(_inputs(point), signs).sum(), point)
            moved = made + 2.5 * self.radius / self.steps * slope.sign() - start
            made = (start + moved.clamp(-self.radius, self.radius)).clamp(0, 1)
        return made.float(), labels[costly], costly

    def spent(self, certificate: Mapping[str, Any], removed: int) -> float | None:
        """Trainings anew for each removal."""
        return min(1.0, certificate["retrained"] / removed)

    def _models(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inverse Hessians (K, d, d) of sums of losses, weights (K, d) and targets (K, N), of K models."""
        l2 = self.l2 or view.scenario.training.weight_decay or 0.01
        x, n = _inputs(images.double()), len(labels)
        classes = labels.unique().tolist()
        targets = torch.stack(
            [2.0 * (labels == c).double() - 1 for c in classes[1 if len(classes) == 2 else 0 :]]
        )
        weights = np.zeros((len(targets), x.shape[1]))
        for place, signs in enumerate(targets):
            if len(signs.unique()) == 2:
                model = LogisticRegression(C=1 / (l2 * n), fit_intercept=False, tol=1e-8, max_iter=1000)
                weights[place] = model.fit(x.numpy(), signs.numpy()).coef_[0]
        found = torch.from_numpy(weights)
        share = torch.sigmoid(found @ x.T)
        hessians = torch.einsum("kn,ni,nj->kij", share * (1 - share), x, x) + l2 * n * torch.eye(x.shape[1])
        return torch.linalg.inv(hessians), found, targets


def _inputs(images: Tensor) -> Tensor:
    """Pixels and a 1, none longer than 1, (n, d)."""
    x = torch.cat([images.flatten(1), images.new_ones(len(images), 1)], 1)
    return x / x.shape[1] ** 0.5
