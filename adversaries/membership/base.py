"""What a membership attack is: it tells which candidates a client trained on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from adversaries.base import Attack, Progress, no_progress
from adversaries.needs import Needs
from fedattack.observation import (
    Candidates,
    MembershipScores,
    Observation,
)


@dataclass
class MembershipAttack(Attack):
    """Tells which candidate samples a client trained on."""

    family = "membership"
    needs: ClassVar[Needs] = Needs(sums="single", held_out=True)

    @abstractmethod
    def run(
        self,
        observations: Sequence[Observation],
        target: int,
        candidates: Candidates,
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> MembershipScores:
        """Score `candidates` for membership in the data of client `target`.

        Parameters
        ----------
        observations : sequence of Observation
            Everything the seat saw: all clients, all rounds.
        target : int
            `Observation.client` of the client asked about.
        candidates : Candidates
            One fixed list for the whole run.
        """
