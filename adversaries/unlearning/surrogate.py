"""A model of the client's own, trained on a part of its samples: all that a client without access can rank by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from adversaries.seats import ClientView
from adversaries.unlearning.base import UnlearningAttack
from fedattack.models import build_model, initial_weights
from fedattack.training import load_weights, train_alone


@dataclass
class SurrogateAttack(UnlearningAttack):
    """Asks by what a model of its own says, which it trains as agreed.

    Parameters
    ----------
    share : float
        Part of its samples that its model is trained on.
    epochs : int
        Passes of that training.
    """

    access: ClassVar[Literal["weights", "queries", "none"]] = "none"

    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    epochs: Annotated[int, Field(ge=1)] = 30

    def surrogate(self, view: ClientView, images: Tensor, labels: Tensor) -> tuple[nn.Module, Tensor]:
        """The model, in evaluation mode, and the positions that it was not trained on, int64, ascending.

        Weights and draws are of the client's own stream. With one sample, it is trained on that one, and asks for it.
        """
        count = len(labels)
        some = min(max(1, round(self.share * count)), max(1, count - 1))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(view.seed))
        own, rest = order[:some].sort().values, order[some:].sort().values
        model = trained(view, images[own], labels[own], self.epochs)
        return model, rest if len(rest) else own


def trained(view: ClientView, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """The agreed model trained on some samples as agreed, for so many passes over them; in evaluation mode."""
    agreed = view.scenario.training
    steps = -(-len(labels) // agreed.batch_size) if agreed.batch_size else 1
    rounds = epochs
    if agreed.protocol == "fedsgd":  # one step a round
        rounds, steps = epochs * steps, 1
    training = agreed.model_copy(update={"local_steps": steps, "local_epochs": None})
    scenario = replace(view.scenario, training=training)
    model = build_model(view.scenario.model)
    first = initial_weights(view.scenario.model, view.seed)
    weights = train_alone(model, first, images, labels, scenario, rounds, view.seed)
    load_weights(model, weights)
    return model.eval()
