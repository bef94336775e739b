"""Mean cosine between a candidate's gradient and a client's updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adversaries.membership.base import RoundStatistic
from adversaries.membership.view import RoundView
from adversaries.needs import Needs


@dataclass
class AvgCosine(RoundStatistic):
    """Avg-Cosine (Li et al., ICLR 2023): the mean over rounds of ``cos(g_x, u)``.

    ``g_x`` is the candidate's gradient at the weights sent out, ``u`` the update with the sign of a gradient. A
    sparse update counts as zero where nothing was sent, and the whole gradient's norm is divided by.
    """

    needs: ClassVar[Needs] = Needs(sums="any", held_out=True)

    def measure(self, view: RoundView) -> Tensor:
        """The cosines."""
        return view.cosines
