"""Samples on the border between two classes, trained on and then forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from adversaries.seats import ClientView
from adversaries.unlearning.planted.base import Planted
from adversaries.unlearning.surrogate import trained

_HALVINGS = 16


@dataclass
class Boundary(Planted):
    """Trains on samples moved to where a model of its own cannot tell two classes apart, and has them forgotten.

    Random samples walk from their class towards the runner-up, ``x - (L + margin) grad L / |grad L|^2`` with L
    the difference of the two logits, until the class changes (boundary supporting samples), in the box of pixels,
    and back to where it does so; their labels are kept. The training poison of the published attack on L-CODEC.

    Parameters
    ----------
    epochs : int
        Of its own model, over all of its samples.
    steps, margin
        Most steps of the walk; by how much a step aims beyond the border, in logits.

    References
    ----------
    Heo, Lee, Yun, Choi, "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary", AAAI 2019.
    """

    reason: ClassVar[str] = "boundary samples"

    epochs: Annotated[int, Field(ge=1)] = 30
    steps: Annotated[int, Field(ge=1)] = 10
    margin: Annotated[float, Field(ge=0)] = 0.01

    def make(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boundary samples of random samples of its own."""
        generator = torch.Generator().manual_seed(view.seed)
        chosen = torch.randperm(len(labels), generator=generator)[: view.requests]
        model = trained(view, images, labels, self.epochs)
        return self.walked(model, images[chosen]), labels[chosen], chosen

    def walked(self, model: nn.Module, images: Tensor) -> Tensor:
        """Images (n, C, H, W) moved to where the most probable class changes, or as far as they came."""
        with torch.no_grad():
            base, other = model(images).topk(2, 1).indices.unbind(1)
        inside, beyond = images.clone(), images.clone()
        for _ in range(self.steps):
            point = beyond.clone().requires_grad_()
            logits = model(point)
            gap = (logits.gather(1, base[:, None]) - logits.gather(1, other[:, None]))[:, 0]
            (slope,) = torch.autograd.grad(gap.sum(), point)
            # A pixel at its end that is to go beyond it moves nothing, and must not count in the length.
            slope = slope * ~(((beyond <= 0) & (slope > 0)) | ((beyond >= 1) & (slope < 0)))
            length = slope.flatten(1).square().sum(1).clamp(min=1e-12)
            far = torch.where(
                logits.argmax(1) == base, (gap.clamp(min=0) + self.margin) / length, 0.0
            ).detach()
            beyond = (beyond - far[:, None, None, None] * slope).clamp(0, 1)
        for _ in range(_HALVINGS):
            middle = (inside + beyond) / 2
            with torch.no_grad():
                same = (model(middle).argmax(1) == base)[:, None, None, None]
            inside, beyond = torch.where(same, middle, inside), torch.where(same, beyond, middle)
        return inside
