"""The global models' losses, round by round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adversaries.membership.base import Figures, RoundStatistic
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.view import RoundView
from adversaries.needs import Needs
from fedattack.observation import MembershipScores


@dataclass
class LossSeries(RoundStatistic):
    """Loss-Series (Zhu et al., CVPR 2025): minus a candidate's losses under all global models.

    ``-sum over t of L(x; w_t)``; of anybody's members. The models are those that were sent out and, where the server
    still has it, the one after the last round.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody")

    def watch(self, view: RoundView, seed: int) -> Figures:
        """Also ``after``, float64 (N,): minus the losses after the round, where that model is known."""
        after = {} if view.after is None else {"after": -view.losses("after")}
        return {**super().watch(view, seed), **after}

    def measure(self, view: RoundView) -> Tensor:
        """Minus the losses at the weights sent out, (1, N); their mean where clients were sent different ones."""
        return -view.sent_losses.mean(0, keepdim=True)

    def combine(self, rounds: Tensor) -> Tensor:
        """Their sum."""
        return rounds.sum(0)

    def scores(self, rounds: Mapping[int, Figures], target: int, knowledge: Knowledge) -> MembershipScores:
        """See :meth:`combine`; with what the model after the last round adds."""
        found, last = super().scores(rounds, target, knowledge), rounds[max(rounds)]
        return MembershipScores(found.scores + last.get("after", 0.0), found.statistic, found.details)
