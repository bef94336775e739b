"""Gradient ascent by a client: what others trained on, they pull back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.membership.base import MembershipAttack
from adversaries.membership.raising import in_turn, raise_losses
from adversaries.needs import Needs
from adversaries.seats import ClientView, MaliciousClient
from fedattack.config import Positive, Strength
from fedattack.models import build_model
from fedattack.observation import Candidates
from fedattack.training import sample_losses, weight_step


@dataclass
class AscentClient(MaliciousClient, MembershipAttack):
    """Gradient ascent by a client (Nasr et al., S&P 2019), which adds its push to the update that it sends.

    Every second time that it is drawn, it pushes the global model towards weights under which a part of the
    candidates is predicted worse (:func:`~adversaries.membership.raising.raise_losses`); in between it sends its
    honest update, and the others pull back what they train on. The score is the fall of a candidate's loss from
    one model that it is sent to the next, over the rounds in which it did not push, standardised among the
    candidates raised before, and among the others, and averaged.

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

    rise: Strength = 4.0
    parts: Positive = 4
    boost: Strength = 10.0

    keeps_memory = True
    asks_early = True
    needs: ClassVar[Needs] = Needs(held_out=True, others=True)

    def see(self, view: ClientView) -> None:
        """Keep the candidates' losses under the model it is sent: "losses", float64 (T, N)."""
        assert view.question is not None
        model, question = build_model(view.scenario.model).eval(), view.question
        found = sample_losses(model, view.weights, question.images, question.labels)[None]
        view.memory["losses"] = torch.cat([view.memory.get("losses", found[:0]), found])

    def reply(self, view: ClientView, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """The honest update, and in every second of its rounds the push."""
        assert view.question is not None
        times = len(view.memory["losses"]) - 1
        if times % 2:
            return update
        chosen = in_turn(len(view.question.labels), self.parts, times // 2)
        weights = {name: tensor.clone() for name, tensor in view.weights.items()}
        raised = raise_losses(view.scenario.model, weights, view.question, self.rise * chosen, view.seed)
        kind = "gradient" if view.scenario.training.protocol == "fedsgd" else "delta"
        scale = self.boost / weight_step(view.scenario.training, kind)
        return {name: sent + scale * (raised[name] - weights[name]) for name, sent in update.items()}

    def answer(self, view: ClientView, question: Candidates) -> dict[str, Tensor]:
        """ "scores", float64 (N,)."""
        model = build_model(view.scenario.model).eval()
        last = sample_losses(model, view.weights, question.images, question.labels)[None]
        losses = torch.cat([view.memory.get("losses", last[:0]), last])
        scores = torch.zeros(len(question.labels), dtype=torch.float64)
        for time in range(
            1, len(losses) - 1, 2
        ):  # the model after its first, third, ... push, and the next one
            fall = losses[time] - losses[time + 1]
            raised = in_turn(len(fall), self.parts, time // 2)
            for group in (raised, ~raised):
                if group.sum() > 1:
                    spread = fall[group].std().clamp_min(1e-12)
                    scores[group] += (fall[group] - fall[group].mean()) / spread
        return {"scores": scores}
