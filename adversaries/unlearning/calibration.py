"""A client that is honest until the server forgets, and poisons the rounds in which it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from adversaries.needs import Needs
from adversaries.seats import ClientView
from adversaries.unlearning.backdoor import Backdoor
from fedattack.observation import UnlearningRequest


@dataclass
class Calibration(Backdoor):
    """Asks for any of its samples to be forgotten, and teaches a backdoor in the rounds in which the server does so.

    A server that calibrates kept updates, or trains again, has its clients work once more, and may watch them less.
    While its own request is carried out, some of the samples that it trains on get a trigger and the label `target`,
    and its updates are multiplied by `boost` (the moment of BadUnlearn, 2501.17396, whose clients hold the model near
    one that was poisoned before; here there is none).

    Parameters
    ----------
    share : float
        Part of the samples of a round that get the trigger.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, calibrates=True)

    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest | None:
        """Its first samples, once."""
        if view.times:
            return None
        return UnlearningRequest(view.client, tuple(range(min(view.requests, len(labels)))), "any samples")

    def poison(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Some of the samples with the trigger, in rounds of its own request."""
        if not self._asked_for(view):
            return images, labels
        generator = torch.Generator().manual_seed(view.seed)
        some = torch.randperm(len(labels), generator=generator)[: max(1, round(self.share * len(labels)))]
        images, labels = images.clone(), labels.clone()
        images[some], labels[some] = self.marked(images[some]), self.target
        return images, labels

    def reply(self, view: ClientView, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """The update, scaled in rounds of its own request."""
        return self.boosted(update) if self._asked_for(view) else update

    def _asked_for(self, view: ClientView) -> bool:
        """Whether the server forgets what this client asked for: it is told to leave it out."""
        return view.forgetting and set(range(view.requests)) <= set(view.excluded)
