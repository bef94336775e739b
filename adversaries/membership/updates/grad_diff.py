"""What a candidate's gradient takes off the length of a client's update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adversaries.membership.base import RoundStatistic
from adversaries.membership.view import RoundView
from adversaries.needs import Needs


@dataclass
class GradDiff(RoundStatistic):
    """Grad-Diff (Li et al., ICLR 2023): the mean over rounds of ``|u|^2 - |u - g_x|^2 = 2 <u, g_x> - |g_x|^2``.

    ``g_x`` is the candidate's gradient at the weights sent out, ``u`` the update with the sign of a gradient, as long
    as it was sent: a weight delta is the sum of its steps times the learning rate.
    """

    needs: ClassVar[Needs] = Needs(sums="any", held_out=True)

    def measure(self, view: RoundView) -> Tensor:
        """The differences of squared lengths."""
        return 2 * view.products - view.norms.square()
