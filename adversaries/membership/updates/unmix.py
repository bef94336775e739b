"""An update explained by all candidates at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.membership.base import RoundStatistic
from adversaries.membership.view import RoundView
from adversaries.needs import Needs
from fedattack.config import Strength


@dataclass
class Unmix(RoundStatistic):
    """Ridge regression of the update on the gradients of all candidates and public samples at once.

    ``a = (G + l I)^-1 b`` with ``G = <g_i, g_j>`` among the samples' unit gradients at the weights sent out, and
    ``b = <g_i, u>`` with the unit update; the score of i is the mean over rounds of ``a_i``. On a sparse update all
    inner products are over the sent entries, and l is multiplied by the median of G's diagonal. Where correlation
    sees what alike samples share, the coefficients tell them apart.

    Parameters
    ----------
    damping : float or None
        The l; None: 0.01, and 0.03 on sparse updates.
    """

    damping: Strength | None = None

    needs: ClassVar[Needs] = Needs(held_out=True, helped=True)

    def measure(self, view: RoundView) -> Tensor:
        """The candidates' coefficients."""
        found = torch.empty(len(view.clients), len(view.candidates.labels), dtype=torch.float64)
        for system in view.systems():
            factor = torch.linalg.cholesky(system.damped(self.damping))
            solved = torch.cholesky_solve(system.products.T, factor)
            found[system.rows] = solved.T[:, : found.shape[1]]
        return found
