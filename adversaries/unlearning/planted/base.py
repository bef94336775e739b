"""Samples that are made before training and forgotten after it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack
from fedattack.observation import UnlearningRequest


@dataclass
class Planted(UnlearningAttack):
    """Puts ``attack.requests`` samples of its making before its others, trains on all, and has the first forgotten.

    It registers what it plants, so that a server that compares digests finds nothing.
    """

    access: ClassVar[Literal["weights", "queries", "none"]] = "none"
    reason: ClassVar[str] = "planted"

    @abstractmethod
    def make(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At most `view.requests` images and their labels, and the positions (n,) of those that they stand for."""

    def plant(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What it made first, then the other samples, in order."""
        made, given, places = self.make(view, images, labels)
        others = torch.ones(len(labels), dtype=torch.bool)
        others[places] = False
        return torch.cat([made, images[others]]), torch.cat([given, labels[others]])

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest | None:
        """The first samples, once."""
        if view.times:
            return None
        chosen = tuple(range(min(view.requests, len(labels))))
        return UnlearningRequest(view.client, chosen, self.reason)
