"""Gradient ascent by a client: what others trained on, they pull back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adversaries.membership.clients.steps import ReadsSteps
from adversaries.membership.raising import in_turn, raise_losses
from adversaries.seats import ClientView
from fedattack.config import Positive, Strength
from fedattack.observation import UpdateKind
from fedattack.training import weight_step


@dataclass
class AscentClient(ReadsSteps):
    """Gradient ascent by a client (Nasr et al., S&P 2019), which adds its push to the update that it sends.

    Every second time that it is drawn, it pushes the global model towards weights under which a part of the
    candidates is predicted worse (:func:`~adversaries.membership.raising.raise_losses`); in between it sends its
    honest update, and the others pull back what they train on. Those steps are read (:class:`.steps.ReadsSteps`):
    the fall of a loss alone, as in the paper, tells nothing here, for in the mean of all clients a candidate's own
    pull is far smaller than what all samples have in common.

    Parameters
    ----------
    rise : float
        By how many nats the losses are to be raised.
    parts : int
        In how many parts the candidates are raised, in turn.
    boost : float
        What the push is multiplied by. Averaging divides it by the number of clients in a round, which a client is
        not told; with as much, the global model takes the whole push.
    """

    rise: Strength = 1.0
    parts: Positive = 2
    boost: Strength = 10.0

    def reads(self, time: int) -> bool:
        """Steps in which it did not push."""
        return time % 2 == 1

    def reply(self, view: ClientView, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """The honest update, and in every second of its rounds the push."""
        assert view.question is not None, "asks_early"
        time = int(view.memory["times"]) - 1
        if self.reads(time):
            return update
        rise = self.rise * in_turn(len(view.question.labels), self.parts, time // 2)
        raised = raise_losses(view.scenario.model, view.weights, view.question, rise, view.seed)
        kind: UpdateKind = "gradient" if view.scenario.training.protocol == "fedsgd" else "delta"
        scale = self.boost / weight_step(view.scenario.training, kind)
        return {name: one + scale * (raised[name] - view.weights[name]) for name, one in update.items()}
