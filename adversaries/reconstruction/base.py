"""What a reconstruction attack is: it rebuilds a client's private images from its update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adversaries.base import Attack, Progress, no_progress
from fedattack.observation import Observation, Reconstruction


@dataclass
class ReconstructionAttack(Attack):
    """Rebuilds a client's private images from its update."""

    family = "reconstruction"

    @abstractmethod
    def run(
        self,
        observations: Sequence[Observation],
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> list[Reconstruction]:
        """Attack observations that share one round's weights, or, under :meth:`needs_history`, of several rounds.

        Parameters
        ----------
        observations : sequence of Observation
            All from the same round unless the attack needs their history; an attack is free to treat them in one
            batched optimisation.
        seed : int
            Seeds every draw of the attack.
        device : torch.device
            Where to compute.
        progress : Progress
            Told about the share done.

        Returns
        -------
        list of Reconstruction
            In the order of `observations`.
        """
