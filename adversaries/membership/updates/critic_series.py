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
    """Scores of the global critic after each round, standardised over the candidates, meaned over rounds.

    LOGAN's white-box attack (Hayes et al., PoPETs 2019) on every critic that the federation had, not the last alone.
    """

    needs: ClassVar[Needs] = Needs(sums="any", held_out=True, about="anybody", trains="generate", critic=True)

    def measure(self, view: RoundView) -> Tensor:
        """The scores, (1, N)."""
        return view.critic("after")[None]
