"""Soteria: the gradient of the head is computed from a pruned representation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from fedattack.defenses.base import Defense
from fedattack.models import build_model
from fedattack.models.classifiers.precode import headed
from fedattack.models.normalise import normalised
from fedattack.observation import Scenario
from fedattack.task import GradientStep, LossAndGradient, objective, trained_parameters

_AT_ONCE = 64
"""Rows of the Jacobian that are computed together."""

_NEAR_ZERO = 0.1
"""Added to a feature's magnitude before it is divided by, as in the authors' code."""


@dataclass
class Soteria(Defense):
    """Prune those features that give most away about the image, in the head's weight gradient alone.

    Of each sample, feature r_i goes where ``||d r_i / d x|| / |r_i|`` is smallest: setting it to zero then stands for
    the largest change of the image. The head's weight gradient is the sum over the batch of the logits' gradient
    times the pruned features; all other gradients, the loss and the head's bias are unchanged. Choices are each
    sample's own, anew in every step; the authors' code adds the ratios of a batch up.

    Parameters
    ----------
    share : float
        Share of the features set to zero. The authors' code has 0.6 against Inverting Gradients and 0.01 against DLG.

    References
    ----------
    Sun et al., Soteria: Provable Defense against Privacy Leakage in Federated Learning from Representation
    Perspective, 2021, section 4.
    """

    replaces_gradient: ClassVar[bool] = True
    generates: ClassVar[bool] = False

    share: Annotated[float, Field(ge=0, lt=1)] = 0.6

    def check(self, scenario: Scenario) -> None:
        """Refuse models without features below a linear head."""
        headed(build_model(scenario.model), "defence 'soteria'")

    def gradient(
        self, model: nn.Module, images: Tensor, labels: Tensor, inner: GradientStep, generator: Generator
    ) -> LossAndGradient:
        """The batch's gradient with the head's weight gradient from pruned features."""
        network = headed(model, "defence 'soteria'")
        images = images.detach().requires_grad_()
        features = network.features(normalised(model, images))
        pruned = features.detach() * self.kept(features, images)
        logits = network.head(features)
        loss = objective(model, logits, labels)
        parameters = list(trained_parameters(model).values())
        *gradients, at_logits = torch.autograd.grad(loss, [*parameters, logits], materialize_grads=True)
        place = next(index for index, p in enumerate(parameters) if p is network.head.weight)
        gradients[place] = at_logits.T @ pruned
        return loss, tuple(gradients)

    def kept(self, features: Tensor, images: Tensor) -> Tensor:
        """0 where a sample's feature is pruned, 1 elsewhere; float32 (B, features).

        `features` (B, features) have their graph from `images` (B, C, H, W), which require gradients.
        """
        count = features.shape[1]
        norms = [self._norms(features, images, rows) for rows in torch.arange(count).split(_AT_ONCE)]
        ratio = torch.cat(norms, dim=1) / (features.detach().abs() + _NEAR_ZERO)
        pruned = ratio.argsort(dim=1, stable=True)[:, : round(self.share * count)]
        return torch.ones_like(ratio).scatter_(1, pruned, 0.0)

    def _norms(self, features: Tensor, images: Tensor, rows: Tensor) -> Tensor:
        """``||d r_i / d x||`` of each sample for these features: (B, rows)."""
        # Samples do not depend on one another, so one product with (1, ..., 1) over the batch gives all of them.
        chosen = torch.zeros(len(rows), features.shape[1], device=features.device)
        chosen[torch.arange(len(rows)), rows] = 1.0
        directions = chosen[:, None].expand(-1, len(images), -1)
        (slopes,) = torch.autograd.grad(
            features, images, directions, retain_graph=True, is_grads_batched=True
        )
        return slopes.flatten(2).norm(dim=2).T
