"""What the attacks of a run are asked: one list of candidates, chosen here and not by the adversary."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord
from numpy.typing import NDArray

from fedattack.config import Config
from fedattack.data import ImageDataset, World
from fedattack.errors import DataError, NotApplicable
from fedattack.models import initial_weights
from fedattack.observation import EVERYONE
from fedattack.rng import numpy_rng
from simulations.client_app import drops_out, round_batches
from simulations.engine.flower_internals import server_identity
from strategies import build_strategy
from strategies.eavesdropper import seeded_sampling
from strategies.messages import to_record

log = logging.getLogger("fedattack.membership")

FEW_MEMBERS = 20
"""Below so many members chance alone scores an AUC of 0.32 to 0.68 (95 %), and a warning is due."""

HELD_OUT = -1
"""Owner of a candidate that no client has."""

Rounds = Mapping[int, Sequence[int]]
"""Client -> the rounds that it answers in."""


def expected_rounds(config: Config, world: World) -> dict[int, list[int]]:
    """Who will answer when: the strategy's own draw under the run's seed, less those that drop out."""
    strategy = build_strategy(config.federation, config.training.learning_rate)
    arrays = to_record(initial_weights(world.scenario.model, config.seed))
    nodes: Any = SimpleNamespace(get_node_ids=lambda: range(1, 1 + config.federation.clients))  # of a grid
    answering: dict[int, list[int]] = defaultdict(list)
    for number in range(1, config.federation.rounds + 1):
        with server_identity(0), seeded_sampling(config.seed, number):
            messages = list(strategy.configure_train(number, arrays, ConfigRecord(), nodes))
        for client in sorted(message.metadata.dst_node_id - 1 for message in messages):
            if not drops_out(config, number, client):
                answering[client].append(number)
    return answering


@dataclass(frozen=True)
class Asked:
    """Of one target: the places (n,) in the list that count, which are members, and which others' members."""

    target: int
    places: NDArray[np.int64]
    is_member: NDArray[np.bool_]
    others: NDArray[np.bool_]


@dataclass(frozen=True)
class Question:
    """The one list of candidates of a run, fixed before it starts; which are members is settled by what was seen.

    `ids` and `owner`, int64 (N,): sample ids and the client that each belongs to, else :data:`HELD_OUT`. `targets`
    are the clients asked about, and `pairs` says for each of them, and for ``EVERYONE``, which member stands beside
    which non-member, int64 (n, 2) of places: one of its label and, while there are such, person, else an attack
    could score by telling classes apart.
    """

    ids: NDArray[np.int64]
    owner: NDArray[np.int64]
    targets: tuple[int, ...]
    pairs: Mapping[int, NDArray[np.int64]]

    def settle(
        self, config: Config, world: World, rounds: Rounds, target: int
    ) -> tuple[Asked, dict[str, Any]]:
        """What counts of a target, and details; a pair counts if its member was trained on in one of the `rounds`.

        `details`: `members_used` (distinct samples that were), `observed_rounds`, and `matched_label`,
        `matched_group` (shares of the non-members with the label, and of the person, of a member).
        """
        used = trained_on(config, world, rounds)
        pairs = self.pairs[target][np.isin(self.ids[self.pairs[target][:, 0]], used)]
        members, nonmembers = self.ids[pairs[:, 0]], self.ids[pairs[:, 1]]
        if len(members) < FEW_MEMBERS:
            log.warning(
                "membership: only %d members to ask about (%d samples were trained on in the observed rounds, %d "
                "non-members are held out); chance alone spreads widely over so few",
                *(len(members), len(used), len(world.pools.nonmembers)),
            )
        labels, groups = world.dataset.labels, world.dataset.groups
        matched = _shared(labels, members, nonmembers)
        if matched < 1 and config.data.labels == "natural":
            log.warning(
                "membership: only %.0f %% of the non-members have the label of a member, so a score above chance may "
                "tell classes apart rather than members",
                100 * matched,
            )
        details = {
            "members_used": len(used),
            "observed_rounds": sorted({number for numbers in rounds.values() for number in numbers}),
            "matched_label": matched,
            "matched_group": None if groups is None else _shared(groups, members, nonmembers),
        }
        places, is_member = pairs.T.ravel(), np.repeat([True, False], len(pairs))
        order = np.argsort(places, kind="stable")
        others = self.owner[places] != HELD_OUT
        return Asked(target, places[order], is_member[order], (others & ~is_member)[order]), details


def trained_on(config: Config, world: World, rounds: Rounds) -> NDArray[np.int64]:
    """Distinct ids of the samples that clients train on in their rounds, client by client."""
    used: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    for client, numbers in rounds.items():
        partition = world.partitions[client]
        batches = [batch for r in numbers for batch in round_batches(config, len(partition), r, client)]
        if batches:
            used.append(partition[np.unique(np.concatenate(batches))])
    return np.concatenate(used)


def choose_question(config: Config, world: World, targets: Sequence[int], rounds: Rounds) -> Question:
    """The candidates: of each target at most ``attack.candidates`` that it trains on in its rounds; held-out ones."""
    pool = world.pools.nonmembers
    if not len(pool):
        raise DataError(
            "membership: no non-member is held out; raise setting 'data.nonmembers' "
            f"(now {config.data.nonmembers}) or use a larger data set"
        )
    rng = numpy_rng(config.seed, "membership candidates")
    chosen: dict[int, NDArray[np.int64]] = {}
    for target in targets:
        used = trained_on(config, world, {target: rounds.get(target, ())})
        chosen[target] = rng.permutation(used)[: config.attack.candidates]
    members = np.concatenate([np.zeros(0, dtype=np.int64), *chosen.values()])
    if not len(members):
        raise NotApplicable("membership: no client that is asked about takes part in the rounds asked about")
    found = {t: _pairs(ids, rng.permutation(pool), world.dataset, len(ids)) for t, ids in chosen.items()}
    found[EVERYONE] = _pairs(rng.permutation(members), rng.permutation(pool), world.dataset, len(members))
    held_out = np.unique(np.concatenate([partners for _, partners in found.values()]))
    ids = rng.permutation(np.concatenate([members, held_out]))
    place = {int(sample): index for index, sample in enumerate(ids)}
    owners = {int(sample): target for target, samples in chosen.items() for sample in samples}
    pairs = {
        target: np.array([[place[m], place[n]] for m, n in zip(*both, strict=True)], dtype=np.int64).reshape(
            -1, 2
        )
        for target, both in found.items()
    }
    owner = np.array([owners.get(int(sample), HELD_OUT) for sample in ids], dtype=np.int64)
    return Question(ids, owner, tuple(targets), pairs)


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
