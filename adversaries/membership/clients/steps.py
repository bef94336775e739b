"""What a client reads in the steps from one global model that it is sent to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.membership.base import MembershipAttack
from adversaries.membership.raising import accounted_for
from adversaries.needs import Needs
from adversaries.seats import ClientView, MaliciousClient
from fedattack.observation import Candidates

_SENT = "sent "


@dataclass
class ReadsSteps(MaliciousClient, MembershipAttack):
    """Base of a client's attacks that explain steps of the global model by the candidates' gradients.

    A step holds what all clients of a round sent, averaged (of several rounds, where the client was not drawn in
    between). Each is explained by all candidates at once (:func:`~adversaries.membership.raising.accounted_for`);
    the score is the sum of a candidate's shares. One model is kept from round to round, and one figure a candidate.
    """

    keeps_memory = True
    asks_early = True
    needs: ClassVar[Needs] = Needs(held_out=True, others=True)

    def reads(self, time: int) -> bool:
        """Whether the step from the `time`-th model that it was sent, from 0, counts; overridden."""
        return True

    def see(self, view: ClientView) -> None:
        """Read the step that led to this model, and keep the model."""
        assert view.question is not None, "asks_early"
        self._read(view, view.question)
        times = view.memory.get("times", torch.zeros(1, dtype=torch.int64)) + 1
        view.memory.update({"times": times} | {_SENT + name: one for name, one in view.weights.items()})

    def answer(self, view: ClientView, question: Candidates) -> dict[str, Tensor]:
        """ "scores", float64 (N,); zeros if it was never drawn."""
        self._read(view, question)
        return {"scores": view.memory.get("shares", torch.zeros(len(question.labels), dtype=torch.float64))}

    def _read(self, view: ClientView, question: Candidates) -> None:
        memory = view.memory
        sent = {name.removeprefix(_SENT): one for name, one in memory.items() if name.startswith(_SENT)}
        if sent and self.reads(int(memory["times"]) - 1):
            shares = accounted_for(view.scenario.model, sent, view.weights, question, view.seed)
            memory["shares"] = memory.get("shares", torch.zeros_like(shares)) + shares
