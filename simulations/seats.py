"""The two seats beside reconstruction: who was trained on, and who asks to be forgotten.

Both experiments do what the auditor cannot leave to the adversary: choosing the candidates and the controls. What
they give an attack is what its seat sees.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adversaries.base import MembershipAttack, Progress, no_progress
from fedattack.config import Config
from fedattack.data import ImageDataset, World
from fedattack.errors import DataError, NotApplicable
from fedattack.observation import Candidates, MembershipScores, Observation
from fedattack.rng import numpy_rng
from simulations.client_app import round_batches


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
        JSON-able: `members_used` (distinct samples of the target that were trained on in the observed rounds),
        `observed_rounds`, and `matched_label`, `matched_group` (shares of the non-members with the label, and of
        the person, of a member).
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

    Members are samples that the target really trained on in the observed rounds, at most `attack.candidates` of
    them; as many non-members come from the held-out pool. Each non-member has the label and, where the data set
    knows people, the person of a member while such are left: else an attack could score by telling classes apart.
    The list is drawn and shuffled once from the run's seed and stays the same for all rounds.

    Parameters
    ----------
    config, world
        The run's.
    observations : sequence of Observation
        Everything that the seat saw.
    attack : MembershipAttack
    target : int, optional
        The client asked about; None: the one that was observed in most rounds, the lowest number among equals.
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
    members = rng.choice(used, count, replace=False)
    nonmembers = _alike(members, rng.permutation(pool), world.dataset)
    order = rng.permutation(2 * count)
    ids = np.concatenate([members, nonmembers])[order]
    details = {
        "members_used": len(used),
        "observed_rounds": list(rounds),
        "matched_label": _shared(world.dataset.labels, members, nonmembers),
        "matched_group": None
        if world.dataset.groups is None
        else _shared(world.dataset.groups, members, nonmembers),
    }
    return ids, (np.arange(2 * count) < count)[order], details


def _alike(
    members: NDArray[np.int64], pool: NDArray[np.int64], dataset: ImageDataset
) -> NDArray[np.int64]:
    """One sample of `pool` per member: of its label and person, else its label, else its person, else any."""
    nobody = np.zeros(len(dataset), dtype=np.int64)
    groups = nobody if dataset.groups is None else dataset.groups
    left, chosen = list(members), []
    for label, group in (
        (dataset.labels, groups),
        (dataset.labels, nobody),
        (nobody, groups),
        (nobody, nobody),
    ):
        waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
        taken = set(chosen)
        for i in pool:
            if i not in taken:
                waiting[int(label[i]), int(group[i])].append(int(i))
        unmatched = []
        for member in left:
            alike = waiting[int(label[member]), int(group[member])]
            if alike:
                chosen.append(alike.pop())
            else:
                unmatched.append(member)
        left = unmatched
    return np.array(chosen, dtype=np.int64)


def _shared(key: NDArray[np.int64], members: NDArray[np.int64], nonmembers: NDArray[np.int64]) -> float:
    """Share of the non-members that have the key of a member, each member counted once."""
    common = Counter(key[members].tolist()) & Counter(key[nonmembers].tolist())
    return common.total() / len(nonmembers)
