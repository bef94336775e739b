"""An update explained by all candidates at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.membership.base import EquationStatistic
from adversaries.membership.view import System
from adversaries.needs import Needs


@dataclass
class Unmix(EquationStatistic):
    """Ridge regression of the update on the gradients of all candidates and public samples at once.

    ``a = (G + l I)^-1 b`` with ``G = <g_i, g_j>`` among the samples' unit gradients at the weights sent out, and
    ``b = <g_i, u>`` with the unit update; the score of i is the mean over rounds of ``a_i``. On a sparse update all
    inner products are over the sent entries. Where correlation sees what alike samples share, the coefficients tell
    them apart.
    """

    needs: ClassVar[Needs] = Needs(sums="any", held_out=True, helped=True)

    def solve(self, system: System, count: int) -> Tensor:
        """The candidates' coefficients."""
        factor = torch.linalg.cholesky(system.damped(self.damping))
        return torch.cholesky_solve(system.products.T, factor).T[:, :count]
