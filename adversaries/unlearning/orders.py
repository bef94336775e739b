"""Deletion requests ordered by what the global model says of the client's samples (white box)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from adversaries.membership.per_sample import Gradients, norms, products
from adversaries.needs import Facts
from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack, check_class
from fedattack.observation import Candidates, Scenario, UnlearningRequest, Update
from fedattack.task import trained_parameters
from fedattack.training import batch_gradient, sample_logits, sample_losses


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


@dataclass
class TargetClass(Order):
    """Asks to forget the samples that hold up what the model knows of one class.

    Samples are ordered by the inner product of their gradient with the mean gradient of its own samples of class
    `target`, descending: to first order what undoing them costs that class alone (the choice of FedMUA, 2501.11848,
    which changes the samples' features besides).

    Parameters
    ----------
    target : int
        The class.
    """

    reason = "most influence on a class"
    goal = "held-out images of one class taken for another"
    target: Annotated[int, Field(ge=0)] = 0

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse a target that is no class."""
        check_class(self.target, scenario)

    def scores(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Inner products; zeros where it has no sample of the class."""
        mine = labels == self.target
        if not mine.any():
            return torch.zeros(len(labels)).double()
        _, slopes = batch_gradient(model, images[mine], labels[mine])
        shapes = tuple(tuple(slope.shape) for slope in slopes)
        whole = torch.cat([slope.reshape(-1) for slope in slopes])
        wanted = Update(tuple(trained_parameters(model)), shapes, None, whole)
        gradients = Gradients(model, model.state_dict(), Candidates(images, labels))
        return products(gradients, [wanted])[0][0]

    def success(
        self, predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, view: ClientView
    ) -> float | None:
        """The share of images of the class that are taken for another."""
        mine = labels == self.target
        return float((predict(images[mine]).argmax(1) != self.target).double().mean())
