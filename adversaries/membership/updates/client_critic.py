"""A client's critic against the mean of the others'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.membership.base import RoundStatistic
from adversaries.membership.view import RoundView
from adversaries.needs import Needs


@dataclass
class ClientCritic(RoundStatistic):
    """Each client's critic, standardised over the candidates, minus the mean of the others', summed over rounds.

    A critic that was trained on an image scores it higher than the others' do, whose scores tell what an image that
    nobody knows is worth; LOGAN's white-box attack (Hayes et al., PoPETs 2019) with the other clients as reference.
    """

    needs: ClassVar[Needs] = Needs(sums="single", held_out=True, clients=2, trains="generate", critic=True)

    def measure(self, view: RoundView) -> Tensor:
        """The differences, (K, N)."""
        scores = torch.stack([view.critic(client) for client in view.clients])
        if len(scores) < 2:
            return scores
        return scores - (scores.sum(0) - scores) / (len(scores) - 1)

    def combine(self, rounds: Tensor) -> Tensor:
        """Their sum."""
        return rounds.sum(0)
