"""Forgetting by training again: exact, and the control that every other mechanism is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedattack.unlearning.history import History
from fedattack.unlearning.mechanism import Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion


@dataclass
class Retrain(Mechanism):
    """Train again without the samples, from the last checkpoint that cannot know them.

    The result never saw the samples, so forgetting is exact by construction (Bourtoule et al., "Machine unlearning",
    IEEE S&P 2021); the price is the rounds. What clients or strategy carry from round to round (error-feedback
    residuals, server momentum) starts afresh at the checkpoint, because what was carried may know the samples too.
    """

    keeps = frozenset({"checkpoints"})

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`; clients that never took part cost no round: the model cannot know their samples."""
        excluded = merged(history.excluded, deletions)
        start = history.ignorant(excluded)
        if start is None:
            return Forgotten(history.weights, excluded, resumed_after=history.rounds)
        weights = trainer.train(excluded, history.checkpoint(start), start + 1)
        return Forgotten(weights, excluded, start)
