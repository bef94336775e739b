"""The experiment on membership: who was trained on. The candidates are chosen here, not by the adversary."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adversaries.base import Progress, no_progress
from adversaries.membership.base import MembershipAttack
from fedattack.audit import AuditResult, audit_membership
from fedattack.config import Config
from fedattack.data import ImageDataset, World
from fedattack.errors import DataError, NotApplicable
from fedattack.observation import Candidates, MembershipScores, Observation
from fedattack.rng import numpy_rng
from simulations.client_app import round_batches
from simulations.engine.federation import FederationResult
from simulations.experiments.base import Experiment, Plan
from simulations.experiments.executor import choose_device

log = logging.getLogger("fedattack.seats")

FEW_MEMBERS = 20
"""Below so many members chance alone scores an AUC of 0.32 to 0.68 (95 %), and a warning is due."""


@dataclass(frozen=True)
class MembershipOutcome:
    """What a membership attack answered, and the truth that it was not told.

    Parameters
    ----------
    target : int
        The client asked about.
    scores : MembershipScores
        Of the candidates.
    is_member : ndarray
        bool, shape (N,), in the order of the candidates.
    sample_ids : ndarray
        int64, shape (N,): the candidates' positions in the data set, for the record.
    details : dict
        JSON-able: `members_used` (distinct samples of the target that were trained on in the observed
        rounds), `observed_rounds`, and `matched_label`, `matched_group` (shares of the non-members with the
        label, and of the person, of a member).
    """

    target: int
    scores: MembershipScores
    is_member: NDArray[np.bool_]
    sample_ids: NDArray[np.int64]
    details: dict[str, Any] = field(default_factory=dict)


def membership_experiment(
    config: Config,
    world: World,
    observations: Sequence[Observation],
    attack: MembershipAttack,
    *,
    target: int | None = None,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> MembershipOutcome:
    """Ask a membership attack about one client.

    Members are samples that the target really trained on in the observed rounds, at most `attack.candidates`
    of them; as many non-members come from the held-out pool, each with the label and, while there are such,
    the person of a member: else an attack could score by telling classes apart. Members without such a
    partner are asked about only when there would be too few others. The list is drawn and shuffled once from
    the run's seed and stays the same for all rounds.

    Parameters
    ----------
    config, world
        The run's.
    observations : sequence of Observation
        Everything that the seat saw.
    attack : MembershipAttack
    target : int, optional
        The client asked about; None: the one that was observed in most rounds, the lowest number among
        equals.
    device : torch.device, optional
        Where to compute; None: the CPU.
    progress : Progress

    Raises
    ------
    NotApplicable
        If nothing was observed, not of the target, or the attack cannot do with what was.
    DataError
        If no non-member is held out.
    """
    if target is None:
        target = most_observed(observations)
    rounds = sorted({o.round for o in observations if o.client == target})
    if not rounds:
        raise NotApplicable(f"membership: no update of client {target}, the target, was observed")
    ids, is_member, details = choose_candidates(config, world, target, rounds)
    images, labels = world.dataset.tensors(ids)
    scores = attack.run(
        observations,
        target,
        Candidates(images, labels),
        config.seed,
        device or torch.device("cpu"),
        progress,
    )
    return MembershipOutcome(target, scores, is_member, ids, details)


def most_observed(observations: Sequence[Observation]) -> int:
    """The client observed in most rounds, the lowest number among equals.

    Raises
    ------
    NotApplicable
        If nothing was observed.
    """
    seen = Counter(o.client for o in observations)
    if not seen:
        raise NotApplicable("membership: no update was observed")
    return min(seen, key=lambda client: (-seen[client], client))


def choose_candidates(
    config: Config, world: World, target: int, rounds: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], dict[str, Any]]:
    """The one list of candidates of a run: sample ids (N,), which of them are members (N,), and details."""
    partition = world.partitions[target]
    batches = [batch for r in rounds for batch in round_batches(config, len(partition), r, target)]
    used = partition[np.unique(np.concatenate(batches))]
    pool = world.pools.nonmembers
    if not len(pool):
        raise DataError(
            "membership: no non-member is held out; raise setting 'data.nonmembers' "
            f"(now {config.data.nonmembers}) or use a larger data set"
        )
    count = min(config.attack.candidates, len(used), len(pool))
    rng = numpy_rng(config.seed, "membership candidates", target)
    members, nonmembers = _pairs(rng.permutation(used), rng.permutation(pool), world.dataset, count)
    if len(members) < FEW_MEMBERS:
        log.warning(
            "membership: only %d members to ask about (client %d trained on %d samples in %d observed rounds, %d "
            "non-members are held out); chance alone spreads widely over so few",
            *(len(members), target, len(used), len(rounds), len(pool)),
        )
    order = rng.permutation(2 * len(members))
    ids = np.concatenate([members, nonmembers])[order]
    matched = _shared(world.dataset.labels, members, nonmembers)
    details = {
        "members_used": len(used),
        "observed_rounds": list(rounds),
        "matched_label": matched,
        "matched_group": None
        if world.dataset.groups is None
        else _shared(world.dataset.groups, members, nonmembers),
    }
    if matched < 1 and config.data.labels == "natural":
        log.warning(
            "membership: only %.0f %% of the non-members have the label of a member (client %d), so a score above "
            "chance may tell classes apart rather than members",
            *(100 * matched, target),
        )
    return ids, (np.arange(len(ids)) < len(members))[order], details


def _pairs(
    used: NDArray[np.int64], pool: NDArray[np.int64], dataset: ImageDataset, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """At most `count` members, and as many non-members: pair by pair of one label and person, else of one label.

    Unlike pairs are made only to reach :data:`FEW_MEMBERS`: fewer candidates are better than two kinds of them.
    """
    nobody = np.zeros(len(dataset), dtype=np.int64)
    groups = nobody if dataset.groups is None else dataset.groups
    alike = [(dataset.labels, groups), (dataset.labels, nobody)]
    unlike = [(nobody, groups), (nobody, nobody)]
    pairs: dict[int, int] = {}
    for label, group in alike + unlike:
        wanted = count if label is dataset.labels else min(count, FEW_MEMBERS)
        taken = set(pairs.values())
        waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i in pool.tolist():
            if i not in taken:
                waiting[int(label[i]), int(group[i])].append(i)
        for member in used.tolist():
            candidates = waiting[int(label[member]), int(group[member])]
            if len(pairs) < wanted and member not in pairs and candidates:
                pairs[member] = candidates.pop()
    return np.array(list(pairs), dtype=np.int64), np.array(list(pairs.values()), dtype=np.int64)


def _shared(key: NDArray[np.int64], members: NDArray[np.int64], nonmembers: NDArray[np.int64]) -> float:
    """Share of the non-members that have the key of a member, each member counted once."""
    common = Counter(key[members].tolist()) & Counter(key[nonmembers].tolist())
    return common.total() / len(nonmembers)


class MembershipExperiment(Experiment):
    """Asks about one client, with everything that was seen of all."""

    attacks: dict[str, MembershipAttack]

    def __init__(self, plan: Plan, attacks: Mapping[str, MembershipAttack]) -> None:
        super().__init__(plan, attacks)
        self._seen: list[Observation] = []

    def wants(self, round: int, client: int) -> bool:
        """Everything is wanted."""
        del round, client
        return True

    def observe(self, observation: Observation) -> None:
        """Keep it."""
        self._seen.append(observation)

    def audit(self, federation: FederationResult) -> dict[str, AuditResult]:
        """Ask every attack, and score its answer."""
        del federation
        return {name: self._audit(name, attack) for name, attack in self.attacks.items()}

    def _audit(self, name: str, attack: MembershipAttack) -> AuditResult:
        plan, started = self.plan, time.perf_counter()
        outcome = membership_experiment(
            plan.config,
            plan.world,
            self._seen,
            attack,
            device=choose_device(plan.config.engine.device),
            progress=lambda share, text: plan.shown(name, share, text),
        )
        plan.shown(name, 1.0, f"{len(outcome.is_member)} candidates")
        seconds = time.perf_counter() - started
        plan.folder.save_scores(name, outcome.target, outcome.scores, seconds)
        plan.folder.save_part(f"{name}-candidates", outcome.details)
        return audit_membership(
            name,
            outcome.scores,
            outcome.is_member,
            clients=[outcome.target],
            seconds=seconds,
            seed=plan.config.seed,
        )
