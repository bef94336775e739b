"""What the attacks of a run are asked: one list of candidates, chosen here and not by the adversary."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ConfigRecord
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedattack.config import Config
from fedattack.data import World
from fedattack.data.dataset import require_groups
from fedattack.data.pools import fingerprints, share_of_each
from fedattack.errors import ConfigError, DataError, NotApplicable
from fedattack.models import initial_weights
from fedattack.observation import EVERYONE, Candidates, MembershipScores, called
from fedattack.rng import numpy_rng
from simulations.client_app import Workplace, drops_out, round_batches
from simulations.engine.flower_internals import server_identity
from strategies import build_strategy
from strategies.eavesdropper import seeded_sampling
from strategies.messages import to_record

log = logging.getLogger("fedattack.membership")

FEW_MEMBERS = 20
"""Below so many members chance alone scores an AUC of 0.32 to 0.68 (95 %), and a warning is due."""

HELD_OUT = -1
"""Owner of a candidate that no client has."""

Ids = NDArray[np.int64]

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
    """Of one target: the units (n,) that count, ascending, which are members, and which are others' members."""

    target: int
    places: Ids
    is_member: NDArray[np.bool_]
    others: NDArray[np.bool_]


@dataclass(frozen=True)
class Question:
    """The one list of candidates of a run, fixed before it starts; which are members is settled by what was seen.

    A unit is what is asked about: a sample, or a person with several samples (``attack.unit``). Units are numbered at
    random, so that the number tells nothing.

    Attributes
    ----------
    ids, unit : ndarray of int64
        Sample id of each of the N candidates, and the unit in 0, ..., U - 1 that it belongs to; where samples are
        asked about, each is its own.
    key, owner : ndarray of int64
        Of each of the U units: the sample's id or the person's number in the data set, and the client that has it,
        else :data:`HELD_OUT`.
    targets : tuple of int
        The clients asked about.
    pairs : mapping
        Of each target, and of ``EVERYONE``: which member stands beside which non-member, int64 (n, 2) of units. One
        of its label and, while there are such, person, else an attack could score by telling classes apart; people
        whose labels are distributed alike.
    by_person : bool
        Whether units are people.
    """

    ids: Ids
    unit: Ids
    key: Ids
    owner: Ids
    targets: tuple[int, ...]
    pairs: Mapping[int, Ids]
    by_person: bool = False

    @property
    def alike(self) -> float:
        """What members' and non-members' labels must have in common (`matched_label`) not to tell them apart.

        Where samples are asked about, they stand in pairs of one label; people's labels differ by chance.
        """
        return 0.75 if self.by_person else 1 - 1e-9

    @property
    def samples(self) -> Ids:
        """A sample id of each unit, (U,)."""
        return self.ids[np.unique(self.unit, return_index=True)[1]]

    @property
    def groups(self) -> Tensor | None:
        """The units, int64 (N,), where these are people."""
        return torch.from_numpy(self.unit) if self.by_person else None

    def candidates(self, world: World) -> Candidates:
        """What the attacks are asked."""
        return Candidates(*world.dataset.tensors(self.ids), self.groups)

    def sides(self, pairs: Ids) -> tuple[Ids, Ids]:
        """Sample ids of all members, and of all non-members, of some pairs."""
        members, nonmembers = (self.ids[np.isin(self.unit, column)] for column in pairs.T)
        return members, nonmembers

    def settle(
        self, config: Config, world: World, rounds: Rounds, target: int
    ) -> tuple[Asked, dict[str, Any]]:
        """What counts of a target, and details; a pair counts if its member was trained on in one of the `rounds`.

        A person was if one of their samples was. `details`: `members_used` (distinct samples, or people, that were),
        `observed_rounds`, and `matched_label`, `matched_group`: what the distributions of labels, and of people, of
        members and non-members have in common, from 0 to 1. NotApplicable if no pair counts.
        """
        dataset = world.dataset
        used = np.unique(_named(trained_on(config, world, rounds), world, self.by_person))
        pairs = self.pairs[target][np.isin(self.key[self.pairs[target][:, 0]], used)]
        if not len(pairs):
            raise NotApplicable(
                f"membership: {called(target)} has no member in the list that was trained on in the observed rounds "
                "and stands beside a non-member"
            )
        sides = self.sides(pairs)
        known = None if dataset.groups is None or self.by_person else _shared(dataset.groups, *sides)
        details = {
            "members_used": len(used),
            "observed_rounds": sorted({number for numbers in rounds.values() for number in numbers}),
            # Of two people alone the few labels differ by chance, whoever they are.
            "matched_label": _shared(
                dataset.labels, *(self.sides(self.pairs[EVERYONE]) if self.by_person else sides)
            ),
            "matched_group": known,
        }
        members, nonmembers = (np.unique(column) for column in pairs.T)
        places = np.concatenate([members, nonmembers])
        is_member, order = np.arange(len(places)) < len(members), np.argsort(places)
        others = (self.owner[places] != HELD_OUT) & ~is_member
        return Asked(target, places[order], is_member[order], others[order]), details


