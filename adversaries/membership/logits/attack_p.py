"""The candidate's loss among those of public samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import BlackBox, log_confidence
from adversaries.needs import Needs


@dataclass
class AttackP(BlackBox):
    """Share of the population with no smaller loss than the candidate (Ye et al., Attack P, CCS 2022)."""

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", auxiliary=1, labelled=True)

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """``P_z[L(z) >= L(x)]`` in [0, 1], an empirical share of the public samples z."""
        assert knowledge.public is not None
        population = log_confidence(public, knowledge.public.labels).sort().values
        own = log_confidence(logits, knowledge.candidates.labels)
        return torch.searchsorted(population, own, right=True).double() / len(population)
