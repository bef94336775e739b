"""Cosine between a candidate's gradient and a client's last update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adversaries.membership.base import RoundStatistic
from adversaries.membership.view import RoundView
from adversaries.needs import Needs


@dataclass
class GradCosine(RoundStatistic):
    """Grad-Cosine (Li et al., ICLR 2023): ``cos(g_x, u)`` in the last round that the target answered.

    ``g_x`` is the candidate's gradient at the weights sent out, ``u`` the update with the sign of a gradient.
    """

    needs: ClassVar[Needs] = Needs(sums="any", held_out=True)

    def measure(self, view: RoundView) -> Tensor:
        """The cosines."""
        return view.cosines

    def combine(self, rounds: Tensor) -> Tensor:
        """The last round's."""
        return rounds[-1]
