"""Whose sample it is, by the clients' own models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.membership.base import RoundStatistic
from adversaries.membership.view import RoundView
from adversaries.needs import Needs


@dataclass
class SourceInference(RoundStatistic):
    """Source inference (Hu et al., ICDM 2021): of the clients, the one whose own model has the lowest loss has it.

    The score of client k is by how much it is the one, ``min over others j of L(x; w_j) - L(x; w_k)``, meaned over
    rounds: positive for one client at most.
    """

    needs: ClassVar[Needs] = Needs(sums="single", held_out=True, clients=2)

    def measure(self, view: RoundView) -> Tensor:
        """The margins; without rows where one client alone answered."""
        losses = view.client_losses
        if len(losses) < 2:
            return losses[:0]
        (least, second), (first, _) = losses.topk(2, dim=0, largest=False)
        return torch.where(torch.arange(len(losses))[:, None] == first, second, least) - losses
