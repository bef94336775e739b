"""Gradient ascent by the server: what a client trained on, it pulls back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adversaries.membership.base import RoundStatistic
from adversaries.membership.raising import in_turn, raise_losses
from adversaries.membership.view import RoundView
from adversaries.needs import Needs
from adversaries.seats import MaliciousServer
from fedattack.config import Positive, Strength
from fedattack.errors import NotApplicable
from fedattack.observation import Auxiliary, Candidates, Scenario


@dataclass
class Ascent(MaliciousServer, RoundStatistic):
    """Gradient ascent by a server (Nasr et al., S&P 2019), on one part of the candidates in each armed round.

    In an armed round the losses of a part of the candidates are raised, and those of all others held
    (:func:`~adversaries.membership.raising.raise_losses`); clients that train on a sample pull it back. A
    candidate's statistic is the fall of its loss from the armed weights to the client's own model, minus the mean
    fall at the other clients, to whom it was as hard. The score is the mean over all armed rounds: raised or not,
    a candidate is seen among other gradients in each of them. Armed rounds are not aggregated: the federation
    loses them, and its model is as good as if they had not been; passive attacks of the same run read them too.

    CIFAR-10 cut, ``mlp`` of 128, 10 clients x 200, 22 rounds and 8 armed ones, three seeds: AUC .767, .712, .741;
    loss-drop of the same run .609, .628, .625 (difference .119, 95 % .085 to .157), FedMIA-I .731, .731, .706
    (.017, 95 % -.001 to .042: not surely better than the passive attack that also compares with other clients). Two
    of the seeds were seen before the last change; the third, .741, was not.
    Plain ascent along the sum of the gradients did no better than no ascent.

    Parameters
    ----------
    rise : float
        By how many nats the losses are raised.
    parts : int
        In how many parts the candidates are raised, in turn; 1: all in every armed round. With fewer armed rounds
        than parts some are never raised.
    """

    rise: Strength = 4.0
    parts: Positive = 4

    needs: ClassVar[Needs] = Needs(sums="single", held_out=True, clients=2)

    def arm(
        self,
        scenario: Scenario,
        weights: dict[str, Tensor],
        seed: int,
        auxiliary: Auxiliary | None,
        candidates: Candidates | None = None,
        turn: int = 0,
    ) -> dict[str, Tensor]:
        """The global model, to which this turn's candidates are harder."""
        if candidates is None:
            raise NotApplicable("ascent: no candidate to ask about")
        rise = self.rise * in_turn(len(candidates.labels), self.parts, turn)
        return raise_losses(scenario.model, weights, candidates, rise, seed)

    def measure(self, view: RoundView) -> Tensor:
        """Falls of the candidates' losses, less the mean of the other clients'; no rows where one client answered."""
        falls = view.sent_losses - view.client_losses
        count = len(view.clients)
        return (falls - falls.mean(0)) * count / (count - 1) if count > 1 else falls[:0]
