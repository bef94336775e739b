"""Forgetting a client by having it climb its own loss, inside a ball around what the others made."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from fedattack.errors import NotApplicable, RunFailed
from fedattack.models import build_model, initial_weights
from fedattack.observation import Scenario
from fedattack.task import tied_names, trained_parameters
from fedattack.unlearning.averaging import flat, moved, stepped, told
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.mechanism import Excluded, Forgotten, Level, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion


@dataclass
class ProjectedAscent(Mechanism):
    """Projected gradient ascent (Halimi et al., How to efficiently erase a client in FL, 2022).

    From w_ref, the mean of the other clients' models in the last kept round (after an earlier request the model as it
    is, which alone has forgotten that), the leaving client climbs its loss,
    ``w <- P(w + rate * gradient)`` with P the projection onto the ball of `radius` around w_ref, until its accuracy
    falls below `stop`; then the others train the last `rounds` rounds again, from there. It forgets whole clients,
    who must take part, and needs at least two. Each step goes to the client and back, and so costs a round.

    Parameters
    ----------
    rate : float
        Size of the steps upwards.
    clip : float
        Largest length of a gradient.
    radius : float, optional
        Of the ball; None: a third of the mean distance from w_ref to ten untrained models.
    stop : float
        Accuracy of the client, in [0, 1], below which it has forgotten.
    steps : int
        Most steps upwards.
    rounds : int
        Rounds that the others train afterwards.
    """

    keeps = frozenset({"checkpoints", "updates"})
    levels = frozenset[Level]({"client"})
    rate: Annotated[float, Field(gt=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 5.0
    radius: Annotated[float, Field(gt=0)] | None = None
    stop: Annotated[float, Field(ge=0, le=1)] = 0.12
    steps: Annotated[int, Field(ge=1)] = 60
    rounds: Annotated[int, Field(ge=0)] = 4

    def check(self, name: str, scenario: Scenario, clients: int) -> None:
        """Besides what every mechanism refuses, a single client: nobody would be left."""
        super().check(name, scenario, clients)
        if clients < 2:
            raise NotApplicable(
                f"setting 'unlearning.mechanism' = {name!r} forgets whole clients, and there is one; use several"
            )

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget the clients of `deletions`; see :meth:`Mechanism.forget`."""
        excluded = merged(history.excluded, deletions)
        if history.ignorant(excluded) is None:
            return Forgotten(history.weights, excluded, resumed_after=history.rounds)
        model, leaving = build_model(history.scenario.model), sorted({one.client for one in deletions})
        names, tied = tuple(trained_parameters(model)), tied_names(model)
        reference = history.weights if history.excluded else self._others(history, excluded, tied)
        centre, radius = flat(reference, names), self.radius
        if radius is None:
            untrained = (initial_weights(history.scenario.model, seed) for seed in range(10))
            radius = statistics.fmean(float((flat(one, names) - centre).norm()) for one in untrained) / 3
        weights, taken = reference, 0
        while taken < self.steps and self._remembers(trainer.evaluate(weights, leaving)):
            answers = list(trainer.gradients(history.excluded, weights, history.rounds, clients=leaving))
            if not answers:
                break
            slope = torch.stack([flat(one.change, names) for one in answers]).mean(0)
            slope = slope * min(1.0, self.clip / max(float(slope.norm()), 1e-12))
            offset = flat(weights, names) + self.rate * slope - centre
            offset = offset * min(1.0, radius / max(float(offset.norm()), 1e-12))
            weights, taken = stepped(reference, offset, names, tied), taken + 1
        resumed = max(0, history.rounds - self.rounds)
        if self.rounds:
            weights = trainer.train(excluded, weights, resumed + 1)
        details = {
            "steps": taken,
            "radius": radius,
            "distance": float((flat(weights, names) - centre).norm()),
        }
        return Forgotten(weights, excluded, resumed, details=details | told(history.scenario, "the ascent"))

    def _others(self, history: History, excluded: Excluded, tied: Mapping[str, str]) -> Weights:
        """The mean of the other clients' models in the last kept round."""
        last = history.update_rounds_after(0)[-1]
        others = [update for update in history.updates(last) if update.client not in excluded]
        if not others:
            raise RunFailed(f"cannot forget: nobody else took part in round {last}, the last that was kept")
        return moved(history.checkpoint(last - 1), others, tied)

    def _remembers(self, figures: dict[int, dict[str, float]]) -> bool:
        """Whether a leaving client's accuracy is not below :attr:`stop`; a task without one never stops."""
        return any(one.get("accuracy", 1.0) >= self.stop for one in figures.values())
