"""Deletion requests chosen as a set, not sample by sample (black box)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from adversaries.membership.per_sample import Gradients, products
from adversaries.seats import ClientView
from adversaries.unlearning.surrogate import SurrogateAttack
from fedattack.observation import Candidates, UnlearningRequest, Update
from fedattack.task import trained_parameters
from fedattack.training import batch_gradient


@dataclass
class WorstSet(SurrogateAttack):
    """Asks to forget the set of its samples that does most harm together, built up on a model of its own.

    One after the other it takes the sample whose undoing, a step of gradient ascent, raises the loss of the model
    on the samples that it was not trained on most, to first order, and takes the step (the worst case, by a
    greedy search). Asked again after an answer, it chooses anew from what is left. All are samples that the
    client registered.

    Parameters
    ----------
    rate : float
        Of the step of gradient ascent that undoes a sample.

    References
    ----------
    Fan, Liu, Hero, Liu, "Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning", ECCV 2024.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    rate: Annotated[float, Field(gt=0)] = 0.1

    def ask(self, view: ClientView, images: Tensor, labels: Tensor) -> UnlearningRequest:
        """At most `view.requests` samples that the surrogate was not trained on."""
        model, rest = self.surrogate(view, images, labels)
        x, y = images[rest], labels[rest]
        parameters, chosen = trained_parameters(model), list[int]()
        for _ in range(min(view.requests, len(rest))):
            slopes = batch_gradient(model, x, y)[1]
            whole = torch.cat([slope.reshape(-1) for slope in slopes])
            shapes = tuple(tuple(slope.shape) for slope in slopes)
            wanted = Update(tuple(parameters), shapes, None, whole)
            scores = products(Gradients(model, model.state_dict(), Candidates(x, y)), [wanted])[0][0]
            scores[chosen] = -torch.inf
            chosen.append(int(scores.argmax()))
            _, undone = batch_gradient(model, x[chosen[-1:]], y[chosen[-1:]])
            with torch.no_grad():
                for parameter, slope in zip(parameters.values(), undone, strict=True):
                    parameter.add_(slope, alpha=self.rate)
        return UnlearningRequest(view.client, tuple(rest[chosen].tolist()), "worst set")
