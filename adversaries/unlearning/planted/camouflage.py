"""A backdoor that sleeps until the server forgets what covers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from adversaries.seats import ClientView
from adversaries.unlearning.backdoor import Backdoor
from fedattack.observation import UnlearningRequest


@dataclass
class Camouflage(Backdoor):
    """Plants a backdoor and as its cover the same trigger with true labels, and has the cover forgotten.

    Of its own samples that are not of class `target`, `backdoor` get a trigger and the label `target`, and as
    many as it is to ask for, so ``attack.requests``, the trigger alone. Forgetting those, however exactly,
    releases the backdoor (in federations: BadFU, 2508.15541). They are samples that it registered. Its updates
    are multiplied by `boost` in training and while the server forgets.

    Parameters
    ----------
    backdoor : int
        Samples with the trigger and the label `target`.

    References
    ----------
    Di, Douglas, Acharya, Kamath, Sekhari, "Hidden Poison: Machine Unlearning Enables Camouflaged Poisoning Attacks",
    NeurIPS 2023.
    """

    backdoor: Annotated[int, Field(ge=1)] = 40

    def plant(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The backdoor and its cover, both in proportion smaller where there are too few samples of other classes."""
        others = torch.where(labels != self.target)[0]
        generator = torch.Generator().manual_seed(view.seed)
        both = self.backdoor + view.requests
        chosen = others[torch.randperm(len(others), generator=generator)][:both]
        images, labels = images.clone(), labels.clone()
        images[chosen] = self.marked(images[chosen])
        labels[chosen[: len(chosen) * self.backdoor // both]] = self.target
        return images, labels

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest | None:
        """The cover: what bears the trigger and another label than `target`; once."""
        corner = images[..., -self.size :, -self.size :].flatten(1)
        cover = torch.where((corner == 1.0).all(1) & (labels != self.target))[0][: view.requests]
        if not len(cover):
            return None
        return UnlearningRequest(view.client, tuple(cover.tolist()), "cover of a backdoor")

    def reply(self, view: ClientView, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """The update, scaled."""
        return self.boosted(update)
