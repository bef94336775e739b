"""The loss of the candidate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import BlackBox, log_confidence


@dataclass
class LossThreshold(BlackBox):
    """Minus the cross-entropy: members were fitted (Yeom et al., CSF 2018).

    Ranks as the confidence in the label does.
    """

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """``log p_y``."""
        return log_confidence(logits, knowledge.candidates.labels)
