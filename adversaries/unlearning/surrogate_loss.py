"""Deletion requests ordered by the loss of a model of the client's own (black box)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from adversaries.seats import ClientView
from adversaries.unlearning.surrogate import SurrogateAttack
from fedattack.observation import UnlearningRequest
from fedattack.training import sample_losses


@dataclass
class SurrogateLoss(SurrogateAttack):
    """Asks to forget those of its samples on which a model of its own does worst, trained on its other samples.

    True black box: samples that a model has not seen and gets wrong are hard for other models too. All are samples
    that the client registered, with their labels, so that no check of membership sees anything.

    Parameters
    ----------
    queries : int
        So many of the first in this order are put in the order of the loss that the global model's answers show.
    """

    access: ClassVar[Literal["weights", "queries", "none"]] = "queries"

    queries: Annotated[int, Field(ge=0)] = 0

    def query_limit(self) -> int:
        """The `queries`."""
        return self.queries

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        """At most `view.requests` samples that the surrogate was not trained on."""
        model, rest = self.surrogate(view, images, labels)
        losses = sample_losses(model, model.state_dict(), images[rest], labels[rest])
        order = rest[torch.argsort(losses, descending=True, stable=True)]
        if self.queries:
            assert view.oracle is not None, "its access is by queries"
            first = order[: self.queries]
            right = view.oracle(images[first]).double().gather(1, labels[first, None])[:, 0]
            order = torch.cat([first[torch.argsort(right, stable=True)], order[self.queries :]])
        return UnlearningRequest(view.client, tuple(order[: view.requests].tolist()), "own model's loss")
