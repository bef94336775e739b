"""Samples changed against the global model, to be forgotten as they never were (white box)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from adversaries.needs import Needs
from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack
from fedattack.observation import UnlearningRequest


@dataclass
class Modified(UnlearningAttack):
    """Sends random samples of its own, changed a little, with their labels, to be forgotten.

    It climbs :meth:`height` by the signs of its slope in the box of real pixels, [0, 1].

    Parameters
    ----------
    radius : float
        Most change of a pixel.
    steps : int
        Of the climb.
    published : bool
        With the defects of the released code (poisoning of machine unlearning systems, PAMUS): pixels are clamped to
        [0, 1] after normalisation, which is [`mean`, `mean` + `deviation`] before it, and :attr:`inverted` attacks
        go the wrong way.
    mean, deviation : float
        Of that normalisation, in the defects.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, foreign=True)
    inverted: ClassVar[bool] = False

    radius: Annotated[float, Field(gt=0, le=1)] = 0.3
    steps: Annotated[int, Field(ge=1)] = 20
    published: bool = False
    mean: Annotated[float, Field(ge=0, le=1)] = 0.1307
    deviation: Annotated[float, Field(gt=0, le=1)] = 0.3081

    @abstractmethod
    def height(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is to rise, a sum over the samples."""

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        """At most `view.requests` samples."""
        assert view.model is not None, "its access is to the weights"
        generator = torch.Generator().manual_seed(view.seed)
        chosen = torch.randperm(len(labels), generator=generator)[: view.requests]
        start, y = images[chosen], labels[chosen]
        low, high = (self.mean, min(1.0, self.mean + self.deviation)) if self.published else (0.0, 1.0)
        pace = self.radius if self.steps == 1 else 2.5 * self.radius / self.steps
        pace = -pace if self.published and self.inverted else pace
        made = start
        for _ in range(self.steps):
            point = made.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.height(view.model(point), y), point)
            made = start + (made + pace * slope.sign() - start).clamp(-self.radius, self.radius)
            made = made.clamp(low, high)
        return UnlearningRequest(view.client, reason="modified", images=made, labels=y)


@dataclass
class FastGradientSign(Modified):
    """Asks to forget samples moved by one step along the signs of the slope of their loss.

    FGSM.

    References
    ----------
    Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.
    """

    inverted = True
    steps: Annotated[int, Field(ge=1, le=1)] = 1

    def height(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy."""
        return cross_entropy(logits, labels, reduction="sum")


@dataclass
class ProjectedGradient(Modified):
    """Asks to forget samples on which the model is made as wrong as nearby pixels allow.

    PGD on the loss in an l-infinity ball.

    References
    ----------
    Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR
    2018.
    """

    def height(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy."""
        return cross_entropy(logits, labels, reduction="sum")


@dataclass
class MaxEntropy(Modified):
    """Asks to forget samples on which the model is made as unsure as nearby pixels allow.

    PGD on the entropy of the prediction.
    """

    inverted = True

    def height(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The entropies."""
        logs = logits.log_softmax(1)
        return -(logs.exp() * logs).sum()
