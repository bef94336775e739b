"""What a membership attack is: it tells which candidates a client, or anybody, trained on."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adversaries.base import Attack, Progress, no_progress
from adversaries.membership.knowledge import Knowledge, References
from adversaries.membership.view import RoundView, System
from adversaries.needs import Needs
from adversaries.seats import CuriousServer
from fedattack.config import Strength
from fedattack.errors import ConfigError, NotApplicable
from fedattack.observation import EVERYONE, Candidates, MembershipScores, Observation, called

Figures = Mapping[str, Tensor]
"""What an attack keeps of a round, by name: its size is that of the candidates and clients, not of the model."""


@dataclass
class MembershipAttack(Attack):
    """Tells which candidate samples a client trained on.

    A server's attack is shown one round after the other (:meth:`watch`), keeps figures, and concludes from them
    for one target after the other (:meth:`scores`); the target is a client's number, or
    :data:`~fedattack.observation.EVERYONE` where needs say ``about="anybody"``, or single updates are hidden. A
    client's answers "scores", float64 (N,), to :meth:`adversaries.seats.MaliciousClient.answer`, about the data of
    all other clients.
    """

    family = "membership"
    needs: ClassVar[Needs] = Needs(sums="single", held_out=True)
    watches: ClassVar[Literal["every", "last"]] = "every"
    """Rounds that it is shown; of a server's attack that sends weights of its own, of the armed ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        base, own = MembershipAttack, type(self)
        if self.seat != "malicious client" and (own.watch is base.watch or own.scores is base.scores):
            raise ConfigError(
                f"attack {type(self).__name__} is a server's: it must bring 'watch' and 'scores'"
            )

    def watch(self, view: RoundView, seed: int) -> Figures:
        """What one round tells; candidates are one fixed list for the whole run."""
        raise NotImplementedError(f"{type(self).__name__} reads no rounds")

    def scores(self, rounds: Mapping[int, Figures], target: int, knowledge: Knowledge) -> MembershipScores:
        """The candidates' scores, (N,), from the figures of all rounds, ascending.

        NotApplicable if these allow none. The target need not have answered in every round.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no rounds")

    def run(
        self,
        observations: Sequence[Observation],
        target: int,
        candidates: Candidates,
        seed: int,
        device: torch.device,
        progress: Progress = no_progress,
        references: References | None = None,
    ) -> MembershipScores:
        """Watch all rounds of recorded observations, and conclude; see :meth:`watch` and :meth:`scores`."""
        by_round: dict[int, list[Observation]] = defaultdict(list)
        for observation in sorted(observations, key=lambda o: (o.round, o.client)):
            by_round[observation.round].append(observation)
        knowledge = Knowledge.of(candidates, observations[0].auxiliary if observations else None, references)
        figures: dict[int, Figures] = {}
        for number, seen in by_round.items():
            progress(len(figures) / len(by_round), f"round {number}")
            figures[number] = self.watch(RoundView(seen, knowledge, device), seed)
        return self.scores(figures, target, knowledge)


@dataclass
class RoundStatistic(CuriousServer, MembershipAttack):
    """Base of the statistics that a curious server takes of the candidates round by round.

    A subclass brings :meth:`measure`; the score is its mean over the rounds that the target answered, unless it
    brings another :meth:`combine`.
    """

    def watch(self, view: RoundView, seed: int) -> Figures:
        """``clients``, int64 (K,), and ``statistic``, float64 (K, N); of anybody, K = 1 and ``EVERYONE``."""
        clients = [EVERYONE] if self.needs.about == "anybody" else view.clients
        return {"clients": torch.tensor(clients), "statistic": self.measure(view)}

    @abstractmethod
    def measure(self, view: RoundView) -> Tensor:
        """Shape (K, N), float64; higher means "more likely a member of this client", or of anybody (K = 1)."""

    def combine(self, rounds: Tensor) -> Tensor:
        """One score per candidate, (N,), from the target's rounds (T, N), ascending."""
        return rounds.mean(0)

    def scores(self, rounds: Mapping[int, Figures], target: int, knowledge: Knowledge) -> MembershipScores:
        """See :meth:`combine`; `details` tell the rounds used."""
        found = rows_of(rounds, target)
        name = type(self).__name__
        if not found:
            raise unanswered(name, target, len(rounds))
        return MembershipScores(self.combine(torch.stack(list(found.values()))), name, {"rounds": [*found]})


@dataclass
class EquationStatistic(RoundStatistic):
    """Base of the statistics that solve a round's equations; a subclass brings :meth:`solve`.

    Parameters
    ----------
    damping : float or None
        What is added to the diagonal of the unit gradients' Gram matrix, on sparse updates times its median; None:
        0.01, and 0.03 on sparse updates.
    """

    damping: Strength | None = None

    def measure(self, view: RoundView) -> Tensor:
        """See :meth:`solve`."""
        found = torch.empty(len(view.clients), len(view.candidates.labels), dtype=torch.float64)
        for system in view.systems():
            found[system.rows] = self.solve(system, found.shape[1])
        return found

    @abstractmethod
    def solve(self, system: System, count: int) -> Tensor:
        """Scores of the first `count` samples, the candidates, for each of the system's rows, float64."""


def unanswered(name: str, target: int, rounds: int) -> NotApplicable:
    """What an attack says where none of the observed rounds tells of its target."""
    return NotApplicable(
        f"{name}: {called(target)}, the target, answered in none of {rounds} observed rounds"
    )


def rows_of(rounds: Mapping[int, Figures], target: int, name: str = "statistic") -> dict[int, Tensor]:
    """Round -> the target's row of a figure (K, ...), of the rounds that have one."""
    found = {}
    for number, figures in rounds.items():
        clients = figures["clients"].tolist()
        if target in clients and len(figures[name]):
            found[number] = figures[name][clients.index(target)]
    return found
