"""Deletion requests ordered by what the global model says of the client's samples (white box)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adversaries.membership.per_sample import Gradients, norms
from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack
from fedattack.observation import Candidates, UnlearningRequest
from fedattack.training import sample_logits, sample_losses


@dataclass
class Order(UnlearningAttack):
    """Asks to forget the samples of largest :meth:`scores` under the current global model."""

    reason = ""

    @abstractmethod
    def scores(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """What samples are ordered by, descending, float64 (N,)."""

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        """At most `view.requests` samples; equal ones in order of position."""
        assert view.model is not None, "its access is to the weights"
        scores = self.scores(view.model, images, labels)
        order = torch.argsort(scores, descending=True, stable=True)[: view.requests]
        return UnlearningRequest(view.client, tuple(order.tolist()), self.reason)


@dataclass
class MaxLoss(Order):
    """Asks to forget the samples on which the current global model does worst.

    The white-box order by per-sample cross-entropy, descending. Samples that the model has not fitted carry
    the largest gradients, so a mechanism that undoes their influence moves the model furthest.
    """

    reason = "largest loss"

    def scores(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Each sample's cross-entropy."""
        return sample_losses(model, model.state_dict(), images, labels)


@dataclass
class MaxGradient(Order):
    """Asks to forget the samples with the longest gradients.

    The white-box order by the 2-norm of each sample's gradient over all trained parameters, descending: what a
    mechanism's step for the sample is proportional to.
    """

    reason = "longest gradient"

    def scores(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The norms."""
        return norms(Gradients(model, model.state_dict(), Candidates(images, labels)))


@dataclass
class MinConfidence(Order):
    """Asks to forget the samples whose most probable class is least probable.

    The white-box order by top-1 probability, ascending; labels are not looked at.
    """

    reason = "least confidence"

    def scores(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Top-1 probabilities, negated."""
        return -sample_logits(model, model.state_dict(), images).double().softmax(1).amax(1)


@dataclass
class MinMargin(Order):
    """Asks to forget the samples that the model can hardly tell from another class.

    The white-box order by top-1 less top-2 probability, ascending; labels are not looked at.
    """

    reason = "least margin"

    def scores(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Differences of the two largest probabilities, negated."""
        first, second = (
            sample_logits(model, model.state_dict(), images).double().softmax(1).topk(2, 1).values.unbind(1)
        )
        return second - first
