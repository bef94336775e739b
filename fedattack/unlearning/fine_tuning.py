"""Forgetting by training on: what is not repeated fades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedattack.unlearning.steps import Models, Term, TermMechanism


@dataclass
class FineTuning(TermMechanism):
    """Train on with the retained samples alone; relies on catastrophic forgetting, and guarantees nothing.

    (Golatkar et al., Eternal sunshine of the spotless net, CVPR 2020, baseline "fine-tune".)
    """

    def terms(self, models: Models) -> Sequence[Term]:
        """The mean loss of the retained."""
        return [Term(models.retained)]
