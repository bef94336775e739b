"""How far a client's training lowered a candidate's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adversaries.membership.base import RoundStatistic
from adversaries.membership.view import RoundView
from adversaries.needs import Needs


@dataclass
class LossDrop(RoundStatistic):
    """Loss of the model sent out minus that of the client's own model: ``L(x; w) - L(x; w_k)``, meaned over rounds.

    The client's model is the weights sent out moved by its update; entries that were not sent stay. The loss at the
    weights sent out calibrates what a hard sample costs, as a reference model would (Watson et al., ICLR 2022).
    """

    needs: ClassVar[Needs] = Needs(sums="single", held_out=True)

    def measure(self, view: RoundView) -> Tensor:
        """The drops."""
        return view.sent_losses - view.client_losses