def per_unit(answer: MembershipScores, groups: Tensor | None) -> MembershipScores:
    """One score per unit, (U,), from one per candidate, (N,): the mean over a person's samples.

    `groups` are those of the candidates that were asked about; None: samples are asked about.
    """
    if groups is None:
        return answer
    sums = answer.scores.new_zeros(int(groups.max()) + 1).index_add(0, groups, answer.scores)
    return replace(answer, scores=sums / groups.bincount())


def trained_on(config: Config, world: World, rounds: Rounds) -> Ids:
    """Distinct ids of the samples that clients train on in their rounds, client by client; canaries are none."""
    used: list[Ids] = [np.zeros(0, dtype=np.int64)]
    canaries = Workplace.of(config, world).canaries
    for client, numbers in rounds.items():
        partition = world.partitions[client]
        batches = [batch for r in numbers for batch in round_batches(config, len(partition), r, client)]
        if batches:
            positions = np.unique(np.concatenate(batches))
            if canaries is not None:
                positions = np.setdiff1d(positions, canaries.replaced(client, len(partition)))
            used.append(partition[positions])
    return np.concatenate(used)


def check_question(config: Config, world: World) -> None:
    """Refuse what cannot be asked of this federation: ConfigError or DataError, in one sentence."""
    asked, clients = config.attack, config.federation.clients
    targets = asked.targets or ()
    accepted = f"accepted: 0 to {clients - 1}, each once"
    if asked.targets is not None and not targets:
        raise ConfigError(f"setting 'attack.targets' names no client; {accepted}")
    if wrong := [client for client in targets if client >= clients]:
        raise ConfigError(f"setting 'attack.targets' names client {wrong[0]}; {accepted}")
    if twice := [client for client, times in Counter(targets).items() if times > 1]:
        raise ConfigError(f"setting 'attack.targets' names client {twice[0]} twice; {accepted}")
    if asked.unit == "sample":
        return
    groups = require_groups(world.dataset.groups, "setting 'attack.unit' = 'group'")
    if config.data.nonmember_unit != "group":
        raise ConfigError(
            f"setting 'data.nonmember_unit' = {config.data.nonmember_unit!r}: people are asked about "
            "('attack.unit' = 'group'), so that people must be held out; use 'group'"
        )
    if not len(world.pools.withheld):
        raise ConfigError(
            f"setting 'data.withheld' = {config.data.withheld:g}: people are asked about ('attack.unit' = 'group') "
            "by samples that nobody trained on; withhold a share of each person's, such as 0.5"
        )
    homes = np.concatenate(
        [np.stack([groups[ids], np.full(len(ids), client)], 1) for client, ids in enumerate(world.partitions)]
    )
    whose, homes_of = np.unique(np.unique(homes, axis=0)[:, 0], return_counts=True)
    if homes_of.max() > 1:
        raise ConfigError(
            f"setting 'partition.name' = {config.partition.name!r} spreads {int((homes_of > 1).sum())} of "
            f"{len(whose)} people over several clients, and people are asked about ('attack.unit' = 'group'); "
            "use 'natural'"
        )


