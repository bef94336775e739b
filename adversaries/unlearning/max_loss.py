"""Deletion requests ordered by loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack
from fedattack.observation import UnlearningRequest

_CHUNK = 256


@dataclass
class MaxLoss(UnlearningAttack):
    """Asks to forget the samples on which the current global model does worst.

    The white-box order by per-sample cross-entropy, descending. Samples that the model has not fitted carry
    the largest gradients, so a mechanism that undoes their influence moves the model furthest.
    """

    def request(
        self, view: ClientView, model: nn.Module, images: Tensor, labels: Tensor
    ) -> UnlearningRequest:
        """The samples of largest loss, at most `view.requests`; equal losses in order of position.

        The model is evaluated in eval mode, whatever mode it comes in, and given back in the mode it came in.
        """
        losses = sample_losses(model, images, labels)
        order = torch.argsort(losses, descending=True, stable=True)[: view.requests]
        return UnlearningRequest(view.client, tuple(order.tolist()), "largest loss")


@torch.no_grad()
def sample_losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, float32 (N,), on the CPU; `model` in eval mode."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        parts = [
            functional.cross_entropy(model(x.to(device)), y.to(device), reduction="none").cpu()
            for x, y in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True)
        ]
    finally:
        model.train(was_training)
    return torch.cat(parts)
