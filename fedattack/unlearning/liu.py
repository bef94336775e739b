"""Forgetting by training again with steps that the diagonal of the Fisher information makes longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from fedattack.models import build_model
from fedattack.task import tied_names, trained_parameters
from fedattack.unlearning.averaging import flat, stepped, told
from fedattack.unlearning.history import History
from fedattack.unlearning.mechanism import Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion


@dataclass
class RapidRetraining(Mechanism):
    """Rapid retraining (Liu et al., The right to be forgotten in federated learning, INFOCOM 2022).

    From the last model that cannot know the samples, `steps` times ``w <- w - rate * G^-1 D``: D is the mean gradient
    over the remaining samples, with momentum, and G the diagonal of the empirical Fisher information, estimated by
    the squares of the clients' gradients, raised to `power`, with momentum as in AdaHessian, and `damping` added.
    Published with steps that clients take on mini-batches; here the server takes them, on gradients over all that
    clients have left, and each costs a round: client steps are few, but each goes over all samples and is sent.
    BatchNorm's statistics stay as they were.

    Parameters
    ----------
    steps : int
        Steps, each one gradient of every client.
    rate : float
        Size of the steps.
    momentum : float
        Decay of the mean gradient, in [0, 1).
    fisher_momentum : float
        Decay of the Fisher information, in [0, 1).
    power : float
        Exponent of the Fisher information's diagonal, in (0, 1].
    damping : float
        Added to it.
    """

    keeps = frozenset({"checkpoints"})
    singles = True
    steps: Annotated[int, Field(ge=1)] = 50
    rate: Annotated[float, Field(gt=0)] = 0.02
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    fisher_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    power: Annotated[float, Field(gt=0, le=1)] = 0.5
    damping: Annotated[float, Field(gt=0)] = 1e-4

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget the samples of `deletions`; see :meth:`Mechanism.forget`."""
        excluded = merged(history.excluded, deletions)
        start = history.ignorant(excluded)
        if start is None:
            return Forgotten(history.weights, excluded, resumed_after=history.rounds)
        model, weights = build_model(history.scenario.model), history.checkpoint(start)
        names, tied = tuple(trained_parameters(model)), tied_names(model)
        size = sum(weights[name].numel() for name in names)
        slope, fisher = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for step in range(1, self.steps + 1):
            round = start + 1 + (step - 1) % (history.rounds - start)
            total, mean, squares = 0, torch.zeros_like(slope), torch.zeros_like(fisher)
            for one in trainer.gradients(excluded, weights, round):
                gradient, total = flat(one.change, names), total + one.examples
                mean, squares = mean + one.examples * gradient, squares + one.examples * gradient**2
            if not total:
                continue
            slope = self.momentum * slope + (1 - self.momentum) * mean / total
            fisher = self.fisher_momentum * fisher + (1 - self.fisher_momentum) * (squares / total) ** 2
            curved = (fisher / (1 - self.fisher_momentum**step)).sqrt() ** self.power
            forward = slope / (1 - self.momentum**step) / (curved + self.damping)
            weights = stepped(weights, -self.rate * forward, names, tied)
        return Forgotten(weights, excluded, start, details=told(history.scenario, "the Fisher information"))
