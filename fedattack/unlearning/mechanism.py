"""What a mechanism is given, what it answers, and its base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from fedattack.defenses import hides_clients
from fedattack.errors import NotApplicable
from fedattack.observation import Scenario
from fedattack.task import task_of
from fedattack.unlearning.central import Central
from fedattack.unlearning.cost import Cost
from fedattack.unlearning.history import ClientUpdate, History, Kept, Weights
from fedattack.unlearning.requests import Deletion

Excluded = Mapping[int, frozenset[int]]
"""Client -> positions of its partition that no round may touch any more."""

Level = Literal["sample", "class", "client"]


Link = Literal["softmax", "logistic", "ridge"]
"""Of a linear model: classes told by one softmax, each from the rest, or by squares."""


@dataclass(frozen=True)
class Objective:
    """Mean loss plus ``decay / 2 |w|^2``, and a linear term that releases may share, minimised over all weights."""

    link: Link
    decay: float


class Trainer(Protocol):
    """The only way to the clients, and to the data where one holds it all; counts what it costs.

    Clients begin with empty memories (error feedback) in every call.
    """

    cost: Cost

    def train(self, excluded: Excluded, weights: Weights, first_round: int) -> Weights:
        """Train the rounds from `first_round` (1-based) to the last again, from `weights`; the final global model."""
        ...

    def updates(
        self,
        excluded: Excluded,
        weights: Weights,
        round: int,
        share: float = 1.0,
        clients: Collection[int] | None = None,
    ) -> Iterator[ClientUpdate]:
        """What clients answer to `weights`, not aggregated; ascending.

        Each takes `share` of the agreed local steps, at least one. `clients` None: those that were drawn in the
        round; those that drop out of it do so again.
        """
        ...

    def gradients(
        self,
        excluded: Excluded,
        weights: Weights,
        round: int,
        clients: Collection[int] | None = None,
        objective: str = "loss",
    ) -> Iterator[ClientUpdate]:
        """Each client's gradient of the mean of its samples' `objective`, as its `change`; ascending.

        As it comes over the wire, behind the client's defences and compression, without weight decay.
        `objective`: "loss", the task's own, or "forget", ``-log(1 - p_y / 2)`` (FedOSD, 2024). A client whose
        samples are all excluded is absent.
        """
        ...

    def evaluate(self, weights: Weights, clients: Collection[int]) -> dict[int, dict[str, float]]:
        """Client -> the task's figures of `weights` on all of its samples, as it says."""
        ...

    def central(self) -> Central:
        """The data of the only client, who is the server; NotApplicable where there are several."""
        ...


@dataclass(frozen=True)
class Forgotten:
    """What a mechanism answers.

    `resumed_after`: the last round that was kept as it was. `certificate`: what is promised, where the mechanism
    promises something; `details`: what else the record should hold, a "warning" to be shown among them; both
    JSON-able.
    """

    weights: Weights  # the global model after forgetting
    excluded: Excluded  # all positions removed so far, this time's included
    resumed_after: int
    certificate: Mapping[str, Any] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Mechanism(ABC):
    """Base of every mechanism: turns accepted deletions into a model that no longer knows the samples.

    A dataclass; its fields are its settings, ``unlearning.NAME.FIELD``. `by_positions`: a deletion must name
    positions; else it may hold samples, which may be anybody's. `levels`: what it can forget; a "class" or a "client"
    comes as the positions of all its samples. `runs`: where; "central" needs the data itself, of one client who is
    the server. `certifies`: whether answers have a certificate, of which "retrained" counts trainings anew.
    """

    keeps: ClassVar[frozenset[Kept]] = frozenset()  # what of the training it needs; nothing else is kept
    levels: ClassVar[frozenset[Level]] = frozenset({"sample", "class", "client"})
    runs: ClassVar[Literal["server", "central"]] = "server"
    certifies: ClassVar[bool] = False
    by_positions: ClassVar[bool] = True
    singles: ClassVar[bool] = False  # reads single clients' answers when it forgets

    def check(self, name: str, scenario: Scenario, clients: int) -> None:
        """Refuse (NotApplicable), before the first round, a federation that it cannot serve."""
        if "updates" in self.keeps and hides_clients(scenario.defense):
            raise NotApplicable(
                f"setting 'unlearning.mechanism' = {name!r} keeps each client's update, which 'secure-aggregation' "
                "hides; use 'retrain'"
            )
        if self.singles and hides_clients(scenario.defense):
            raise NotApplicable(
                f"setting 'unlearning.mechanism' = {name!r} asks each client for its gradient, which "
                "'secure-aggregation' hides; use 'retrain'"
            )
        if self.runs == "central" and clients != 1:
            raise NotApplicable(
                f"setting 'unlearning.mechanism' = {name!r} needs the data itself, and here {clients} clients hold "
                "it; use one who is the server (--scenario central), or retrain, federaser, ..."
            )
        if self.runs == "central" and scenario.compression.name != "none":
            raise NotApplicable(
                f"setting 'compression.name' = {scenario.compression.name!r}: mechanism {name!r} works on its "
                "holder's own training, of which nothing is sent; use none (--scenario central)"
            )
        if self.runs == "central" and task_of(scenario).kind != "classify":
            raise NotApplicable(
                f"setting 'unlearning.mechanism' = {name!r} forgets what a classifier learnt, and task "
                f"{scenario.training.task!r} trains none; use 'retrain'"
            )

    def prepare(self, excluded: Excluded, history: History, trainer: Trainer) -> Weights:
        """What the server releases of the trained model, before anybody asks, and of a retrained one.

        `excluded`: what it was trained without. State for :meth:`forget` goes into ``history.folder``. By default the
        model as it is.
        """
        return history.weights

    def minimises(self, scenario: Scenario) -> Objective | None:
        """What its releases are at the minimum of, public as the mechanism is; None: of nothing."""
        return None

    @abstractmethod
    def forget(self, deletions: Sequence[Deletion], history: History, trainer: Trainer) -> Forgotten:
        """Forget what `deletions`, accepted by :func:`fedattack.unlearning.validate_request`, name.

        `history` is of the training, its `weights` and `excluded` as earlier deletions left them. Raises RunFailed
        if no checkpoint is old enough.
        """


def merged(
    excluded: Mapping[int, frozenset[int]], deletions: Sequence[Deletion]
) -> dict[int, frozenset[int]]:
    """Earlier exclusions and new deletions in one mapping, client -> positions."""
    union = dict(excluded)
    for deletion in deletions:
        union[deletion.client] = union.get(deletion.client, frozenset()) | deletion.positions
    return union
