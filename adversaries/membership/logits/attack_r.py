"""The candidate's loss among those under reference models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.logits.base import BlackBox, known, log_confidence, outside_alone
from adversaries.needs import Needs


@dataclass
class AttackR(BlackBox):
    """Share of the references under which the candidate's loss is no smaller (Ye et al., Attack R, CCS 2022).

    Counted are those that did not train on it; with n of them the score has n + 1 values, and many ties.
    """

    needs: ClassVar[Needs] = Needs(held_out=True, about="anybody", references=1)

    def signal(self, logits: Tensor, knowledge: Knowledge, public: Tensor) -> Tensor:
        """``P_r[L_r(x) >= L(x)]`` in [0, 1], an empirical share."""
        references, labels = known(knowledge), knowledge.candidates.labels
        harder = log_confidence(references.logits, labels) <= log_confidence(logits, labels)
        return outside_alone(harder.double(), references.trained_on, probability=True)