def _refuse_overlaps(world: World) -> None:
    """Refuse a world whose pools share a sample, or a picture."""
    dealt = np.concatenate(world.partitions)
    ids, times = np.unique(dealt, return_counts=True)
    if times.max() > 1:
        raise DataError(
            f"membership: sample {ids[times.argmax()]} is dealt out twice; a candidate may stand in the list once"
        )
    untrained = np.concatenate([world.pools.nonmembers, world.pools.withheld])
    theirs = set(fingerprints(world.dataset.images[dealt]))
    ours = fingerprints(world.dataset.images[untrained])
    if both := [i for i, picture in zip(untrained, ours, strict=True) if picture in theirs]:
        raise DataError(
            f"membership: the picture of non-member {both[0]} is also at a client ({len(both)} such); members and "
            "non-members must differ"
        )
    if world.auxiliary is not None:
        public = (world.auxiliary.images * 255).round().to(torch.uint8).numpy()
        either = theirs | set(ours)
        if both := [n for n, picture in enumerate(fingerprints(public)) if picture in either]:
            raise DataError(
                f"membership: public image {both[0]} is also a client's or a non-member ({len(both)} such); "
                "candidates must not be among the public images"
            )


class _Units(Protocol):
    """What may be asked about: units by their keys."""

    def at(self, client: int, used: Ids) -> Ids:
        """The client's units, of the samples `used` that it trains on."""

    @property
    def held_out(self) -> Ids:
        """The units that no client has."""

    def pair(self, members: Ids, pool: Ids, given: Mapping[int, int]) -> dict[int, int]:
        """Member -> non-member of the pool, none twice; `given` stand."""

    def samples(self, unit: int) -> Ids:
        """The ids by which a unit is asked about."""


class _Samples:
    """Samples are asked about."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.held_out = world.pools.nonmembers
        homes: dict[bytes, list[int]] = defaultdict(list)
        for ids in world.partitions:
            for sample, picture in zip(ids.tolist(), fingerprints(world.dataset.images[ids]), strict=True):
                homes[picture].append(sample)
        # Whoever has a picture that another has too: it cannot be told whose member it is.
        self._copies = np.array([i for same in homes.values() if len(same) > 1 for i in same], dtype=np.int64)

    def at(self, client: int, used: Ids) -> Ids:
        return np.setdiff1d(used, self._copies)

    def samples(self, unit: int) -> Ids:
        return np.array([unit])

    def pair(self, members: Ids, pool: Ids, given: Mapping[int, int]) -> dict[int, int]:
        """Of one label and person, else of one label.

        Unlike pairs are made only to reach :data:`FEW_MEMBERS`: fewer candidates are better than two kinds of them.
        """
        dataset = self.world.dataset
        nobody = np.zeros(len(dataset), dtype=np.int64)
        groups = nobody if dataset.groups is None else dataset.groups
        alike = [(dataset.labels, groups), (dataset.labels, nobody)]
        unlike = [(nobody, groups), (nobody, nobody)]
        pairs = dict(given)
        for label, group in alike + unlike:
            wanted = len(members) if label is dataset.labels else min(len(members), FEW_MEMBERS)
            taken = set(pairs.values())
            waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
            for i in pool.tolist():
                if i not in taken:
                    waiting[int(label[i]), int(group[i])].append(i)
            for member in members.tolist():
                candidates = waiting[int(label[member]), int(group[member])]
                if len(pairs) < wanted and member not in pairs and candidates:
                    pairs[member] = candidates.pop()
        return pairs


class _People:
    """People are asked about, by samples that nobody trained on: the same share of everybody's."""

    def __init__(self, world: World, share: float, rng: np.random.Generator) -> None:
        self.world = world
        assert world.dataset.groups is not None, "see check_question"
        self.groups = world.dataset.groups
        pool = rng.permutation(world.pools.nonmembers)
        strangers = pool[share_of_each(self.groups[pool], share)]
        self.held_out = np.unique(self.groups[strangers])
        self._by: dict[int, list[int]] = defaultdict(list)
        for sample in [*world.pools.withheld.tolist(), *strangers.tolist()]:
            self._by[int(self.groups[sample])].append(sample)

    def at(self, client: int, used: Ids) -> Ids:
        return np.intersect1d(self.groups[used], np.array(list(self._by), dtype=np.int64))

    def samples(self, unit: int) -> Ids:
        return np.array(self._by[unit])

    def pair(self, members: Ids, pool: Ids, given: Mapping[int, int]) -> dict[int, int]:
        """So that the labels of the two are distributed alike: the least sum of distances."""
        lonely = [int(m) for m in members if m not in given]
        free = [int(n) for n in pool if n not in set(given.values())]
        distance = np.abs(self._labels(lonely)[:, None] - self._labels(free)[None]).sum(2)
        rows, columns = linear_sum_assignment(distance)
        return dict(given) | {lonely[i]: free[j] for i, j in zip(rows, columns, strict=True)}

    def _labels(self, people: Sequence[int]) -> NDArray[np.float64]:
        """Share of each label among each one's samples."""
        labels, classes = self.world.dataset.labels, self.world.dataset.classes
        counts = [np.bincount(labels[self.samples(p)], minlength=classes) for p in people]
        found = np.array(counts, dtype=np.float64).reshape(len(people), classes)
        return found / found.sum(1, keepdims=True)


