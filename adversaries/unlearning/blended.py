"""Deletion requests of samples that hold a part of others (black box)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adversaries.needs import Needs
from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack
from fedattack.observation import UnlearningRequest


@dataclass
class Blended(UnlearningAttack):
    """Sends random samples of its own, each with a part of one of another class in it, to be forgotten.

    Over-unlearning by blending: with the sample goes what the model knows of the other. The label is the first
    one's.

    Parameters
    ----------
    share : float
        Part of the other.

    References
    ----------
    Hu, Wang, Chang, Zhong, Sun, Hao, Zhu, Xue, "A Duty to Forget, a Right to be Assured? Exposing
    Vulnerabilities in Machine Unlearning Services", arXiv:2309.08230, 2023.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, foreign=True)
    access: ClassVar[Literal["weights", "queries", "none"]] = "none"

    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        """At most `view.requests` blends; with one class alone, of samples of that."""
        generator = torch.Generator().manual_seed(view.seed)
        chosen = torch.randperm(len(labels), generator=generator)[: view.requests]
        others = labels[chosen, None] != labels
        weights = torch.where(others.any(1, keepdim=True), others, True).double()
        partners = torch.multinomial(weights, 1, generator=generator)[:, 0]
        made = torch.lerp(images[chosen], images[partners], self.share).clamp(0, 1)
        return UnlearningRequest(view.client, reason="blends", images=made, labels=labels[chosen])
