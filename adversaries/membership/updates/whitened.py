"""The matched filter for a candidate's gradient among gradients like the public ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.membership.base import EquationStatistic
from adversaries.membership.view import System
from adversaries.needs import Needs
from fedattack.errors import NotApplicable


@dataclass
class Whitened(EquationStatistic):
    """Matched filter for a known signal in Gaussian noise whose covariance is that of public gradients.

    Of public samples with Gram matrix P and products Q with the candidates (unit gradients at the weights sent out),
    ``M = (P + l I)^-1`` and the products b with the unit update, the score is the mean over rounds of ``(b_i - q_i M
    b_public) / sqrt(G_ii - q_i M q_i^T)``: of a candidate what public gradients do not explain. Kin of GLiR (Leemann,
    Pawelczyk, Kasneci, NeurIPS 2023).
    """

    needs: ClassVar[Needs] = Needs(sums="any", held_out=True, auxiliary=2, labelled=True)

    def solve(self, system: System, count: int) -> Tensor:
        """The quotients."""
        if len(system.gram) == count:
            raise NotApplicable("no labelled public samples are granted; raise setting 'data.auxiliary_size'")
        factor = torch.linalg.cholesky(system.damped(self.damping)[count:, count:])
        cross = system.gram[count:, :count]
        reach = torch.cholesky_solve(cross, factor)
        signal = system.products[:, :count] - system.products[:, count:] @ reach
        noise = system.gram.diagonal()[:count] - (cross * reach).sum(0)
        return signal / noise.clamp_min(1e-12).sqrt()
