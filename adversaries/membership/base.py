"""What a membership attack is: it tells which candidates a client trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adversaries.base import Attack, Progress, no_progress
from adversaries.needs import Needs
from fedattack.errors import ConfigError
from fedattack.observation import Candidates, MembershipScores, Observation

Figures = Mapping[str, Tensor]
"""What an attack keeps of a round, by name: its size is that of the candidates and clients, not of the model."""


@dataclass
class MembershipAttack(Attack):
    """Tells which candidate samples a client trained on.

    A server's attack is shown one round after the other (:meth:`watch`), keeps figures, and concludes from them
    (:meth:`scores`). A client's answers "scores", float64 (N,), to
    :meth:`adversaries.seats.MaliciousClient.answer`, about the data of all other clients.
    """

    family = "membership"
    needs: ClassVar[Needs] = Needs(sums="single", held_out=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        base, own = MembershipAttack, type(self)
        if self.seat != "malicious client" and (own.watch is base.watch or own.scores is base.scores):
            raise ConfigError(
                f"attack {type(self).__name__} is a server's: it must bring 'watch' and 'scores'"
            )

    def watch(
        self,
        observations: Sequence[Observation],
        target: int,
        candidates: Candidates,
        seed: int,
        device: torch.device,
    ) -> Figures:
        """What one round tells.

        `observations` are all that the seat saw in the round, in the order of the clients; the client asked
        about, `target`, need not be among them. `candidates` are one fixed list for the whole run.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no rounds")

    def scores(self, rounds: Mapping[int, Figures], target: int) -> MembershipScores:
        """The candidates' scores, from the figures of all rounds, ascending; NotApplicable if these allow none."""
        raise NotImplementedError(f"{type(self).__name__} reads no rounds")

    def run(
        self,
        observations: Sequence[Observation],
        target: int,
        candidates: Candidates,
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> MembershipScores:
        """Watch all rounds of recorded observations, and conclude; see :meth:`watch` and :meth:`scores`."""
        by_round: dict[int, list[Observation]] = defaultdict(list)
        for observation in sorted(observations, key=lambda o: (o.round, o.client)):
            by_round[observation.round].append(observation)
        figures: dict[int, Figures] = {}
        for number, seen in by_round.items():
            progress(len(figures) / len(by_round), f"round {number}")
            figures[number] = self.watch(seen, target, candidates, seed, device)
        return self.scores(figures, target)
