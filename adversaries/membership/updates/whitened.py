"""The matched filter for a candidate's gradient among gradients like the public ones."""

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
class Whitened(RoundStatistic):
    """Matched filter for a known signal in Gaussian noise whose covariance is that of public gradients.

    Of m public samples with Gram matrix P and inner products Q with the candidates (all of unit gradients at the
    weights sent out), M = (P + l I)^-1 and the products b with the unit update, the score is the mean over rounds of
    ``(b_i - q_i M b_public) / sqrt(G_ii - q_i M q_i^T)``: what is left of a candidate where public gradients do not
    reach. Kin of GLiR (Leemann, Pawelczyk, Kasneci, NeurIPS 2023). Sparse updates as :class:`.unmix.Unmix` has them.

    Parameters
    ----------
    damping : float or None
        The l; None: 0.01, and 0.03 on sparse updates.
    """

    damping: Strength | None = None

    needs: ClassVar[Needs] = Needs(held_out=True, auxiliary=2, labelled=True)

    def measure(self, view: RoundView) -> Tensor:
        """The quotients."""
        count = len(view.candidates.labels)
        found = torch.empty(len(view.clients), count, dtype=torch.float64)
        for system in view.systems():
            factor = torch.linalg.cholesky(system.damped(self.damping)[count:, count:])
            reach = torch.cholesky_solve(system.gram[count:, :count], factor)  # M Q^T
            signal = system.products[:, :count] - system.products[:, count:] @ reach
            noise = system.gram.diagonal()[:count] - (system.gram[count:, :count] * reach).sum(0)
            found[system.rows] = signal / noise.clamp_min(1e-12).sqrt()
        return found
