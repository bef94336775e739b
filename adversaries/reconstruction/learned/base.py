"""What attacks train from public images before they see an update: kept for the other victims of a round."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from adversaries.base import Progress, no_progress
from adversaries.needs import Needs
from adversaries.reconstruction.base import ReconstructionAttack
from fedattack.config import Positive, Strength
from fedattack.observation import Observation, Reconstruction


@dataclass
class TrainedAttack(ReconstructionAttack):
    """Base of attacks that answer one victim after the other by a network trained on public images.

    Parameters
    ----------
    passes : int
        Updates made of each auxiliary image, with other labels and other company.
    epochs : int
        Passes of training over these updates.
    learning_rate : float
        Adam's, at the start.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = Needs(sums="single", fresh=True, labels="auto", batch="agreed", auxiliary=32)

    passes: Positive = 2
    epochs: Positive = 30
    learning_rate: Strength = 1e-3

    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack the observations of one round; see :meth:`ReconstructionAttack.run`."""
        answers = []
        for observation in observations:
            self.check(observation.scenario)
            answers.append(self.answer(observation, seed, device, progress))
        progress(1.0, "done")
        return answers

    @abstractmethod
    def answer(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """The answer to one victim's update."""
