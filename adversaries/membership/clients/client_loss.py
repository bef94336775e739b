"""A client that compares the global models it is sent."""

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
class ClientLoss(MaliciousClient, MembershipAttack):
    """Passive attack of a client on all others (Nasr et al., S&P 2019), by the fall of the loss since it joined.

    The score is the candidate's cross-entropy under the first global model that the client was sent, minus
    that under the last one: members fall further. The first model stands for how hard a sample is in itself
    (difficulty calibration, Watson et al., ICLR 2022).

    Parameters
    ----------
    calibrate : bool
        False: minus the loss under the last model alone (Yeom et al., CSF 2018).
    """

    calibrate: bool = True

    keeps_memory = True
    needs: ClassVar[Needs] = Needs(held_out=True, others=True)

    def see(self, view: ClientView) -> None:
        """Keep the first model."""
        if self.calibrate and not view.memory:
            view.memory.update(view.weights)

    def answer(self, view: ClientView, question: Candidates) -> dict[str, Tensor]:
        """ "scores", float64 (N,)."""
        model = build_model(view.scenario.model).eval()
        scores = -sample_losses(model, view.weights, question.images, question.labels)
        if view.memory:  # else it was never drawn, and has but the last model
            scores += sample_losses(model, view.memory, question.images, question.labels)
        return {"scores": scores}
