"""How sure the model is, whatever the label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import BlackBox


@dataclass
class Entropy(BlackBox):
    """Sureness of the answer, which needs no label (Salem et al., adversary 3, NDSS 2019).

    Parameters
    ----------
    statistic : {"entropy", "max-confidence"}
        Minus the entropy of the posterior, or its largest entry.
    """

    statistic: Literal["entropy", "max-confidence"] = "entropy"

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """``sum p log p``, or ``max p``."""
        posterior = logits.softmax(-1)
        return -torch.special.entr(posterior).sum(-1) if self.statistic == "entropy" else posterior.amax(-1)
