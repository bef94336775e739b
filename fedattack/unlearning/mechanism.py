"""What a mechanism is given, what it answers, and its base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from fedattack.defenses import hides_clients
from fedattack.errors import NotApplicable
from fedattack.observation import Scenario
from fedattack.unlearning.history import ClientUpdate, History, Kept, Weights
from fedattack.unlearning.requests import Deletion

Excluded = Mapping[int, frozenset[int]]
"""Client -> positions of its partition that no round may touch any more."""


class Trainer(Protocol):
    """How a mechanism reaches the clients. They begin with empty memories (error feedback) in every call."""

    def train(self, excluded: Excluded, weights: Weights, first_round: int) -> Weights:
        """Train the rounds from `first_round` (1-based) to the last again, from `weights`; the final global model."""
        ...

    def updates(
        self, excluded: Excluded, weights: Weights, round: int, share: float
    ) -> Iterator[ClientUpdate]:
        """What the clients of a round answer to `weights`, not aggregated; ascending.

        Each takes `share` of the agreed local steps, at least one; the same clients are drawn as before.
        """
        ...

    def evaluate(self, weights: Weights, clients: Collection[int]) -> dict[int, dict[str, float]]:
        """Client -> the task's figures of `weights` on all of its samples, as it says."""
        ...


@dataclass(frozen=True)
class Forgotten:
    """What a mechanism answers.

    `resumed_after`: the last round that was kept as it was. What is kept of later rounds still knows the samples:
    drop it.
    """

    weights: Weights  # the global model after forgetting
    excluded: Excluded  # all positions removed so far, this time's included
    resumed_after: int
    rounds_trained: int  # federation rounds that the answer cost


@dataclass
class Mechanism(ABC):
    """Base of every mechanism: turns accepted deletions into a model that no longer knows the samples.

    A dataclass; its fields are its settings, ``unlearning.NAME.FIELD``. `by_positions`: a deletion must name
    positions; else it may hold samples, which may be anybody's.
    """

    keeps: ClassVar[frozenset[Kept]] = frozenset()  # what of the training it needs; nothing else is kept
    by_positions: ClassVar[bool] = True

    def check(self, name: str, scenario: Scenario) -> None:
        """Refuse (NotApplicable) a federation in which the server cannot keep what is needed."""
        if "updates" in self.keeps and hides_clients(scenario.defense):
            raise NotApplicable(
                f"setting 'unlearning.mechanism' = {name!r} keeps each client's update, which 'secure-aggregation' "
                "hides; use 'retrain'"
            )

    @abstractmethod
    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget what `deletions`, accepted by :func:`fedattack.unlearning.validate_request`, name.

        Raises RunFailed if no checkpoint is old enough.
        """


def merged(
    excluded: Mapping[int, frozenset[int]], deletions: Sequence[Deletion]
) -> dict[int, frozenset[int]]:
    """Earlier exclusions and new deletions in one mapping, client -> positions."""
    union = dict(excluded)
    for deletion in deletions:
        union[deletion.client] = union.get(deletion.client, frozenset()) | deletion.positions
    return union
