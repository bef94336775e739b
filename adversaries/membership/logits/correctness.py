"""Whether the candidate is classified rightly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import BlackBox


@dataclass
class Correctness(BlackBox):
    """The gap attack: a member is who is classified rightly (Yeom et al., CSF 2018)."""

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """1 where the largest logit is the label's, else 0."""
        return (logits.argmax(-1) == knowledge.candidates.labels).double()
