"""Deletion requests ordered by loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from adversaries.unlearning.base import UnlearningAttack
from fedattack.errors import ConfigError
from fedattack.observation import UnlearningRequest

_CHUNK = 256


@dataclass
class MaxLoss(UnlearningAttack):
    """Asks to forget the samples on which the current global model does worst.

    The white-box order by per-sample cross-entropy, descending. Samples that the model has not fitted carry
    the largest gradients, so a mechanism that undoes their influence moves the model furthest.
    """

    def choose(
        self, client: int, model: nn.Module, images: Tensor, labels: Tensor, requests: int, seed: int
    ) -> UnlearningRequest:
        """Choose the `requests` samples of largest loss; equal losses in order of position.

        Parameters
        ----------
        client : int
        model : nn.Module
            Evaluated in eval mode, whatever mode it comes in, and given back in the mode it came in.
        images, labels : Tensor
            float32 (N, C, H, W) in [0, 1] and int64 (N,).
        requests : int
            1 to N.
        seed : int
            Not used: the order has no chance in it.

        Raises
        ------
        ConfigError
            If the client has fewer samples than `requests`.
        """
        del seed
        if not 1 <= requests <= len(images):
            raise ConfigError(
                f"setting 'attack.requests' = {requests}: client {client} has {len(images)} samples; "
                f"accepted: 1 to {len(images)}"
            )
        losses = sample_losses(model, images, labels)
        order = torch.argsort(losses, descending=True, stable=True)[:requests]
        return UnlearningRequest(client, tuple(order.tolist()), "largest loss")


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
