"""Deletion requests of samples with labels that they never had (black box)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adversaries.needs import Needs
from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack
from fedattack.observation import UnlearningRequest


@dataclass
class WrongLabel(UnlearningAttack):
    """Sends random samples of its own with random other labels, to be forgotten.

    Nobody trained on them so; a mechanism that believes the request undoes what was never done, and the model's
    large loss on them makes its step long. A server that compares digests of registered samples finds out.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, foreign=True)
    access: ClassVar[Literal["weights", "queries", "none"]] = "none"

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        """At most `view.requests` samples."""
        generator = torch.Generator().manual_seed(view.seed)
        chosen = torch.randperm(len(labels), generator=generator)[: view.requests]
        classes = view.scenario.model.resolved[2]
        moved = torch.randint(1, classes, (len(chosen),), generator=generator)
        return UnlearningRequest(
            view.client,
            reason="wrong labels",
            images=images[chosen],
            labels=(labels[chosen] + moved) % classes,
        )
