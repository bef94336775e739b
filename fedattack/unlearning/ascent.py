"""Forgetting by climbing the loss of what is to be forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedattack.unlearning.steps import Models, Rate, Steps, Term, TermMechanism


@dataclass
class Ascent(TermMechanism):
    """A few steps of gradient ascent on the forgotten samples; unbounded, so that many steps destroy the model.

    (Golatkar et al., CVPR 2020, baseline "negative gradient"; Graves et al., Amnesiac machine learning, AAAI 2021.)
    """

    steps: Steps = 5
    rate: Rate | None = 0.01

    def terms(self, models: Models) -> Sequence[Term]:
        """The mean loss of the forgotten, turned round."""
        return [Term(models.forgotten, -1.0)]
