"""How little a candidate would still move the global model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adversaries.membership.base import RoundStatistic
from adversaries.membership.view import RoundView
from adversaries.needs import Needs


@dataclass
class GradNorm(RoundStatistic):
    """Grad-Norm (Nasr et al., S&P 2019): minus the gradient's norm, ``-|g_x|``, meaned over rounds.

    The gradient is that of the cross-entropy at the weights sent out; no update is read, so that anybody's members
    are meant. Where clients were sent different weights, the mean over them counts.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody")

    def measure(self, view: RoundView) -> Tensor:
        """Minus the norms, (1, N)."""
        return -view.norms.mean(0, keepdim=True)
