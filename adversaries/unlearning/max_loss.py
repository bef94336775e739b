"""Deletion requests ordered by loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack
from fedattack.observation import UnlearningRequest
from fedattack.training import sample_losses


@dataclass
class MaxLoss(UnlearningAttack):
    """Asks to forget the samples on which the current global model does worst.

    The white-box order by per-sample cross-entropy, descending. Samples that the model has not fitted carry
    the largest gradients, so a mechanism that undoes their influence moves the model furthest.
    """

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        """The samples of largest loss, at most `view.requests`; equal losses in order of position."""
        assert view.model is not None, "its access is to the weights"
        losses = sample_losses(view.model, view.model.state_dict(), images, labels)
        order = torch.argsort(losses, descending=True, stable=True)[: view.requests]
        return UnlearningRequest(view.client, tuple(order.tolist()), "largest loss")