def choose_question(
    config: Config, world: World, targets: Sequence[int], *rounds: Rounds, others: Sequence[int] = ()
) -> Question:
    """The candidates: of each target at most ``attack.candidates`` that it trains on, and what stands beside them.

    Parameters
    ----------
    rounds : mapping
        For each attack, or kind of attack, the rounds that it reads; members that several can read come first.
    others : sequence of int
        Clients that are no targets, of each of which ``attack.others`` members stand in the list as well.

    Raises
    ------
    DataError
        If pools overlap, or nothing is held out.
    NotApplicable
        If no target takes part in the rounds, or no member stands beside a non-member.
    """
    if not len(world.pools.nonmembers):
        raise DataError(
            "membership: no non-member is held out; raise setting 'data.nonmembers' "
            f"(now {config.data.nonmembers}) or use a larger data set"
        )
    _refuse_overlaps(world)
    rng = numpy_rng(config.seed, "membership candidates")
    by_person = config.attack.unit == "group"
    units: _Units = _People(world, config.data.withheld, rng) if by_person else _Samples(world)
    present = tuple(target for target in targets if any(one.get(target) for one in rounds))
    if absent := sorted(set(targets) - set(present)):
        log.warning("membership: no target, for they answer in no round: clients %s", absent)
    limits = dict.fromkeys(others, config.attack.others) | dict.fromkeys(present, config.attack.candidates)
    chosen = {c: _drawn(config, world, units, c, rounds, rng)[:limit] for c, limit in limits.items()}
    members = np.concatenate([np.zeros(0, dtype=np.int64), *(chosen[t] for t in present)])
    if not len(members):
        raise NotApplicable("membership: no client that is asked about takes part in the rounds asked about")
    held_out = rng.permutation(units.held_out)
    everyone = units.pair(rng.permutation(members), held_out, {})
    # Those that are in the list already are taken first: from the end.
    pool = np.concatenate(
        [np.setdiff1d(held_out, list(everyone.values())), np.array(list(everyone.values()))]
    )
    found: dict[int, list[tuple[int, int]]] = {EVERYONE: list(everyone.items())}
    for target in present:
        mine, found[target] = chosen[target], []
        if config.attack.negatives != "others":
            given = {m: everyone[m] for m in mine.tolist() if m in everyone}
            found[target] += units.pair(mine, pool.astype(np.int64), given).items()
        if config.attack.negatives != "held-out":
            theirs = [ids for client, ids in chosen.items() if client != target]
            others_members = rng.permutation(np.concatenate([np.zeros(0, dtype=np.int64), *theirs]))
            found[target] += units.pair(mine, others_members, {}).items()
    if not any(found[target] for target in present):
        raise NotApplicable(
            f"membership: no member stands beside a non-member ('attack.negatives' = {config.attack.negatives!r}); "
            "hold more out ('data.nonmembers'), or ask about more clients ('attack.targets', 'attack.others')"
        )
    question = _listed(units, chosen, found, present, by_person, rng)
    _warn(question, config, world)
    return question


