"""Forgetting by training again: exact, and the control that every other mechanism is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from fedattack.errors import RunFailed
from fedattack.unlearning.mechanism import Forgotten, Mechanism, RetrainFunction, ServerMemory, merged
from fedattack.unlearning.requests import Deletion


class Retrain(Mechanism):
    """Train again without the samples, from the last checkpoint that cannot know them.

    That is the newest checkpoint older than the first round in which any affected client took part: which of
    its samples a client used in a round, the server does not know. The result never saw the samples, so
    forgetting is exact by construction (Bourtoule et al., "Machine unlearning", IEEE S&P 2021); the price is
    the rounds. What clients or strategy carry from round to round (error-feedback residuals, server momentum)
    starts afresh at the checkpoint, because what was carried may know the samples too.
    """

    def forget(
        self, deletions: Sequence[Deletion], memory: ServerMemory, retrain: RetrainFunction
    ) -> Forgotten:
        """Forget the samples of `deletions`; see :meth:`Mechanism.forget`.

        Clients that never took part cost no round: the model cannot know their samples.

        Raises
        ------
        RunFailed
            If no checkpoint is old enough.
        """
        excluded = merged(memory.excluded, deletions)
        entered = [memory.first_rounds[d.client] for d in deletions if d.client in memory.first_rounds]
        if not entered:
            return Forgotten(memory.weights, excluded, resumed_after=memory.rounds, rounds_trained=0)
        kept = [round_number for round_number in memory.checkpoints if round_number < min(entered)]
        if not kept:
            raise RunFailed(
                f"cannot forget by retraining: no checkpoint is older than round {min(entered)} "
                f"(kept: {sorted(memory.checkpoints) or 'none'}); the initial model counts as round 0"
            )
        start = max(kept)
        weights = {name: tensor.clone() for name, tensor in memory.checkpoints[start].items()}
        return Forgotten(retrain(excluded, weights, start + 1), excluded, start, memory.rounds - start)
