"""What one family of attacks does in a run, as the pipeline sees it; it asks nobody which family that is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from adversaries import Attack
from fedattack.audit import AuditResult
from fedattack.config import Config
from fedattack.data import World
from fedattack.observation import Candidates, Observation
from fedattack.registry import Registry
from fedattack.storage import RunFolder
from simulations.engine.federation import DeletionRequests, FederationResult, RoundRecord
from simulations.progress import Stages


@dataclass(frozen=True)
class Plan:
    """One resolved run, handed to everybody who works in it; `shown` is told (stage, share done, text)."""

    config: Config
    world: World
    folder: RunFolder
    shown: Stages

    @property
    def commonest_share(self) -> float:
        """Share of the commonest class among the held-out samples: what a model that knows nothing gets right."""
        labels = self.world.dataset.labels[self.world.pools.nonmembers]
        return float(np.bincount(labels).max()) / len(labels)


class SavedWork(ABC):
    """One family's attacks on the observations of the folder `saved`, without a federation.

    Rounds are submitted, ascending, then collected, then audited where the folder `truth` is given. `failed` are
    attacks that failed on their own.
    """

    left = "the pictures are in images/"
    """What is there where nothing is scored."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        attacks: Mapping[str, Any],
        shown: Stages,
        saved: Path,
        truth: Path | None,
    ) -> None:
        self.config, self.folder, self.attacks = config, folder, dict(attacks)
        self.shown, self.saved, self.truth = shown, saved, truth
        self.failed: dict[str, BaseException] = {}

    @abstractmethod
    def submit(self, observations: Sequence[Observation]) -> None:
        """Attack one round's observations."""

    @abstractmethod
    def collect(self) -> None:
        """Wait for what was submitted."""

    @abstractmethod
    def close(self) -> None:
        """End what was submitted, finished or not; called once, whatever happened."""

    @abstractmethod
    def audit(self) -> dict[str, AuditResult]:
        """Score every attack against the truth."""

    @abstractmethod
    def answers(self) -> dict[str, dict[str, Any]]:
        """Attack -> key -> answer."""


class Experiment(ABC):
    """One family's attacks in a run: what they are shown, what they answer, and the truth it is scored against.

    `from_saved` attacks observations without a federation, where that can be done. `failed` are attacks that failed
    on their own; :meth:`audit` leaves them out.
    """

    from_saved: ClassVar[type[SavedWork] | None] = None

    def __init__(self, plan: Plan, attacks: Mapping[str, Any]) -> None:
        self.plan = plan
        self.attacks = dict(attacks)
        self.failed: dict[str, BaseException] = {}
        self.this_round: list[Observation] = []

    @classmethod
    def check(cls, config: Config, world: World) -> None:
        """Refuse (NotApplicable), before the first round, what the experiment itself cannot do with this run."""
        return None

    def questions(self) -> Mapping[str, Candidates]:
        """Attack -> the samples that it is asked about, where its question has some; known before the first round."""
        return {}

    def wants(self, round: int, client: int) -> bool:
        """Whether an update is to be observed; `client` is ``EVERYONE`` under secure aggregation."""
        return False

    def observe(self, observation: Observation) -> None:
        """Keep one of those that :meth:`wants` asked for, ascending within a round, until the round is over."""
        self.this_round.append(observation)

    def global_model(self, round: int, weights: dict[str, Tensor]) -> None:
        """Look at the global model after a round, just before :meth:`after_round`."""
        return None

    def weights_again(self, round: int) -> bool:
        """Whether :meth:`global_model` needs a round that is over again after a restart, unless it is observed again.

        The request round and the last one are told in any case.
        """
        return type(self).global_model is not Experiment.global_model

    def release(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the server shows of its model to clients that may ask for deletions, just before they do."""
        return weights

    def requests(self, requests: DeletionRequests) -> None:
        """Take what the clients want forgotten, as they say up to round ``config.request_round`` and after it."""
        return None

    def after_round(self, record: RoundRecord) -> None:
        """Take note that a round is over."""
        return None

    def collect(self) -> None:
        """Wait for what runs beside the federation, which is over; RunFailed where there is nothing to score."""
        return None

    def close(self) -> None:
        """End what runs beside the federation, finished or not; called once, whatever happened."""
        return None

    @abstractmethod
    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        """Score every attack."""

    def answers(self) -> dict[str, dict[str, Any]]:
        """Attack -> key -> answer, for a library user."""
        return {}


EXPERIMENTS: Registry[type[Experiment]] = Registry(
    "experiment",
    {
        "reconstruction": "simulations.experiments.reconstruction:ReconstructionExperiment",
        "membership": "simulations.experiments.membership:MembershipExperiment",
        "unlearning": "simulations.experiments.unlearning:UnlearningExperiment",
    },
    group="fedattack.experiments",
)
"""Family -> its experiment."""


def by_family(attacks: Mapping[str, Attack]) -> dict[str, dict[str, Attack]]:
    """The attacks of each family, in the order in which they were named."""
    found: dict[str, dict[str, Attack]] = {}
    for name, attack in attacks.items():
        found.setdefault(attack.family, {})[name] = attack
    return found


def open_experiments(plan: Plan, attacks: Mapping[str, Attack]) -> Sequence[Experiment]:
    """An experiment for each family that sits in the run."""
    return [EXPERIMENTS.get(family)(plan, chosen) for family, chosen in by_family(attacks).items()]
