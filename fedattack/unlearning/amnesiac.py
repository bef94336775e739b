"""Forgetting by taking back every step whose batch held a forgotten sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedattack.observation import Scenario
from fedattack.unlearning.history import History, Weights
from fedattack.unlearning.mechanism import Excluded, Forgotten, Mechanism, Trainer, merged
from fedattack.unlearning.requests import Deletion
from fedattack.unlearning.trajectory import Part, ended, parts, recorded, refuse_defended, saved, walked


@dataclass
class Amnesiac(Mechanism):
    """Amnesiac unlearning (Graves, Nagisetty and Ganesh, 2021): the initial model plus the steps that may stay.

    What each batch changed is kept, with the batch; forgetting leaves out the changes of those that held a forgotten
    sample. What later steps owe to them stays, and the more of an epoch is left out, the less is left of the model:
    training on what may stay mends it, and these steps are kept in their turn. BatchNorm's statistics are taken back
    by no step.

    Parameters
    ----------
    fine_tune : int
        The last so many rounds are trained again, on what is left.
    """

    runs: ClassVar[Literal["server", "central"]] = "central"
    fine_tune: Annotated[int, Field(ge=0)] = 2

    def check(self, name: str, scenario: Scenario, clients: int) -> None:
        """Refuse (NotApplicable) steps that are not SGD's."""
        super().check(name, scenario, clients)
        refuse_defended(name, scenario)

    def prepare(self, excluded: Excluded, history: History, trainer: Trainer) -> Weights:
        """Keep what each step of the training changed, walked again."""

        def rows(one: Part) -> dict[str, Tensor]:
            return {"changes": one.weights.diff(dim=0)}

        return recorded(trainer.central(), history, "amnesiac", excluded.get(0, frozenset()), rows)

    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget `deletions`."""
        excluded, before = merged(history.excluded, deletions), history.excluded.get(0, frozenset())
        after, central = excluded.get(0, frozenset()), trainer.central()
        flat = central.flat(history.checkpoint(0))
        taken_back, size, last = 0, 0, 0
        for number, batches, kept in parts(history.folder, "amnesiac", before):
            stays = torch.tensor([not after.intersection(batch.tolist()) for batch in batches])
            left = [batch for batch, stay in zip(batches, stays.tolist(), strict=True) if stay]
            changes = kept["changes"][stays]
            flat, last = flat + changes.sum(0), number
            taken_back += len(batches) - len(left)
            size += saved(history.folder, "amnesiac", after, number, left, changes=changes)
        weights = central.weights(flat, history.weights)
        if self.fine_tune and len(central.retained(after)):
            for one in walked(central, weights, after, max(1, central.rounds - self.fine_tune + 1)):
                last += 1
                changes = one.weights.diff(dim=0)
                size += saved(history.folder, "amnesiac", after, last, one.batches, changes=changes)
            weights = ended(central, one, weights)
        details = {"steps_taken_back": taken_back, "bytes_kept": size}
        return Forgotten(weights, excluded, 0, details=details)
