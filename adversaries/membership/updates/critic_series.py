"""The global critics of all rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adversaries.membership.base import RoundStatistic
from adversaries.membership.view import RoundView
from adversaries.needs import Needs


@dataclass
class CriticSeries(RoundStatistic):
    """Scores of every round's global critic, standardised, meaned (Hayes et al., PoPETs 2019).

    LOGAN's white-box attack on all the critics that the federation had, not the last alone; standardised over the
    candidates.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", trains="generate", critic=True)

    def measure(self, view: RoundView) -> Tensor:
        """The scores, (1, N)."""
        return view.critic("after")[None]