def _warn(question: Question, config: Config, world: World) -> None:
    """Say what makes the answers worth less."""
    asked = np.unique(np.concatenate([question.pairs[target][:, 0] for target in question.targets]))
    if len(asked) < FEW_MEMBERS:
        log.warning(
            "membership: only %d members to ask about (%d of %d held-out samples stand beside members); chance alone "
            "spreads widely over so few",
            *(len(asked), (question.owner == HELD_OUT).sum(), len(world.pools.nonmembers)),
        )
    found = {
        target: _shared(world.dataset.labels, *question.sides(pairs))
        for target, pairs in question.pairs.items()
        if len(pairs) and (target == EVERYONE or not question.by_person)
    }
    least = min(found, key=lambda target: found[target])
    if found[least] < question.alike and config.data.labels == "natural":
        log.warning(
            "membership: of %s only %.1f %% of the non-members have the label of a member, so a score above chance "
            "may tell classes apart rather than members",
            *(called(least), 100 * found[least]),
        )


def _drawn(
    config: Config,
    world: World,
    units: _Units,
    client: int,
    rounds: Sequence[Rounds],
    rng: np.random.Generator,
) -> Ids:
    """A client's units in random order, those first that it trains on in the rounds of most attacks."""
    read = [units.at(client, trained_on(config, world, {client: one.get(client, ())})) for one in rounds]
    keys, times = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *read]), return_counts=True)
    order = rng.permutation(len(keys))
    return keys[order[np.argsort(-times[order], kind="stable")]]


def _listed(
    units: _Units,
    chosen: Mapping[int, Ids],
    found: Mapping[int, Sequence[tuple[int, int]]],
    targets: tuple[int, ...],
    by_person: bool,
    rng: np.random.Generator,
) -> Question:
    """The list in random order."""
    owners = {int(key): client for client, keys in chosen.items() for key in keys}
    partners = {n for both in found.values() for _, n in both}
    keys = rng.permutation(np.array(sorted(owners.keys() | partners), dtype=np.int64))
    place = {int(key): index for index, key in enumerate(keys)}
    samples = [units.samples(int(key)) for key in keys]
    ids, unit = np.concatenate(samples), np.repeat(np.arange(len(keys)), [len(one) for one in samples])
    order = rng.permutation(len(ids)) if by_person else np.arange(len(ids))
    pairs = {
        target: np.array([[place[m], place[n]] for m, n in both], dtype=np.int64).reshape(-1, 2)
        for target, both in found.items()
    }
    owner = np.array([owners.get(int(key), HELD_OUT) for key in keys], dtype=np.int64)
    return Question(ids[order], unit[order], keys, owner, targets, pairs, by_person)


def _named(ids: Ids, world: World, by_person: bool) -> Ids:
    """The keys of samples: they themselves, or whose they are."""
    groups = world.dataset.groups
    return groups[ids] if by_person and groups is not None else ids


def _shared(key: Ids, members: Ids, nonmembers: Ids) -> float:
    """What the distributions of a key among members and non-members have in common, from 0 to 1."""
    _, place = np.unique(key, return_inverse=True)
    shares = [np.bincount(place[ids], minlength=place.max() + 1) / len(ids) for ids in (members, nonmembers)]
    return float(np.minimum(*shares).sum())
