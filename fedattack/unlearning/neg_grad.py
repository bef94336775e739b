"""Forgetting by descent on the retained and ascent on the forgotten at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedattack.unlearning.steps import Models, Term, TermMechanism


@dataclass
class NegGradPlus(TermMechanism):
    """NegGrad+: ``alpha * loss(retained) - (1 - alpha) * loss(forgotten)``.

    (Kurmanji et al., Towards unbounded machine unlearning, NeurIPS 2023, section 4.)

    Parameters
    ----------
    alpha : float
        Weight of the retained, in [0, 1].
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.95

    def terms(self, models: Models) -> Sequence[Term]:
        """Both mean losses."""
        return [Term(models.retained, self.alpha), Term(models.forgotten, self.alpha - 1.0)]
