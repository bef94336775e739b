"""Forgetting by walking through the kept updates again, turned to where the remaining samples point now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from fedattack.models import build_model
from fedattack.task import tied_names
from fedattack.unlearning.averaging import length, moved
from fedattack.unlearning.history import ClientUpdate, History
from fedattack.unlearning.mechanism import Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion


@dataclass
class FedEraser(Mechanism):
    """FedEraser (Liu et al., IWQoS 2021): the length of the kept update, the direction of a short new one.

    From the last model that cannot know the samples, each kept round is taken again: the clients train shortly on
    what they have left, and the model moves by the mean, weighted by examples, of ``|U_k| * V_k / |V_k|``, U_k the
    kept update of client k and V_k its new one. The first of these rounds starts from weights that have not changed,
    so the kept updates of the unaffected clients are taken as they are, at no cost. Rounds that were not kept are
    left out, as are clients without samples. Of the forgotten samples the lengths of their owner's updates remain,
    one number for each kept round. A strategy other than the weighted mean is not followed.

    Parameters
    ----------
    calibration : float
        Share of the agreed local steps that a calibrating client takes, in (0, 1]; at least one step.
    """

    keeps = frozenset({"checkpoints", "updates"})
    calibration: Annotated[float, Field(gt=0, le=1)] = 0.5

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget the samples of `deletions`; see :meth:`Mechanism.forget`."""
        excluded = merged(history.excluded, deletions)
        start = history.ignorant(excluded)
        if start is None:
            return Forgotten(history.weights, excluded, resumed_after=history.rounds)
        weights = history.checkpoint(start)
        tied = tied_names(build_model(history.scenario.model))
        for round in history.update_rounds_after(start):
            if round == start + 1:
                updates = (update for update in history.updates(round) if update.client not in excluded)
            else:
                lengths = {update.client: length(update.change) for update in history.updates(round)}
                fresh = trainer.updates(excluded, weights, round, self.calibration)
                updates = (turned(one, lengths[one.client]) for one in fresh if one.client in lengths)
            weights = moved(weights, updates, tied)
        return Forgotten(weights, excluded, start)


def turned(update: ClientUpdate, to: float) -> ClientUpdate:
    """The update made `to` long; one without a direction stays zero."""
    own = length(update.change)
    scale = to / own if own else 0.0
    return replace(update, change={name: scale * tensor for name, tensor in update.change.items()})
