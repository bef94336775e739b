"""A client that adds up the losses under every global model that it is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adversaries.membership.base import MembershipAttack
from adversaries.needs import Needs
from adversaries.seats import ClientView, MaliciousClient
from fedattack.models import build_model
from fedattack.observation import Candidates
from fedattack.training import sample_losses


@dataclass
class LossSeriesClient(MaliciousClient, MembershipAttack):
    """Loss series of a client (Nasr et al., S&P 2019): minus a candidate's losses under all models it was sent.

    Passive. The models are the global ones of the rounds in which the client was drawn, and the last one.
    """

    keeps_memory = True
    asks_early = True
    needs: ClassVar[Needs] = Needs(held_out=True, others=True)

    def see(self, view: ClientView) -> None:
        """Add this model's losses."""
        assert view.question is not None, "asks_early"
        view.memory["losses"] = view.memory.get("losses", 0.0) + _losses(view, view.question)

    def answer(self, view: ClientView, question: Candidates) -> dict[str, Tensor]:
        """ "scores", float64 (N,)."""
        return {"scores": -(view.memory.get("losses", 0.0) + _losses(view, question))}


def _losses(view: ClientView, question: Candidates) -> Tensor:
    """Under the model before it, (N,)."""
    model = build_model(view.scenario.model).eval()
    return sample_losses(model, view.weights, question.images, question.labels)
